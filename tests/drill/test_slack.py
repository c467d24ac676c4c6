"""The Slack bot survives SIGKILL at any point, and SIGTERM under load ends in time: promise 1 of the design."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from core.storage.home import Home
from tests.drill.slack import USERS, prepare
from tests.fakes.slack import FakeSlack
from tests.support.paths import ROOT


def _drill(tmp_path: Path, *, events: int, kills: int, seed: int) -> dict[str, object]:
    report = tmp_path / "report.json"
    command = [sys.executable, "-m", "tests.drill.slack", "--json", str(report), "--events", str(events)]
    ran = subprocess.run(
        [*command, "--kills", str(kills), "--seed", str(seed)], check=False, capture_output=True, text=True, cwd=ROOT
    )
    assert report.exists(), ran.stderr[-3000:]
    result = json.loads(report.read_text())
    assert result["violations"] == [], ran.stderr[-3000:]
    assert result["kills"] == kills
    return dict(result)


def test_slack_survives_20_kills(tmp_path: Path) -> None:
    result = _drill(tmp_path, events=1_000, kills=20, seed=20261124)
    assert result["outcomes"]["replied"] > 700  # type: ignore[index]
    assert result["streams"] > 100  # type: ignore[operator]


@pytest.mark.drill
@pytest.mark.timeout(3600)
def test_slack_survives_200_kills(tmp_path: Path) -> None:
    result = _drill(tmp_path, events=10_000, kills=200, seed=1)
    assert result["outcomes"]["replied"] > 7_000  # type: ignore[index]


@pytest.mark.parametrize("rounds", [1, pytest.param(3, marks=pytest.mark.drill)])
async def test_sigterm_under_load_ends_in_time_and_loses_nothing(tmp_path: Path, rounds: int) -> None:
    home = Home(tmp_path / "home")
    home.create()
    prepare(home)
    async with FakeSlack().open() as there:
        there.workspace("T1")
        for round_ in range(rounds):
            program = _spawn(home, there.url)
            sockets = len(there.sockets)
            await there.until(lambda sockets=sockets: len(there.sockets) > sockets, 60)  # type: ignore[misc]
            started = len(there.called("chat.startStream"))
            async with asyncio.TaskGroup() as tasks:
                for number in range(40):
                    message = there.message(USERS[number % 5], f"question {round_ * 100 + number} long")
                    tasks.create_task(there.deliver(message))
            await there.until(lambda started=started: len(there.called("chat.startStream")) > started)  # type: ignore[misc]
            began = time.monotonic()
            os.kill(program.pid, signal.SIGTERM)
            assert await asyncio.to_thread(program.wait, 25) == 0
            assert time.monotonic() - began < 25
        last = _spawn(home, there.url, "--to-the-end")
        assert await asyncio.to_thread(last.wait, 90) == 0
        assert sum(bool(one.labels) for one in there.messages.values()) == 40 * rounds
        assert not any(one.streaming for one in there.messages.values())


def _spawn(home: Home, url: str, *more: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-m", "tests.drill.slack", "--live", str(home.path), url, *more], cwd=ROOT)
