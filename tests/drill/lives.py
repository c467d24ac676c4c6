"""What the drills share: forked programs that are killed once they have made progress, and the audit of the books.

A program is forked from a process that has imported everything and started no thread. The moment of a kill depends on
what the program has written, never on the clock, so that a slow machine makes a drill longer and changes nothing else.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import sqlite_utils
from aiohttp import web

from core.chat.inbox import MAX_CRASHES, MAX_STRIKES
from core.chat.service import Service, ServiceSettings
from core.config.schema import Retention
from core.delivery.deliveries import Deliveries
from core.engine.protocol import Request
from core.engine.scripted import ScriptedEngine
from core.jobs.supervisor import JobSupervisor
from core.jobs.worker import TrainingSettings, WorkerContext
from core.observability import logs
from core.platform import Bot
from core.storage.cipher import Cipher
from core.storage.database import Database, Row, Tx, now_ms
from core.storage.home import Home, Lock
from core.usage import ledger
from tests.support.paths import ROOT

PROGRESS_S = 600.0  # a program that writes nothing for so long is a failure of the drill
LONG = "\n\n".join(f"Paragraph {n} of a long answer. " + f"{'word' * 12} " * 10 for n in range(25))

POISON, POISONED = "poison", 86  # a question that ends the program, and the exit status of that
delay_s = 0.0  # between two words of the next program's model

Place = tuple[Any, Any]
Report = dict[str, Any]


def answer(request: Request) -> str:
    """The scripted answer; of a question that ends in "long", one of several messages."""
    asked = request.messages[-1].text
    if asked == POISON:
        os._exit(POISONED)
    found = re.match(r"question \d+", asked)
    return expected(found[0] if found else asked, is_long=asked.endswith("long"))


def expected(question: str, *, is_long: bool) -> str:
    return f"answer to {question}: {LONG if is_long else 'done'}"


@asynccontextmanager
async def open_service(home: Home, answer: Callable[[Request], str], **engine: Any) -> AsyncIterator[Service]:
    """The service of a home over the scripted engine."""
    with Lock(home):
        async with (
            Database(home.database, Cipher.open(home.key_file, create=False)) as database,
            ScriptedEngine(answer, **engine) as scripted,
        ):
            deliveries = Deliveries(database)
            training = JobSupervisor(WorkerContext(database, home, deliveries, scripted.info, TrainingSettings()))
            yield Service(database, home, scripted, deliveries, training, ServiceSettings(Retention()))


async def run_bot(home: Home, bot: Bot, account: str, *, to_the_end: bool) -> None:
    """A program with one bot. Ends by SIGTERM, or (`to_the_end`) when nothing is left to do."""
    async with open_service(home, answer, delay_s=delay_s, max_rows=16, max_waiting=10_000) as service:
        stop = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
        async with asyncio.TaskGroup() as tasks:
            running = [tasks.create_task(service.run()), tasks.create_task(bot.run(service))]
            if to_the_end:
                tasks.create_task(_stop_when_settled(service, bot.platform, account, stop))
            await stop.wait()
            await service.drain(20)
            for task in running:
                task.cancel()


async def _stop_when_settled(service: Service, platform: str, account: str, stop: asyncio.Event) -> None:
    """Settled, and still so for three seconds: what was not acknowledged comes again."""
    quiet = 0
    while quiet < 15:
        await asyncio.sleep(0.2)
        try:
            async with asyncio.timeout(0.2):
                await service.settled(platform, account)
            quiet += 1
        except TimeoutError:
            quiet = 0
    stop.set()


# --- processes ---


def fork(work: Callable[[], Any]) -> int:
    """Run a coroutine in a forked process; its process id."""
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


@contextmanager
def forked_platform(work: Callable[[], Any], port: Path) -> Iterator[tuple[str, str]]:
    """A fake platform in a process of its own: its address, and that of its controls."""
    pid = fork(work)
    try:
        while not port.exists():
            time.sleep(0.05)
        address, controls = port.read_text().split()
        yield address, controls
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


async def serve_controls(address: str, handlers: dict[str, Any], port: Path) -> None:
    """Serve a platform's controls until killed; `port` gets both addresses once they answer."""
    app = web.Application()
    for path, handler in handlers.items():
        app.router.add_get(path, handler)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    aside = port.with_suffix(".new")
    aside.write_text(f"{address} http://127.0.0.1:{runner.addresses[0][1]}")
    aside.rename(port)
    await asyncio.Event().wait()


