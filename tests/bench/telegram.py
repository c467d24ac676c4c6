"""Whether Telegram is served well while the real model is busy: event-loop lag, and how soon an update is accepted.

    python -m tests.bench.telegram --seconds 20 --json FILE

The fake Telegram and its crowd are a process of their own: 50 updates a second from 200 people. Accepted means
committed to the inbox and confirmed to Telegram by the next offset. The model is the demo model, and never idle.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bots.app import open_parts
from bots.telegram.bot import TelegramBot
from core.channels import bindings, directory
from core.config.loader import load_config
from core.storage.database import Tx
from core.storage.home import Home
from tests.fakes.telegram import FakeTelegram, Person
from tests.fakes.telegram.server import TOKEN, Account

PER_S, CROWD = 50, 200


class Watched(FakeTelegram):
    """Knows when each update came, and when it was confirmed."""

    def __init__(self) -> None:
        super().__init__()
        self.came: dict[int, float] = {}
        self.took: list[float] = []

    async def _getUpdates(self, account: Account, method: Any, files: dict[str, bytes]) -> Any:
        before = len(account.confirmed)
        now = time.monotonic()
        if method.offset is not None:
            self.took += [
                now - self.came[one["update_id"]] for one in account.pending if one["update_id"] < method.offset
            ]
        assert before <= len(account.confirmed)
        return await super()._getUpdates(account, method, files)


async def crowd(seconds: float, port: Path, result: Path) -> None:
    there = Watched()
    people = [Person(1000 + n, f"P{n}") for n in range(CROWD)]
    async with there.open():
        port.write_text(there.url)
        await there.until(lambda: there.account.polling, 300)
        begun = time.monotonic()
        for number in range(int(seconds * PER_S)):
            await asyncio.sleep(max(0.0, begun + number / PER_S - time.monotonic()))
            there.came[there.account.next_update] = time.monotonic()
            there.says(people[number % CROWD], f"What is {number} plus one?")
        await there.until(lambda: not there.account.pending, 60)
        result.write_text(json.dumps(there.took))
        await asyncio.Event().wait()


async def lag(samples: list[float]) -> None:
    while True:
        before = time.monotonic()
        await asyncio.sleep(0.005)
        samples.append(time.monotonic() - before - 0.005)


def bind(tx: Tx) -> None:
    channel = directory.create_channel(tx, "bench", title="Bench")
    bindings.bind(tx, "telegram", "acme_bot", "", channel.id)
    tx.run("UPDATE channel SET per_minute = 0, per_hour = 0, tokens_out = 64")


async def serve(home: Path, port: Path, result: Path) -> dict[str, Any]:
    samples: list[float] = []
    async with open_parts(load_config(None, {}), Home(home)) as parts:
        await parts.database.write(bind)
        bot = TelegramBot.configure({"token": TOKEN, "api": port.read_text()})
        async with asyncio.TaskGroup() as tasks:
            running = [tasks.create_task(parts.service.run()), tasks.create_task(bot.run(parts.service))]
            await asyncio.sleep(1)
            running.append(tasks.create_task(lag(samples)))
            while not result.exists():
                await asyncio.sleep(0.1)
            busy = parts.engine.stats()
            for task in running:
                task.cancel()
    took = json.loads(result.read_text())
    return {
        "updates": len(took),
        "updates_per_s": PER_S,
        "accepted_ms": {name: round(1000 * quantile(took, at), 1) for name, at in QUANTILES.items()},
        "loop_lag_ms": {name: round(1000 * quantile(samples, at), 1) for name, at in QUANTILES.items()},
        "rows_at_the_end": busy.running,
        "generated_tokens": busy.generated_tokens,
        "bars": {"accepted_p99_ms": 500, "loop_lag_p99_ms": 50},
    }


QUANTILES = {"p50": 0.5, "p95": 0.95, "p99": 0.99, "worst": 1.0}


def quantile(values: list[float], at: float) -> float:
    return sorted(values)[min(len(values) - 1, int(at * len(values)))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        port, result = Path(folder) / "port", Path(folder) / "result"
        pid = os.fork()
        if not pid:
            asyncio.run(crowd(given.seconds, port, result))
            os._exit(0)
        try:
            while not port.exists() or not port.read_text():
                time.sleep(0.05)
            measured = asyncio.run(serve(Path(folder) / "home", port, result))
        finally:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    report = json.dumps(measured, indent=2)
    if given.json:
        given.json.write_text(report)
    sys.stdout.write(report + "\n")


if __name__ == "__main__":
    main()
