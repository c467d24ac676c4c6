"""The Slack bot survives SIGKILL at any point, and SIGTERM under load ends cleanly: promise 1 of the design."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest

from core.storage.home import Home
from tests.drill.lives import run_drill, spawn
from tests.drill.slack import USERS, prepare
from tests.fakes.slack import FakeSlack

pytestmark = pytest.mark.slow


def test_20_kills_lose_nothing(tmp_path: Path) -> None:
    result = run_drill("slack", tmp_path, events=1_000, kills=20, seed=20261124)
    assert result["kills"] == 20
    assert result["outcomes"]["replied"] > 700
    assert result["outcomes"]["failed"] == 1  # the poison


@pytest.mark.drill
@pytest.mark.timeout(3600)
def test_200_kills_lose_nothing(tmp_path: Path) -> None:
    result = run_drill("slack", tmp_path, events=10_000, kills=200, seed=1)
    assert result["kills"] == 200
    assert result["outcomes"]["replied"] > 7_000
    assert result["outcomes"]["failed"] == 1


@pytest.mark.parametrize("rounds", [1, pytest.param(3, marks=pytest.mark.drill)])
async def test_sigterm_under_load_ends_cleanly_and_loses_nothing(tmp_path: Path, rounds: int) -> None:
    home = Home(tmp_path / "home")
    home.create()
    prepare(home)
    async with FakeSlack().open() as there:
        there.workspace("T1")
        for round_ in range(rounds):
            program = spawn("slack", home, there.url)
            sockets = len(there.sockets)
            await there.until(lambda sockets=sockets: len(there.sockets) > sockets, 60)  # type: ignore[misc]
            started = len(there.called("chat.startStream"))
            async with asyncio.TaskGroup() as tasks:
                for number in range(40):
                    message = there.message(USERS[number % 5], f"question {round_ * 100 + number} long")
                    tasks.create_task(there.deliver(message))
            await there.until(lambda started=started: len(there.called("chat.startStream")) > started)  # type: ignore[misc]
            os.kill(program.pid, signal.SIGTERM)
            assert await asyncio.to_thread(program.wait, 240) == 0
        last = spawn("slack", home, there.url, "--to-the-end")
        assert await asyncio.to_thread(last.wait, 240) == 0
        assert sum(bool(one.labels) for one in there.messages.values()) == 40 * rounds
        assert not any(one.streaming for one in there.messages.values())
