"""How soon Slack's events are acknowledged while the real model is busy, and what the event loop feels of it.

    python -m tests.bench.slack --seconds 20 --json FILE

The fake Slack and its crowd are a process of their own: 50 signed events a second over HTTP, from 200 people. An
acknowledgement comes after the commit. The model is the demo model, and never idle.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bots.app import open_parts
from bots.slack.bot import SlackBot
from bots.slack.web import EVENTS
from core.channels import bindings, directory
from core.config.loader import load_config
from core.storage.database import Tx
from core.storage.home import Home
from tests.bench.telegram import CROWD, PER_S, QUANTILES, lag, quantile
from tests.fakes.slack import FakeSlack
from tests.fakes.slack.held import SIGNING
from tests.fakes.slack.server import signed


async def crowd(seconds: float, listen: str, port: Path, result: Path) -> None:
    there = FakeSlack()
    there.workspace("T1")
    took: list[float] = []
    refused: list[int] = []
    async with there.open(), asyncio.TaskGroup() as tasks:
        there.events_url = f"http://{listen}{EVENTS}"
        port.write_text(there.url)

        async def send(number: int) -> None:
            there.now = time.time()
            body, headers = signed(there.message(f"U{number % CROWD}", f"What is {number} plus one?"), 0)
            began = time.monotonic()
            status, _ = await there.post(body, headers)
            took.append(time.monotonic() - began)
            refused.extend([status] if status != 200 else [])

        while (await there.post(b"", {}))[0] != 401:
            await asyncio.sleep(0.1)
        begun = time.monotonic()
        sent = []
        for number in range(int(seconds * PER_S)):
            await asyncio.sleep(max(0.0, begun + number / PER_S - time.monotonic()))
            sent.append(tasks.create_task(send(number)))
        await asyncio.wait(sent)
        result.write_text(json.dumps([took, refused]))
        await asyncio.Event().wait()


def bind(tx: Tx) -> None:
    channel = directory.create_channel(tx, "bench", title="Bench")
    bindings.bind(tx, "slack", "T1", "", channel.id)
    tx.run("UPDATE channel SET per_minute = 0, per_hour = 0, tokens_out = 64")


async def serve(home: Path, listen: str, port: Path, result: Path) -> dict[str, Any]:
    samples: list[float] = []
    async with open_parts(load_config(None, {}), Home(home)) as parts:
        await parts.database.write(bind)
        settings = {"token": "xoxb-T1-secret", "signing_secret": SIGNING, "listen": listen}
        bot = SlackBot.configure(settings | {"api": f"{port.read_text()}/api/"})
        async with asyncio.TaskGroup() as tasks:
            running = [tasks.create_task(parts.service.run()), tasks.create_task(bot.run(parts.service))]
            await asyncio.sleep(1)
            running.append(tasks.create_task(lag(samples)))
            while not result.exists():
                await asyncio.sleep(0.1)
            busy = parts.engine.stats()
            for task in running:
                task.cancel()
    took, refused = json.loads(result.read_text())
    return {
        "events": len(took),
        "events_per_s": PER_S,
        "not_200": len(refused),
        "acknowledged_ms": {name: round(1000 * quantile(took, at), 1) for name, at in QUANTILES.items()},
        "loop_lag_ms": {name: round(1000 * quantile(samples, at), 1) for name, at in QUANTILES.items()},
        "rows_at_the_end": busy.running,
        "generated_tokens": busy.generated_tokens,
        "bars": {"acknowledged_p99_ms": 500},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        listen = f"127.0.0.1:{one.getsockname()[1]}"
    with tempfile.TemporaryDirectory() as folder:
        port, result = Path(folder) / "port", Path(folder) / "result"
        pid = os.fork()
        if not pid:
            asyncio.run(crowd(given.seconds, listen, port, result))
            os._exit(0)
        try:
            while not port.exists() or not port.read_text():
                time.sleep(0.05)
            measured = asyncio.run(serve(Path(folder) / "home", listen, port, result))
        finally:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    report = json.dumps(measured, indent=2)
    if given.json:
        given.json.write_text(report)
    sys.stdout.write(report + "\n")


if __name__ == "__main__":
    main()