def get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=PROGRESS_S) as answered:
        return str(answered.read().decode())


def progress(home: Home, sql: str) -> int:
    """A count of what a program has committed, read beside it."""
    connection = sqlite3.connect(f"file:{home.database}?mode=ro", uri=True, timeout=60)
    try:
        return int(connection.execute(sql).fetchone()[0])
    finally:
        connection.close()


def kill_at(
    home: Home, pid: int, sql: str, target: int, draw: random.Random, number: signal.Signals = signal.SIGKILL
) -> int:
    """Signal the process once the count of `sql` has come to `target`, or it has ended; its wait status."""
    deadline = time.monotonic() + PROGRESS_S
    while progress(home, sql) < target:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return status
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise AssertionError(f"no progress to {target} within {PROGRESS_S:.0f} s")
        time.sleep(0.002)
    time.sleep(draw.random() * 0.02)  # somewhere between two of its writes
    os.kill(pid, number)
    return os.waitpid(pid, 0)[1]


# --- the books ---


def violations(database: Path, cipher: Cipher) -> list[str]:
    with opened(database, cipher) as tx:
        return ledger.check(tx)


@contextmanager
def opened(database: Path, cipher: Cipher) -> Iterator[Tx]:
    connection = sqlite3.connect(database, isolation_level=None)
    try:
        yield Tx(sqlite_utils.Database(connection, execute_plugins=False), cipher, now_ms())
    finally:
        connection.close()


def copy_of(home: Home, into: Path) -> Path:
    """The database as the kill left it; a check opens a copy, and so never repairs the original."""
    target = into / "copy.db"
    for suffix in ("", "-wal", "-shm"):
        Path(f"{target}{suffix}").unlink(missing_ok=True)
        source = Path(f"{home.database}{suffix}")
        if source.exists() and suffix != "-shm":
            shutil.copyfile(source, f"{target}{suffix}")
    return target


def audit_books(
    tx: Tx, held: dict[Place, Report], text_of: Callable[[Row], str], place_of: Callable[[Report], Place]
) -> tuple[list[str], Counter[str], set[Place]]:
    """Compare a platform's messages with the books, after all is settled.

    `held` has text, labels (its buttons) and final (no more is to come) of each message. Returns problems, outcomes
    and the places of all messages that the books know.
    """
    problems: list[str] = []
    outcomes: Counter[str] = Counter()
    booked: set[Place] = set()
    for row in tx.all("SELECT * FROM inbox ORDER BY id"):
        key = row["update_key"]
        outcomes[row["outcome"]] += 1
        parts = tx.all(
            "SELECT receipt, handle FROM part JOIN delivery ON delivery.id = delivery_id"
            " WHERE inbox_id = ? ORDER BY number",
            [row["id"]],
        )
        places = [place_of(json.loads(part["receipt"])) for part in parts if part["receipt"]]
        if row["state"] not in ("done", "dead"):
            problems.append(f"{key} is {row['state']}")
        if row["outcome"] in ("replied", "command") and (not places or len(places) != len(parts)):
            problems.append(f"{key} is {row['outcome']} without its messages")
        if row["outcome"] in ("failed", "unconfirmed", "unreadable") and text_of(row) != POISON:
            problems.append(f"{key} ended {row['outcome']}")
        if text_of(row) == POISON and row["state"] != "dead":
            problems.append(f"{key}, which kills the program, ended {row['outcome']}")
        if doubled := [place for place in places if place in booked]:
            problems.append(f"{key} wrote into another's message {doubled}")
        booked.update(places)
        text = text_of(row)
        found = re.search(r"question \d+", text)
        complete = tx.value("SELECT finish FROM generation WHERE inbox_id = ?", [row["id"]]) == "end"
        if row["outcome"] == "replied" and found and complete:
            shown = "\n".join(held[place]["text"] for place in places if place in held)
            if shown.split() != expected(found[0], is_long=text.endswith("long")).split():
                problems.append(f"{key} was answered {shown[:80]!r}, {len(shown)} characters")
            if places and not held[places[-1]]["labels"]:
                problems.append(f"{key} has no buttons")
    finals = Counter(one["text"] for one in held.values() if one["labels"] and one["text"].endswith(": done"))
    problems += [f"{text!r} stands there {count} times" for text, count in finals.items() if count > 1]
    outcomes["orphans"] = sum(place not in booked for place in held)
    charged = tx.value("SELECT count(*) FROM ledger")
    if charged != outcomes["replied"]:
        problems.append(f"{charged} charges for {outcomes['replied']} replies")
    return problems, outcomes, booked


