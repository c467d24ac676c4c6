"""Kills the Slack bot at random points, and proves that nothing is lost, no final answer doubled, the books right.

    python -m tests.drill.slack --events 1000 --kills 20 --seed 1 [--json FILE]

The fake Slack lives in a process of its own and outlives every program that is killed. It retries events over HTTP,
re-sends envelopes by Socket Mode, sends some twice, and keeps streams open that nobody ends. A program is forked from
this one, which has imported everything and started no thread, and is cut by SIGKILL.
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
from pathlib import Path
from typing import Any

import sqlite_utils
from aiohttp import web

from bots.slack.bot import SlackBot
from bots.slack.web import EVENTS
from core.delivery import Deliveries
from core.engine.protocol import Request
from core.engine.scripted import ScriptedEngine
from core.service import Service, ServiceSettings
from core.settings import Retention
from core.store import directory
from core.store.database import Database, Tx, now_ms
from core.store.home import Cipher, Home, Lock
from core.training import Training, TrainingSettings
from tests.bots.slack.talk import fast
from tests.drill.kills import copy_of, violations
from tests.drill.telegram import _get, fork
from tests.fakes.slack import FakeSlack
from tests.fakes.slack.server import APP_TOKEN, SIGNING

TEAM = "T1"
LONG = "\n\n".join(f"Paragraph {n} of a long answer. " + "word " * 90 for n in range(30))
_WORKERS = 24


def plan(seed: int, count: int) -> list[dict[str, Any]]:
    """The events, as Slack would write them; the same for the same seed."""
    draw, fake = random.Random(seed), FakeSlack()
    fake.workspace(TEAM)
    made = []
    for n in range(count):
        kind, user = draw.random(), f"U{draw.randrange(6)}"
        place = {"channel": f"C{draw.randrange(3)}"} if kind > 0.7 else {}
        name = "<@BT1> " if place else ""
        if kind < 0.03:
            event = {"type": "agent_session_stopped", "channel": f"D{user}", "thread_ts": fake.ts(), "user": user}
            made.append(fake.event(TEAM, event))
        elif kind < 0.07:
            made.append(fake.command(user, "usage"))
        elif kind < 0.10:
            made.append(fake.message(user, f"question {n} long"))
        else:
            made.append(fake.message(user, f"{name}question {n} " + "word " * draw.randrange(1, 12), **place))
    return made


def key_of(payload: dict[str, Any]) -> str:
    return str(payload.get("event_id") or payload["trigger_id"])


def answer(request: Request) -> str:
    asked = request.messages[-1].text
    found = re.match(r"question \d+", asked)
    return f"answer to {found[0] if found else asked}: {LONG if asked.endswith('long') else 'done'}"


# --- the platform's process ---


async def stand(events: list[dict[str, Any]], seed: int, port: Path, http_port: int) -> None:
    """Serve until killed. `/more/N` puts the events up to N into the queue; `/state` tells what is held."""
    draw, there, given, open_ = random.Random(seed), FakeSlack(), 0, 0
    there.workspace(TEAM)
    queue: asyncio.Queue[dict[str, Any]] = asyncio.Queue()

    async def work() -> None:
        nonlocal open_
        while True:
            payload = await queue.get()
            attempt = 0
            while True:
                by_socket = any(not one.closed for one in there.sockets)
                there.events_url = "" if by_socket else f"http://127.0.0.1:{http_port}{EVENTS}"
                if await there.send(payload, attempt) is not None:
                    break
                attempt += 1
                await asyncio.sleep(0.05)
            open_ -= 1

    async def more(request: web.Request) -> web.Response:
        nonlocal given, open_
        upto = int(request.match_info["upto"])
        fresh = events[given:upto]
        given = max(given, upto)
        again = [draw.choice(events[:given]) for _ in range(len(fresh) // 10)]  # some come twice
        for payload in (*fresh, *again):
            open_ += 1
            queue.put_nowait(payload)
        return web.Response(text=str(open_))

    async def state(request: web.Request) -> web.Response:
        held = [
            {
                "channel": one.channel,
                "ts": one.ts,
                "said": one.said,
                "streaming": one.streaming,
                "streamed": one.streamed,
                "labels": one.labels,
            }
            for one in there.messages.values()
        ]
        return web.json_response({"pending": open_, "held": held, "calls": len(there.calls)})

    async with there.open():
        app = web.Application()
        app.router.add_get("/more/{upto}", more)
        app.router.add_get("/state", state)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        aside = port.with_suffix(".new")
        aside.write_text(f"{there.url} http://127.0.0.1:{runner.addresses[0][1]}")
        aside.rename(port)
        async with asyncio.TaskGroup() as tasks:
            for _ in range(_WORKERS):
                tasks.create_task(work())


# --- the program's process ---


def prepare(home: Home) -> None:
    with Lock(home), Database(home.database, Cipher.open(home.key_file, create=True)) as database:

        def work(tx: Tx) -> None:
            directory.ensure_terminal(tx, "home")
            channel = directory.create_channel(tx, "drill", title="Drill")
            tx.run("UPDATE channel SET per_minute = 0, per_hour = 0, tokens_in = 0, tokens_out = 9999")
            tx.run("UPDATE price SET in_nano = 150, out_nano = 601, share_bps = 3333")
            directory.bind(tx, "slack", TEAM, "", channel.id)

        database.write_now(work)


async def live(home: Home, url: str, desk: str, http_port: int, transport: str, *, to_the_end: bool) -> None:
    """The program. Ends (`to_the_end`) when nothing is left to do, or is killed. Without a port: Socket Mode."""
    with Lock(home):
        async with (
            Database(home.database, Cipher.open(home.key_file, create=False)) as database,
            ScriptedEngine(answer, delay_s=0.0, max_rows=16, max_waiting=10_000) as engine,
        ):
            deliveries = Deliveries(database)
            training = Training(database, home, deliveries, engine.info, TrainingSettings())
            service = Service(database, home, engine, deliveries, training, ServiceSettings(Retention()))
            given = {"token": "xoxb-T1-secret", "api": f"{url}/api/", "transport": transport}
            if http_port:
                given |= {"signing_secret": SIGNING, "listen": f"127.0.0.1:{http_port}"}
            else:
                given |= {"app_token": APP_TOKEN}
            bot = SlackBot.configure(given)
            bot._pace = fast
            async with asyncio.TaskGroup() as tasks:
                running = [tasks.create_task(service.run()), tasks.create_task(bot.run(service))]
                if not to_the_end:
                    await asyncio.Event().wait()
                while json.loads(  # noqa: ASYNC110 - the other process is asked
                    await asyncio.to_thread(_get, f"{desk}/state")
                )["pending"]:
                    await asyncio.sleep(0.2)
                await service.settled("slack", TEAM)
                await service.drain(20)
                for task in running:
                    task.cancel()


# --- the check ---


def audit_books(home: Home, state: dict[str, Any], events: list[dict[str, Any]]) -> tuple[list[str], Counter[str]]:
    """What Slack holds against what the books say, after all is settled."""
    problems: list[str] = []
    outcomes: Counter[str] = Counter()
    cipher = Cipher.open(home.key_file, create=False)
    connection = sqlite3.connect(home.database, isolation_level=None)
    tx = Tx(sqlite_utils.Database(connection, execute_plugins=False), cipher, now_ms())
    held = {(one["channel"], one["ts"]): one for one in state["held"]}
    rows = {row["update_key"]: row for row in tx.all("SELECT * FROM inbox")}
    if set(rows) != {key_of(event) for event in events}:
        problems.append(f"{len(events) - len(rows)} events are not in the inbox")
    booked: set[tuple[str, str]] = set()
    for event in events:
        row = rows.get(key_of(event))
        if row is None:
            continue
        outcomes[row["outcome"]] += 1
        parts = tx.all(
            "SELECT receipt FROM part JOIN delivery ON delivery.id = delivery_id WHERE inbox_id = ? ORDER BY number",
            [row["id"]],
        )
        receipts = [json.loads(part["receipt"]) for part in parts if part["receipt"]]
        places = [(at["channel"], at["ts"]) for at in receipts]
        name = key_of(event)
        if row["outcome"] == "failed" and row["state"] != "dead":  # given up after five kills is the one way to fail
            problems.append(f"{name} failed")
        if row["state"] not in ("done", "dead"):
            problems.append(f"{name} is {row['state']}")
        if row["outcome"] in ("replied", "command") and (not places or len(places) != len(parts)):
            problems.append(f"{name} is {row['outcome']} without its messages")
        if any(place in booked for place in places):
            problems.append(f"{name} wrote into another's message")
        booked.update(places)
        said = " ".join(held[place]["said"] for place in places if place in held)
        asked = (event.get("event") or {}).get("text", "").removeprefix("<@BT1> ")
        found = re.match(r"question \d+", asked)
        if row["outcome"] == "replied" and found:
            right = f"answer to {found[0]}: {LONG if asked.endswith('long') else 'done'}"
            if said.split() != right.split():
                problems.append(f"{name} was answered {said[:80]!r}, {len(said)} characters, not {len(right)}")
            if places and not held[places[-1]]["labels"]:
                problems.append(f"{name} has no buttons")
        problems += [f"{place} of {name} still streams" for place in places if held[place]["streaming"]]
        if sum(held[place]["streamed"] for place in places) > 1:
            problems.append(f"{name} has a second stream")
    texts: Counter[str] = Counter()
    for place, one in held.items():
        if place not in booked:
            outcomes["orphans"] += 1
            final = one["said"] not in ("", "…") and not one["streaming"]
            if final and not _refusal(tx, place):
                problems.append(f"{place} is final but in no book: {one['said'][:60]!r}")
        if one["labels"] and one["said"].endswith(": done"):
            texts[one["said"]] += 1
    problems += [f"{text!r} stands there {count} times" for text, count in texts.items() if count > 1]
    replied = sum(row["outcome"] == "replied" for row in rows.values())
    charged = tx.value("SELECT count(*) FROM ledger")
    if charged != replied:
        problems.append(f"{charged} charges for {replied} replies")
    outcomes["charged"] = charged
    connection.close()
    return problems, outcomes


def _refusal(tx: Tx, place: tuple[str, str]) -> bool:
    """Whether a refusal was written there: it has a handle, and no receipt."""
    return bool(
        tx.value(
            "SELECT 1 FROM part JOIN delivery ON delivery.id = delivery_id WHERE delivery.state = 'failed'"
            " AND json_extract(handle, '$.channel') = ? AND json_extract(handle, '$.ts') = ?",
            [*place],
        )
    )


def drill(count: int, kills: int, seed: int, folder: Path) -> dict[str, Any]:
    draw, home, port = random.Random(seed), Home(folder / "home"), folder / "port"
    home.create()
    prepare(home)
    cipher = Cipher.open(home.key_file, create=False)
    events = plan(seed, count)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        http_port = int(probe.getsockname()[1])
    platform = fork(lambda: stand(events, seed, port, http_port))
    began = time.monotonic()
    problems: list[str] = []
    try:
        while not port.exists():
            time.sleep(0.05)
        url, desk = port.read_text().split()
        died = 0
        for number in range(kills):
            _get(f"{desk}/more/{(number + 1) * count // kills}")
            transport, way = draw.choice(("stream", "stream", "edit")), draw.choice((http_port, 0))
            pid = fork(lambda t=transport, w=way: live(home, url, desk, w, t, to_the_end=False))  # type: ignore[misc]
            time.sleep(0.3 + draw.random() * 1.2)
            os.kill(pid, signal.SIGKILL)
            _, status = os.waitpid(pid, 0)
            died += os.WIFSIGNALED(status)
            problems += [f"after kill {died}: {one}" for one in violations(copy_of(home, folder), cipher)]
        pid = fork(lambda: live(home, url, desk, http_port, "stream", to_the_end=True))
        _, status = os.waitpid(pid, 0)
        problems += [f"the last life ended with {status}"] if status else []
        state = json.loads(_get(f"{desk}/state"))
        books, outcomes = audit_books(home, state, events)
    finally:
        os.kill(platform, signal.SIGKILL)
        os.waitpid(platform, 0)
    return {
        "events": count,
        "kills": died,
        "outcomes": dict(outcomes),
        "streams": sum(one["streamed"] for one in state["held"]),
        "requests": state["calls"],
        "violations": problems + violations(home.database, cipher) + books,
        "seconds": round(time.monotonic() - began, 1),
        "seed": seed,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, default=1000)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = drill(given.events, given.kills, given.seed, Path(folder))
    report = json.dumps(result, indent=2)
    if given.json:
        given.json.write_text(report)
    sys.stdout.write(report + "\n")
    sys.exit(bool(result["violations"]))


if __name__ == "__main__":
    main()
