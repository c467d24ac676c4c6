"""Kills the Slack bot at random points, and proves that nothing is lost, no final answer doubled, the books right.

    python -m tests.drill.slack --events 1000 --kills 20 --seed 1 [--json FILE]

The fake Slack lives in a process of its own and outlives every program that is killed. It sends each event until it
is acknowledged, some twice, mentions as two events; by Socket Mode and over HTTP in turn, with streams left open.
"""

from __future__ import annotations

import asyncio
import json
import random
import socket
import time
from pathlib import Path
from typing import Any

from aiohttp import web

from bots.shared.rate_limits import Rate
from bots.slack.bot import SlackBot
from bots.slack.sending.rate_limits import SlackRateLimiter
from bots.slack.web import EVENTS
from core.channels import bindings, directory, terminal
from core.storage.cipher import Cipher
from core.storage.database import Database, Tx
from core.storage.home import Home, Lock
from tests.drill import lives
from tests.fakes.slack import FakeSlack
from tests.fakes.slack.held import APP_TOKEN, SIGNING
from tests.support.database import write_now

USERS = [f"U{n}" for n in range(5)]
ROOMS = ["C1", "C2", "C3"]
WORKERS = 8
METHODS = ("chat.startStream", "chat.stopStream", "chat.appendStream", "chat.update", "chat.postMessage")


def fast() -> SlackRateLimiter:
    return SlackRateLimiter(dict.fromkeys(METHODS, Rate(1e6, 1e6)))


def plan(seed: int, count: int) -> list[list[dict[str, Any]]]:
    """What happens, each as the payloads that Slack sends for it; the same for the same seed."""
    draw, fake = random.Random(seed), FakeSlack()
    fake.workspace("T1")
    threads: list[tuple[str, str]] = []
    made: list[list[dict[str, Any]]] = []
    for n in range(count):
        user, kind = draw.choice(USERS), draw.random()
        room = draw.choice(ROOMS)
        if n == count // 2:
            made.append([fake.message(user, lives.POISON)])
        elif kind < 0.03 and threads:
            place, thread = draw.choice(threads)
            made.append([_stopped(fake, user, place, thread)])
        elif kind < 0.08:
            made.append([fake.command(user, f"question {n} by command", channel=room)])
        elif kind < 0.11:
            made.append([fake.message(user, f"question {n} long")])
        elif kind < 0.35:
            text = f"<@BT1> question {n} " + "word " * draw.randrange(1, 9)
            said = fake.message(user, text.strip(), channel=room)
            mention = fake.event("T1", {**said["event"], "type": "app_mention"})
            threads.append((room, said["event"]["ts"]))
            made.append([said, mention] if draw.random() < 0.5 else [mention, said])
        elif kind < 0.5 and any(place[0] == "D" for place, _ in threads):
            place, thread = draw.choice([one for one in threads if one[0][0] == "D"])
            made.append([fake.message(place[1:], f"question {n} more", channel=place, thread_ts=thread)])
        else:
            said = fake.message(user, f"question {n} " + "word " * draw.randrange(1, 9))
            threads.append((said["event"]["channel"], said["event"]["ts"]))
            made.append([said])
    return made


def _stopped(fake: FakeSlack, user: str, place: str, thread: str) -> dict[str, Any]:
    return fake.event(
        "T1",
        {
            "type": "agent_session_stopped",
            "channel": place,
            "thread_ts": thread,
            "user": user,
            "streaming_message_ts": [],
        },
    )


# --- the platform's process ---


async def stand(happenings: list[list[dict[str, Any]]], seed: int, port: Path) -> None:
    """Serve until killed. `/more/N` lets happen what comes up to N; `/events/URL` says where; `/state` what is held."""
    draw, there, given = random.Random(seed), FakeSlack(), 0
    there.workspace("T1")
    waiting: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
    open_ones = 0

    async def deliver() -> None:
        nonlocal open_ones
        while True:
            payload = await waiting.get()
            attempt = 0
            while True:
                try:
                    async with asyncio.timeout(3):  # as Slack waits
                        if await there.send(payload, attempt) is not None:
                            break
                except (TimeoutError, OSError):
                    pass
                attempt += 1
                there.retries[""] += 1
                await asyncio.sleep(0.03)
            open_ones -= 1

    async def more(request: web.Request) -> web.Response:
        nonlocal given, open_ones
        upto = int(request.match_info["upto"])
        there.later(15)
        for happening in happenings[given:upto]:
            payloads = (
                [*happening, draw.choice(draw.choice(happenings[: given + 1]))] if draw.random() < 0.1 else happening
            )
            for payload in payloads:
                open_ones += 1
                waiting.put_nowait(payload)
        given = max(given, upto)
        return web.Response()

    async def events(request: web.Request) -> web.Response:
        there.events_url = request.query.get("url", "")
        return web.Response()

    async def state(request: web.Request) -> web.Response:
        held = [
            {"channel": one.channel, "ts": one.ts, "text": one.said, "labels": one.labels, "streaming": one.streaming}
            for one in there.messages.values()
        ]
        told = {"open": open_ones, "held": held, "early": there.early, "retries": sum(there.retries.values())}
        return web.json_response(told | {"streams": len(there.called("chat.startStream")), "calls": len(there.calls)})

    async with there.open(), asyncio.TaskGroup() as tasks:
        for _ in range(WORKERS):
            tasks.create_task(deliver())
        await lives.serve_controls(there.url, {"/more/{upto}": more, "/events": events, "/state": state}, port)


