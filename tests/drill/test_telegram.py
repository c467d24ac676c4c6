"""The Telegram bot survives SIGKILL at any point, and SIGTERM under load ends in time: promise 1 of the design."""

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
from tests.drill.telegram import PEOPLE, prepare
from tests.fakes.telegram import FakeTelegram
from tests.support.paths import ROOT


def _drill(tmp_path: Path, *, updates: int, kills: int, seed: int) -> dict[str, object]:
    report = tmp_path / "report.json"
    command = [sys.executable, "-m", "tests.drill.telegram", "--json", str(report), "--updates", str(updates)]
    ran = subprocess.run(
        [*command, "--kills", str(kills), "--seed", str(seed)], check=False, capture_output=True, text=True, cwd=ROOT
    )
    assert report.exists(), ran.stderr[-3000:]
    result = json.loads(report.read_text())
    assert result["violations"] == [], ran.stderr[-3000:]
    assert result["updates"] == updates
    return dict(result)


def test_telegram_survives_20_kills(tmp_path: Path) -> None:
    result = _drill(tmp_path, updates=1_000, kills=20, seed=20261124)
    assert result["kills"] == 20
    assert result["outcomes"]["replied"] > 700  # type: ignore[index]


@pytest.mark.drill
@pytest.mark.timeout(3600)
def test_telegram_survives_200_kills(tmp_path: Path) -> None:
    result = _drill(tmp_path, updates=10_000, kills=200, seed=1)
    assert result["kills"] == 200
    assert result["outcomes"]["replied"] > 7_000  # type: ignore[index]


@pytest.mark.parametrize("rounds", [1, pytest.param(3, marks=pytest.mark.drill)])
async def test_sigterm_under_load_ends_in_time_and_loses_nothing(tmp_path: Path, rounds: int) -> None:
    home = Home(tmp_path / "home")
    home.create()
    prepare(home)
    async with FakeTelegram().open() as there:
        for round_ in range(rounds):
            pid = _spawn(home, there.url)
            for number in range(40):
                there.says(PEOPLE[number % 5], f"question {round_ * 100 + number} long")
            await there.until(lambda: there.drafted)
            began = time.monotonic()
            os.kill(pid.pid, signal.SIGTERM)
            status = await asyncio.to_thread(pid.wait, 25)
            assert status == 0
            assert time.monotonic() - began < 25
            there.drafted.clear()
        last = _spawn(home, there.url, "--to-the-end")
        assert await asyncio.to_thread(last.wait, 60) == 0
        answered = [one for person in PEOPLE for one in there.held(person.id) if one.labels]
        assert len(answered) == 40 * rounds
        assert not there.account.pending


def _spawn(home: Home, url: str, *more: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.drill.telegram", "--live", str(home.path), url, *more], cwd=ROOT
    )
