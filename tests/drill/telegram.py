"""Kills the Telegram bot at random points, and proves that nothing is lost, no final answer doubled, the books right.

    python -m tests.drill.telegram --updates 1000 --kills 20 --seed 1 [--json FILE]

The fake Telegram lives in a process of its own and outlives every program that is killed. It repeats updates, hands
them out in another order, and takes drafts and edits. A program is forked from this one, which has imported
everything and started no thread, and is cut by SIGKILL.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import signal
import sqlite3
import sys
import tempfile
import time
import urllib.request
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sqlite_utils
from aiohttp import web

from bots.telegram.bot import TelegramBot
from bots.telegram.sending.rate_limits import SendLimits, TelegramRate, TelegramRateLimiter
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
from tests.fakes.telegram import FakeTelegram, Person
from tests.fakes.telegram.people import message
from tests.fakes.telegram.server import TOKEN

PEOPLE = [Person(100 + n, f"P{n}") for n in range(5)]
GROUPS = [-200 - n for n in range(3)]
FAST = TelegramRate(1e6, 1e6)
LONG = "\n\n".join(f"Paragraph {n} of a long answer. " + "word " * 60 for n in range(24))


def plan(seed: int, count: int) -> list[dict[str, Any]]:
    """The updates, as Telegram would write them; the same for the same seed."""
    draw, fake = random.Random(seed), FakeTelegram()
    made = []
    for n in range(count):
        person, kind = draw.choice(PEOPLE), draw.random()
        group = kind > 0.7
        chat = fake.chat(draw.choice(GROUPS), "supergroup") if group else fake.chat(person.id)
        name = "@acme_bot " if group else ""
        if kind < 0.03:
            made.append({"stopped_message_generation": {"chat": chat.json(), "draft_id": 1}})
            continue
        if kind < 0.07:
            text = "/usage"
        elif kind < 0.10:
            text = f"question {n} long"
        else:
            text = f"{name}question {n} " + "word " * draw.randrange(1, 12)
        made.append({"message": message(chat, person, 10_000 + n, text.strip())})
    return [{"update_id": n + 1} | update for n, update in enumerate(made)]


def answer(request: Request) -> str:
    asked = request.messages[-1].text
    found = re.match(r"question \d+", asked)
    return f"answer to {found[0] if found else asked}: {LONG if asked.endswith('long') else 'done'}"


# --- the platform's process ---


async def stand(updates: list[dict[str, Any]], seed: int, port: Path) -> None:
    """Serve until killed. `/more/N` puts the updates up to N into the queue; `/state` tells what is held."""
    draw, there, given = random.Random(seed), FakeTelegram(), 0
    for person in PEOPLE:
        there.chat(person.id)
    for group in GROUPS:
        there.chat(group, "supergroup")

    async def more(request: web.Request) -> web.Response:
        nonlocal given
        upto = int(request.match_info["upto"])
        fresh = updates[given:upto]
        given = max(given, upto)
        for at in range(len(fresh) - 1):  # neighbours change places
            if draw.random() < 0.1:
                fresh[at], fresh[at + 1] = fresh[at + 1], fresh[at]
        again = [draw.choice(updates[:given]) for _ in range(len(fresh) // 10)]  # and some come twice
        there.account.pending += [*fresh, *again]
        there.account.came.set()
        return web.Response(text=str(len(there.account.pending)))

    async def state(request: web.Request) -> web.Response:
        held = [
            {"chat": one.chat, "id": one.id, "text": one.text, "texts": one.texts[:3], "labels": one.labels}
            for one in there.messages.values()
        ]
        told = {"pending": len(there.account.pending), "held": held, "violations": there.violations}
        return web.json_response(told | {"drafts": len(there.drafted), "calls": len(there.calls)})

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
        await asyncio.Event().wait()


# --- the program's process ---


def prepare(home: Home) -> None:
    with Lock(home), Database(home.database, Cipher.open(home.key_file, create=True)) as database:

        def work(tx: Tx) -> None:
            terminal.ensure_terminal(tx, "home")
            channel = directory.create_channel(tx, "drill", title="Drill")
            tx.run("UPDATE channel SET per_minute = 0, per_hour = 0, tokens_in = 0, tokens_out = 9999")
            tx.run("UPDATE price SET in_nano = 150, out_nano = 601, share_bps = 3333")
            bindings.bind(tx, "telegram", "acme_bot", "", channel.id)

        database.write_now(work)


async def live(home: Home, url: str, transport: str, *, to_the_end: bool) -> None:
    """The program. Ends by SIGTERM, or (`to_the_end`) when nothing is left to do."""
    with Lock(home):
        async with (
            Database(home.database, Cipher.open(home.key_file, create=False)) as database,
            ScriptedEngine(answer, delay_s=0.0, max_rows=16, max_waiting=10_000) as engine,
        ):
            deliveries = Deliveries(database)
            training = JobSupervisor(database, home, deliveries, engine.info, TrainingSettings())
            service = Service(database, home, engine, deliveries, training, ServiceSettings(Retention()))
            bot = TelegramBot.configure({"token": TOKEN, "api": url, "transport": transport})
            bot._pace = TelegramRateLimiter(SendLimits(FAST, FAST, FAST, FAST))
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
    """Say stop when nothing is open, and still is not a moment later."""
    quiet = 0
    while quiet < 5:
        await asyncio.sleep(0.2)
        try:
            async with asyncio.timeout(0.2):
                await service.settled("telegram", "acme_bot")
            quiet += 1
        except TimeoutError:
            quiet = 0
    stop.set()


def fork(work: Callable[[], Any]) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        asyncio.run(work())
        code = 0
    except BaseException as error:
        sys.stderr.write(f"a process ended by itself: {error!r} {getattr(error, 'exceptions', '')!r}\n")
    finally:
        os._exit(code)


# --- the check ---


def audit_books(home: Home, state: dict[str, Any], updates: list[dict[str, Any]]) -> tuple[list[str], Counter[str]]:
    """What Telegram holds against what the books say, after all is settled."""
    problems: list[str] = list(state["violations"])
    outcomes: Counter[str] = Counter()
    cipher = Cipher.open(home.key_file, create=False)
    connection = sqlite3.connect(home.database, isolation_level=None)
    tx = Tx(sqlite_utils.Database(connection, execute_plugins=False), cipher, now_ms())
    held = {(one["chat"], one["id"]): one for one in state["held"]}
    rows = {int(row["update_key"]): row for row in tx.all("SELECT * FROM inbox")}
    if set(rows) != {update["update_id"] for update in updates}:
        problems.append(f"{len(updates) - len(rows)} updates are not in the inbox")
    booked: set[tuple[int, int]] = set()
    for number, row in sorted(rows.items()):
        outcomes[row["outcome"]] += 1
        parts = tx.all(
            "SELECT receipt FROM part JOIN delivery ON delivery.id = delivery_id WHERE inbox_id = ? ORDER BY number",
            [row["id"]],
        )
        places = [
            (at["chat"], at["message"]) for part in parts if part["receipt"] and (at := json.loads(part["receipt"]))
        ]
        if row["state"] not in ("done", "dead"):
            problems.append(f"update {number} is {row['state']}")
        if row["outcome"] in ("replied", "command") and (not places or len(places) != len(parts)):
            problems.append(f"update {number} is {row['outcome']} without its messages")
        if doubled := [place for place in places if place in booked]:
            problems.append(f"update {number} wrote into another's message {doubled}")
        booked.update(places)
        said = "\n".join(held[place]["text"] for place in places if place in held)
        asked = (updates[number - 1].get("message") or {}).get("text", "")
        found = re.search(r"question \d+", asked)
        complete = tx.value("SELECT finish FROM generation WHERE inbox_id = ?", [row["id"]]) == "end"
        if row["outcome"] == "replied" and found and complete:
            right = f"answer to {found[0]}: {LONG if asked.endswith('long') else 'done'}"
            if said.split() != right.split():
                problems.append(f"update {number} was answered {said[:80]!r}, {len(said)} characters")
            if places and not held[places[-1]]["labels"]:
                problems.append(f"update {number} has no buttons")
    texts: dict[str, int] = defaultdict(int)
    for place, one in held.items():
        if place not in booked:
            outcomes["orphans"] += 1
        if place not in booked and not one["text"].endswith("…") and not _refusal(tx, place):
            problems.append(f"{place} is final but in no book: {one['text'][:60]!r}")
        if one["labels"] and one["text"].endswith(": done"):
            texts[one["text"]] += 1
    problems += [f"{text!r} stands there {count} times" for text, count in texts.items() if count > 1]
    replied = sum(row["outcome"] == "replied" for row in rows.values())
    charged = tx.value("SELECT count(*) FROM ledger")
    if charged != replied:
        problems.append(f"{charged} charges for {replied} replies")
    outcomes["charged"] = charged
    connection.close()
    return problems, outcomes


def _refusal(tx: Tx, place: tuple[int, int]) -> bool:
    """Whether a refusal was written there: it has a handle, and no receipt."""
    return bool(
        tx.value(
            "SELECT 1 FROM part JOIN delivery ON delivery.id = delivery_id WHERE delivery.state = 'failed'"
            " AND json_extract(handle, '$.chat') = ? AND json_extract(handle, '$.message') = ?",
            [*place],
        )
    )


def drill(count: int, kills: int, seed: int, folder: Path) -> dict[str, Any]:
    draw, home, port = random.Random(seed), Home(folder / "home"), folder / "port"
    home.create()
    prepare(home)
    cipher = Cipher.open(home.key_file, create=False)
    updates = plan(seed, count)
    platform = fork(lambda: stand(updates, seed, port))
    began = time.monotonic()
    problems: list[str] = []
    try:
        while not port.exists():
            time.sleep(0.05)
        url, desk = port.read_text().split()
        died = 0
        for number in range(kills):
            get(f"{desk}/more/{(number + 1) * count // kills}")
            transport = draw.choice(("draft", "draft", "edit"))
            pid = fork(lambda transport=transport: live(home, url, transport, to_the_end=False))  # type: ignore[misc]
            time.sleep(0.1 + draw.random() * 0.9)
            os.kill(pid, signal.SIGKILL)
            _, status = os.waitpid(pid, 0)
            died += os.WIFSIGNALED(status)
            problems += [f"after kill {died}: {one}" for one in violations(copy_of(home, folder), cipher)]
        pid = fork(lambda: live(home, url, "draft", to_the_end=True))
        _, status = os.waitpid(pid, 0)
        problems += [f"the last life ended with {status}"] if status else []
        state = json.loads(get(f"{desk}/state"))
        problems += [f"{state['pending']} updates were never confirmed"] if state["pending"] else []
        books, outcomes = audit_books(home, state, updates)
    finally:
        os.kill(platform, signal.SIGKILL)
        os.waitpid(platform, 0)
    return {
        "updates": count,
        "kills": died,
        "outcomes": dict(outcomes),
        "drafts": state["drafts"],
        "requests": state["calls"],
        "violations": problems + violations(home.database, cipher) + books,
        "seconds": round(time.monotonic() - began, 1),
        "seed": seed,
    }


def get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=30) as answered:
        return str(answered.read().decode())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=1000)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--live", nargs=2, metavar=("HOME", "URL"), help="be the program, until SIGTERM")
    parser.add_argument("--to-the-end", action="store_true", help="... or until nothing is left to do")
    given = parser.parse_args()
    logs.install("warning")
    if given.live:
        asyncio.run(live(Home(Path(given.live[0])), given.live[1], "draft", to_the_end=given.to_the_end))
        return
    with tempfile.TemporaryDirectory() as folder:
        result = drill(given.updates, given.kills, given.seed, Path(folder))
    report = json.dumps(result, indent=2)
    if given.json:
        given.json.write_text(report)
    sys.stdout.write(report + "\n")
    sys.exit(bool(result["violations"]))


if __name__ == "__main__":
    main()