# --- the program's process ---


def prepare(home: Home) -> None:
    with Lock(home), Database(home.database, Cipher.open(home.key_file, create=True)) as database:

        def work(tx: Tx) -> None:
            terminal.ensure_terminal(tx, "home")
            channel = directory.create_channel(tx, "drill", title="Drill")
            tx.run("UPDATE channel SET per_minute = 0, per_hour = 0, tokens_in = 0, tokens_out = 9999")
            tx.run("UPDATE price SET in_nano = 150, out_nano = 601, share_bps = 3333")
            bindings.bind(tx, "slack", "T1", "", channel.id)

        write_now(database, work)


async def live(home: Home, url: str, listen: str = "", *, to_the_end: bool) -> None:
    """By Socket Mode, or (with `listen`) over HTTP."""
    way = {"signing_secret": SIGNING, "listen": listen} if listen else {"app_token": APP_TOKEN}
    bot = SlackBot.configure({"token": "xoxb-T1-secret", "api": f"{url}/api/", **way})
    bot._limiter = fast
    await lives.run_bot(home, bot, "T1", to_the_end=to_the_end)


# --- the check ---


def audit(tx: Tx, state: lives.Report, happenings: list[list[dict[str, Any]]]) -> tuple[list[str], dict[str, int]]:
    """What Slack holds against what the books say, after all is settled."""
    sent = {_key(payload): payload for one in happenings for payload in one}
    held = {(one["channel"], one["ts"]): one for one in state["held"]}
    problems, outcomes, booked = lives.audit_books(
        tx, held, lambda row: _text(sent[row["update_key"]]), lambda receipt: (receipt["channel"], receipt["ts"])
    )
    taken = {row["update_key"] for row in tx.all("SELECT update_key FROM inbox")}
    if lost := sum(not any(_key(payload) in taken for payload in one) for one in happenings):
        problems.append(f"{lost} events are not in the inbox")
    if len(taken) != len(happenings):
        problems.append(f"{len(taken)} rows for {len(happenings)} happenings")
    problems += [f"{place} is a stream that never ended" for place in booked if held[place]["streaming"]]
    problems += [f"{state['early']} calls before Retry-After was over"] if state["early"] else []
    problems += [f"{state['open']} events were never acknowledged"] if state["open"] else []
    return problems, dict(outcomes)


def _key(payload: dict[str, Any]) -> str:
    return str(payload.get("event_id") or payload.get("trigger_id"))


def _text(payload: dict[str, Any]) -> str:
    return str(payload.get("text") or (payload.get("event") or {}).get("text", ""))


def drill(count: int, kills: int, seed: int, folder: Path) -> lives.Report:
    home, port = Home(folder / "home"), folder / "port"
    home.create()
    prepare(home)
    happenings = plan(seed, count)
    listen = f"127.0.0.1:{_free_port()}"
    began = time.monotonic()
    with lives.forked_platform(lambda: stand(happenings, seed, port), port) as (url, controls):

        def start(draw: random.Random, to_the_end: bool) -> int:
            by_http = to_the_end or draw.random() < 0.4
            lives.get(f"{controls}/events" + (f"?url=http://{listen}{EVENTS}" if by_http else ""))
            at = listen if by_http else ""
            return lives.fork(lambda: live(home, url, at, to_the_end=to_the_end))

        problems, died = lives.drill_bot(home, seed, count, kills, controls, start, folder)
        state = json.loads(lives.get(f"{controls}/state"))
    with lives.opened(home.database, Cipher.open(home.key_file, create=False)) as tx:
        found, outcomes = audit(tx, state, happenings)
    return {
        "events": sum(len(one) for one in happenings),
        "happenings": count,
        "kills": died,
        "outcomes": outcomes,
        "streams": state["streams"],
        "retries": state["retries"],
        "requests": state["calls"],
        "violations": problems + found,
        "seconds": round(time.monotonic() - began, 1),
        "seed": seed,
    }


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


if __name__ == "__main__":
    lives.main("events", drill, live, __doc__)
