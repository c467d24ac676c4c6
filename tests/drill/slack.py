"""Kills the Slack bot at random points, and proves that nothing is lost, no final answer doubled, the books right.

    python -m tests.drill.slack --events 1000 --kills 20 --seed 1 [--json FILE]

The fake Slack lives in a process of its own and outlives every program that is killed. It sends each event until it
is acknowledged, some twice, mentions as two events; by Socket Mode and over HTTP in turn, with streams left open.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import signal
import socket
import sqlite3
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sqlite_utils
from aiohttp import web

from bots.slack.bot import SlackBot
from bots.slack.sending.rate_limits import SlackRate, SlackRateLimiter
from bots.slack.web import EVENTS
from core.channels import bindings, directory, terminal
from core.chat.service import Service, ServiceSettings
from core.config.schema import Retention
from core.delivery.deliveries import Deliveries
from core.engine.protocol import Request
from core.engine.scripted import ScriptedEngine
from core.jobs.supervisor import JobSupervisor, TrainingSettings
from core.observability import logs
from core.storage.database import Database, Tx, now_ms
from core.storage.home import Cipher, Home, Lock
from tests.drill.kills import copy_of, violations
from tests.drill.telegram import fork, get
from tests.fakes.slack import FakeSlack
from tests.fakes.slack.held import APP_TOKEN, SIGNING

USERS = [f"U{n}" for n in range(5)]
ROOMS = ["C1", "C2", "C3"]
WORKERS = 8
LONG = "\n\n".join(f"Paragraph {n} of a long answer. " + f"{'word' * 12} " * 10 for n in range(25))
METHODS = ("chat.startStream", "chat.stopStream", "chat.appendStream", "chat.update", "chat.postMessage")


def fast() -> SlackRateLimiter:
    return SlackRateLimiter(dict.fromkeys(METHODS, SlackRate(1e6, 1e6)))


def plan(seed: int, count: int) -> list[list[dict[str, Any]]]:
    """What happens, each as the payloads that Slack sends for it; the same for the same seed."""
    draw, fake = random.Random(seed), FakeSlack()
    fake.workspace("T1")
    threads: list[tuple[str, str]] = []
    made: list[list[dict[str, Any]]] = []
    for n in range(count):
        user, kind = draw.choice(USERS), draw.random()
        room = draw.choice(ROOMS)
        if kind < 0.03 and threads:
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


def answer(request: Request) -> str:
    asked = request.messages[-1].text
    found = re.match(r"question \d+", asked)
    return f"answer to {found[0] if found else asked}: {LONG if asked.endswith('long') else 'done'}"


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
                    async with asyncio.timeout(2):
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
        app = web.Application()
        app.router.add_get("/more/{upto}", more)
        app.router.add_get("/events", events)
        app.router.add_get("/state", state)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        aside = port.with_suffix(".new")
        aside.write_text(f"{there.url} http://127.0.0.1:{runner.addresses[0][1]}")
        aside.rename(port)
        await asyncio.Event().wait()


# --- the program's process ---


def prepare(home: Home) -> None:
    with Lock(home), Database(home.database, Cipher.open(home.key_file, create=True)) as database:

        def work(tx: Tx) -> None:
            terminal.ensure_terminal(tx, "home")
            channel = directory.create_channel(tx, "drill", title="Drill")
            tx.run("UPDATE channel SET per_minute = 0, per_hour = 0, tokens_in = 0, tokens_out = 9999")
            tx.run("UPDATE price SET in_nano = 150, out_nano = 601, share_bps = 3333")
            bindings.bind(tx, "slack", "T1", "", channel.id)

        database.write_now(work)


async def live(home: Home, url: str, listen: str, *, to_the_end: bool) -> None:
    """The program: by Socket Mode, or (with `listen`) over HTTP. Ends by SIGTERM, or when nothing is left to do."""
    with Lock(home):
        async with (
            Database(home.database, Cipher.open(home.key_file, create=False)) as database,
            ScriptedEngine(answer, delay_s=0.0, max_rows=16, max_waiting=10_000) as engine,
        ):
            deliveries = Deliveries(database)
            training = JobSupervisor(database, home, deliveries, engine.info, TrainingSettings())
            service = Service(database, home, engine, deliveries, training, ServiceSettings(Retention()))
            way = {"signing_secret": SIGNING, "listen": listen} if listen else {"app_token": APP_TOKEN}
            bot = SlackBot.configure({"token": "xoxb-T1-secret", "api": f"{url}/api/", **way})
            bot._pace = fast
            stop = asyncio.Event()
            asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
            async with asyncio.TaskGroup() as tasks:
                running = [tasks.create_task(service.run()), tasks.create_task(bot.run(service))]
                if to_the_end:
                    tasks.create_task(_watch(service, stop))
                await stop.wait()
                await service.drain(20)
                for task in running:
                    task.cancel()


async def _watch(service: Service, stop: asyncio.Event) -> None:
    """Say stop when nothing is open, and still is not for some seconds: what was not acknowledged comes again."""
    quiet = 0
    while quiet < 15:
        await asyncio.sleep(0.2)
        try:
            async with asyncio.timeout(0.2):
                await service.settled("slack", "T1")
            quiet += 1
        except TimeoutError:
            quiet = 0
    stop.set()


# --- the check ---


def audit_books(
    home: Home, state: dict[str, Any], happenings: list[list[dict[str, Any]]]
) -> tuple[list[str], Counter[str]]:
    """What Slack holds against what the books say, after all is settled."""
    problems: list[str] = [f"{state['early']} calls before Retry-After was over"] if state["early"] else []
    outcomes: Counter[str] = Counter()
    cipher = Cipher.open(home.key_file, create=False)
    connection = sqlite3.connect(home.database, isolation_level=None)
    tx = Tx(sqlite_utils.Database(connection, execute_plugins=False), cipher, now_ms())
    held = {(one["channel"], one["ts"]): one for one in state["held"]}
    rows = tx.all("SELECT * FROM inbox ORDER BY id")
    by_update = {row["update_key"]: row for row in rows}
    asked = {
        str(payload.get("event_id") or payload.get("trigger_id")): payload for one in happenings for payload in one
    }
    if lost := sum(
        not any(str(p.get("event_id") or p.get("trigger_id")) in by_update for p in one) for one in happenings
    ):
        problems.append(f"{lost} events are not in the inbox")
    if len(rows) != len(happenings):
        problems.append(f"{len(rows)} rows for {len(happenings)} happenings")
    booked: set[tuple[str, str]] = set()
    for row in rows:
        key = row["update_key"]
        outcomes[row["outcome"]] += 1
        parts = tx.all(
            "SELECT receipt FROM part JOIN delivery ON delivery.id = delivery_id WHERE inbox_id = ? ORDER BY number",
            [row["id"]],
        )
        receipts = [json.loads(part["receipt"]) for part in parts if part["receipt"]]
        places = [(at["channel"], at["ts"]) for at in receipts]
        if row["state"] not in ("done", "dead"):
            problems.append(f"{key} is {row['state']}")
        if row["outcome"] in ("replied", "command") and (not places or len(places) != len(parts)):
            problems.append(f"{key} is {row['outcome']} without its messages")
        if doubled := [place for place in places if place in booked]:
            problems.append(f"{key} wrote into another's message {doubled}")
        booked.update(places)
        said = "\n".join(held[place]["text"] for place in places if place in held)
        payload = asked[key]
        text = payload.get("text") or (payload.get("event") or {}).get("text", "")
        found = re.search(r"question \d+", text)
        complete = tx.value("SELECT finish FROM generation WHERE inbox_id = ?", [row["id"]]) == "end"
        if row["outcome"] == "replied" and found and complete:
            right = f"answer to {found[0]}: {LONG if text.endswith('long') else 'done'}"
            if said.split() != right.split():
                problems.append(f"{key} was answered {said[:80]!r}, {len(said)} characters")
            if places and not held[places[-1]]["labels"]:
                problems.append(f"{key} has no buttons")
    finals = Counter(one["text"] for one in held.values() if one["text"].endswith(": done"))
    problems += [f"{text!r} stands there {count} times" for text, count in finals.items() if count > 1]
    problems += [f"{place} is a stream that never ended" for place in booked if held[place]["streaming"]]
    outcomes["orphans"] = sum(place not in booked for place in held)
    replied = sum(row["outcome"] == "replied" for row in rows)
    charged = tx.value("SELECT count(*) FROM ledger")
    if charged != replied:
        problems.append(f"{charged} charges for {replied} replies")
    outcomes["charged"] = charged
    connection.close()
    return problems, outcomes


def drill(count: int, kills: int, seed: int, folder: Path) -> dict[str, Any]:
    draw, home, port = random.Random(seed), Home(folder / "home"), folder / "port"
    home.create()
    prepare(home)
    cipher = Cipher.open(home.key_file, create=False)
    happenings = plan(seed, count)
    platform = fork(lambda: stand(happenings, seed, port))
    listen = f"127.0.0.1:{_free_port()}"
    began = time.monotonic()
    problems: list[str] = []
    try:
        while not port.exists():
            time.sleep(0.05)
        url, desk = port.read_text().split()

        def start(by_http: bool, *, to_the_end: bool) -> int:
            get(f"{desk}/events" + (f"?url=http://{listen}{EVENTS}" if by_http else ""))
            at = listen if by_http else ""
            return fork(_life(home, url, at, to_the_end=to_the_end))

        died = 0
        for number in range(kills):
            get(f"{desk}/more/{(number + 1) * count // kills}")
            pid = start(draw.random() < 0.4, to_the_end=False)
            time.sleep(0.15 + draw.random() * 0.9)
            os.kill(pid, signal.SIGKILL)
            _, status = os.waitpid(pid, 0)
            died += os.WIFSIGNALED(status)
            problems += [f"after kill {died}: {one}" for one in violations(copy_of(home, folder), cipher)]
        _, status = os.waitpid(start(by_http=True, to_the_end=True), 0)
        problems += [f"the last life ended with {status}"] if status else []
        state = json.loads(get(f"{desk}/state"))
        problems += [f"{state['open']} events were never acknowledged"] if state["open"] else []
        books, outcomes = audit_books(home, state, happenings)
    finally:
        os.kill(platform, signal.SIGKILL)
        os.waitpid(platform, 0)
    return {
        "events": sum(len(one) for one in happenings),
        "happenings": count,
        "kills": died,
        "outcomes": dict(outcomes),
        "streams": state["streams"],
        "retries": state["retries"],
        "requests": state["calls"],
        "violations": problems + violations(home.database, cipher) + books,
        "seconds": round(time.monotonic() - began, 1),
        "seed": seed,
    }


def _life(home: Home, url: str, listen: str, *, to_the_end: bool) -> Callable[[], Any]:
    return lambda: live(home, url, listen, to_the_end=to_the_end)


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, default=1000)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--live", nargs=2, metavar=("HOME", "URL"), help="be the program, until SIGTERM")
    parser.add_argument("--to-the-end", action="store_true", help="... or until nothing is left to do")
    given = parser.parse_args()
    logs.install("warning")
    if given.live:
        asyncio.run(live(Home(Path(given.live[0])), given.live[1], "", to_the_end=given.to_the_end))
        return
    with tempfile.TemporaryDirectory() as folder:
        result = drill(given.events, given.kills, given.seed, Path(folder))
    report = json.dumps(result, indent=2)
    if given.json:
        given.json.write_text(report)
    sys.stdout.write(report + "\n")
    sys.exit(bool(result["violations"]))


if __name__ == "__main__":
    main()