# --- the drill of a bot ---


def drill_bot(
    home: Home,
    seed: int,
    count: int,
    kills: int,
    controls: str,
    start: Callable[[random.Random, bool], int],
    folder: Path,
) -> tuple[list[str], int]:
    """Kill the program `kills` times while a platform gives it `count` updates; then let it finish.

    Each life ends at a random point of its share of the updates; one in ten is stopped cleanly first, one in five has a
    slow model. Of the poison the program dies by itself. Returns problems, and how many lives were killed.
    """
    global delay_s
    draw, cipher = random.Random(seed), Cipher.open(home.key_file, create=False)
    closed = "SELECT count(*) FROM inbox WHERE state IN ('done', 'dead')"
    problems: list[str] = []
    died = 0
    poisoned = 0

    def live_until(target: int, how: signal.Signals) -> int:
        nonlocal poisoned
        while True:
            status = kill_at(home, start(draw, False), closed, target, draw, how)
            if not os.WIFEXITED(status) or os.WEXITSTATUS(status) != POISONED:
                return status
            poisoned += 1

    for number in range(kills):
        get(f"{controls}/more/{(number + 1) * count // kills}")
        delay_s = 0.002 if number % 5 == 4 else 0.0
        target = number * count // kills + draw.randrange(1, max(2, count // kills))
        if number % 10 == 9 and (status := live_until(number * count // kills + 1, signal.SIGTERM)):
            problems.append(f"a clean stop before kill {died + 1} ended with {status}")
        died += os.WIFSIGNALED(live_until(target, signal.SIGKILL))
        problems += [f"after kill {died}: {one}" for one in violations(copy_of(home, folder), cipher)]
    delay_s = 0.0
    while (
        (status := os.waitpid(start(draw, True), 0)[1]) and os.WIFEXITED(status) and os.WEXITSTATUS(status) == POISONED
    ):
        poisoned += 1
    problems += [f"the last life ended with {status}"] if status else []
    if poisoned > MAX_CRASHES + MAX_STRIKES:
        problems.append(f"one question ended the program {poisoned} times")
    return problems + violations(home.database, cipher), died


def main(what: str, drill: Callable[[int, int, int, Path], Report], live: Callable[..., Any], doc: str | None) -> None:
    """The command line of a bot's drill."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(f"--{what}", dest="count", type=int, default=1000)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--live", nargs=2, metavar=("HOME", "URL"), help="be the program, until SIGTERM")
    parser.add_argument("--to-the-end", action="store_true", help="... or until nothing is left to do")
    given = parser.parse_args()
    logs.install("warning")
    if given.live:
        asyncio.run(live(Home(Path(given.live[0])), given.live[1], to_the_end=given.to_the_end))
        return
    with tempfile.TemporaryDirectory() as folder:
        print_report(drill(given.count, given.kills, given.seed, Path(folder)), given.json)


def print_report(result: Report, file: Path | None) -> None:
    """Print the report as JSON; exit status 1 where a promise was broken."""
    report = json.dumps(result, indent=2)
    if file:
        file.write_text(report)
    sys.stdout.write(report + "\n")
    sys.exit(bool(result["violations"]))


# --- for the tests ---


def run_drill(name: str, folder: Path, **options: int) -> Report:
    """The report of `python -m tests.drill.<name>`, which found no broken promise."""
    report = folder / "report.json"
    given = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    command = [sys.executable, "-m", f"tests.drill.{name}", "--json", str(report), *given]
    ran = subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT)
    assert report.exists(), ran.stderr[-3000:]
    result: Report = json.loads(report.read_text())
    assert result["violations"] == [], ran.stderr[-3000:]
    return result


def spawn(name: str, home: Home, url: str, *more: str) -> subprocess.Popen[bytes]:
    """The program of a bot's drill in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", f"tests.drill.{name}", "--live", str(home.path), url, *more], cwd=ROOT
    )
