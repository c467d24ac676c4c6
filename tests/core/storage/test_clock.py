"""The clock of a home never goes back, and jumps of the system's time do not move it."""

from __future__ import annotations

from pathlib import Path

import pytest

from bots.app import open_store
from core.config.loader import read_config
from core.errors import StorageError
from core.storage import clock as module
from core.storage.clock import IS_RIGHT, Clock, keep_time, last_used_ms
from core.storage.home import Home

DAY_NS = 86_400 * 10**9
CONFIG = read_config({}, {})


class Times:
    def __init__(self) -> None:
        self.wall, self.passed = 1_700_000_000 * 10**9, 5 * 10**9

    def clock(self) -> Clock:
        return Clock(lambda: self.wall, lambda: self.passed)


def test_a_change_of_the_systems_time_does_not_move_it() -> None:
    times = Times()
    clock = times.clock()
    began = clock()
    times.passed += 2 * 10**9
    for wall in (times.wall - DAY_NS, times.wall + 400 * DAY_NS):
        times.wall = wall
        assert clock() == began + 2000
    assert clock.off_ms == 400 * 86_400_000 - 2000


@pytest.fixture
def times(monkeypatch: pytest.MonkeyPatch) -> Times:
    """What the clock of each start of a home reads."""
    made = Times()
    monkeypatch.setattr("bots.app.Clock", made.clock)
    return made


async def test_a_start_goes_on_from_the_last_use_and_never_before_it(tmp_path: Path, times: Times) -> None:
    home = Home(tmp_path)
    async with open_store(CONFIG, home) as database:
        times.passed += 3600 * 10**9
        await database.write(keep_time)
        last = await database.read(last_used_ms)
    times.wall -= 3600 * 10**9  # an hour back
    async with open_store(CONFIG, home) as database:
        assert database.now_ms >= last


async def test_a_clock_far_ahead_is_refused_unless_it_is_said_to_be_right(
    tmp_path: Path, times: Times, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = Home(tmp_path)
    async with open_store(CONFIG, home):
        pass
    times.wall += 90 * DAY_NS
    async with open_store(CONFIG, home):  # a holiday
        pass
    times.wall += 400 * DAY_NS
    with pytest.raises(StorageError) as raised:
        async with open_store(CONFIG, home):
            pass
    assert (raised.value.key, raised.value.fields["days"]) == ("error.clock_ahead", 400)
    monkeypatch.setenv(IS_RIGHT, "1")
    async with open_store(CONFIG, home) as database:
        assert database.now_ms == times.wall // 10**6


async def test_a_jump_is_reported_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    times, waits = Times(), 0
    clock = times.clock()

    async def sleep(_: float) -> None:
        nonlocal waits
        waits += 1
        if waits == 2:
            times.wall -= 3600 * 10**9
        if waits == 4:
            raise KeyError("enough")

    monkeypatch.setattr(module.asyncio, "sleep", sleep)
    with pytest.raises(KeyError):
        await clock.watch()
    assert [(one.msg, one.seconds) for one in caplog.records] == [("clock.jumped", -3600)]  # type: ignore[attr-defined]
