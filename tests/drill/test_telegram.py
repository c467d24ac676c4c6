"""The Telegram bot survives SIGKILL at any point, and SIGTERM under load ends cleanly: promise 1 of the design."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest

from core.storage.home import Home
from tests.drill.lives import run_drill, spawn
from tests.drill.telegram import PEOPLE, prepare
from tests.fakes.telegram import FakeTelegram

pytestmark = pytest.mark.slow


def test_20_kills_lose_nothing(tmp_path: Path) -> None:
    result = run_drill("telegram", tmp_path, updates=1_000, kills=20, seed=20261124)
    assert result["kills"] == 20
    assert result["outcomes"]["replied"] > 700
    assert result["outcomes"]["failed"] == 1  # the poison


@pytest.mark.drill
@pytest.mark.timeout(3600)
def test_200_kills_lose_nothing(tmp_path: Path) -> None:
    result = run_drill("telegram", tmp_path, updates=10_000, kills=200, seed=1)
    assert result["kills"] == 200
    assert result["outcomes"]["replied"] > 7_000
    assert result["outcomes"]["failed"] == 1


@pytest.mark.parametrize("rounds", [1, pytest.param(3, marks=pytest.mark.drill)])
async def test_sigterm_under_load_ends_cleanly_and_loses_nothing(tmp_path: Path, rounds: int) -> None:
    home = Home(tmp_path / "home")
    home.create()
    prepare(home)
    async with FakeTelegram().open() as there:
        for round_ in range(rounds):
            pid = spawn("telegram", home, there.url)
            for number in range(40):
                there.says(PEOPLE[number % 5], f"question {round_ * 100 + number} long")
            await there.until(lambda: there.drafted)
            os.kill(pid.pid, signal.SIGTERM)
            status = await asyncio.to_thread(pid.wait, 240)
            assert status == 0
            there.drafted.clear()
        last = spawn("telegram", home, there.url, "--to-the-end")
        assert await asyncio.to_thread(last.wait, 240) == 0
        answered = [one for person in PEOPLE for one in there.held(person.id) if one.labels]
        assert len(answered) == 40 * rounds
        assert not there.account.pending
