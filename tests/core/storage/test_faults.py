"""Every call of the store that reaches the system fails, once and for ever: no hang, no false success, a sound file."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import random
import sqlite3
import stat
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from bots.app import open_store
from core.config.loader import read_config
from core.errors import StorageError
from core.storage import database as module
from core.storage import state
from core.storage.cipher import Cipher
from core.storage.database import Database
from core.storage.home import Home, Lock
from tests.support.waiting import DEADLINE_S

ERRORS = (
    sqlite3.OperationalError("disk I/O error"),
    sqlite3.OperationalError("database or disk is full"),
    sqlite3.OperationalError("attempt to write a readonly database"),
    OSError(errno.ESTALE, os.strerror(errno.ESTALE)),
    OSError(errno.EIO, os.strerror(errno.EIO)),
    RuntimeError("a fault of our own"),
)


class Faults:
    """Counts the calls, and lets the one with the number `at`, or all from there on, fail."""

    def __init__(self) -> None:
        self.calls, self.at, self.for_ever = 0, -1, False
        self.error: BaseException = ERRORS[0]

    def arm(self, at: int, error: BaseException, *, for_ever: bool) -> None:
        self.calls, self.at, self.error, self.for_ever = 0, at, error, for_ever

    def call(self) -> None:
        self.calls += 1
        if self.at >= 0 and (self.calls - 1 == self.at or (self.for_ever and self.calls > self.at)):
            raise self.error


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> Iterator[Faults]:
    made = Faults()

    class Faulty(sqlite3.Connection):
        def execute(self, *args: Any) -> sqlite3.Cursor:
            if in_writer():
                made.call()
            return super().execute(*args)

    connect, status = sqlite3.connect, Path.stat

    def faulty_stat(self: Path, **options: Any) -> os.stat_result:
        if in_writer():
            made.call()
        return status(self, **options)

    def faulty_connect(*args: Any, **options: Any) -> sqlite3.Connection:
        if in_writer():
            made.call()
        return connect(*args, **options, factory=Faulty)

    monkeypatch.setattr(module.sqlite3, "connect", faulty_connect)
    monkeypatch.setattr(Path, "stat", faulty_stat)
    yield made
    made.at = -1


def in_writer() -> bool:
    return threading.current_thread().name == "sqlite-writer"


async def write_some(database: Database, names: list[str]) -> tuple[set[str], int]:
    """The names whose write was confirmed, and how many writes failed."""
    confirmed, failed = set(), 0
    for name in names:
        try:
            async with asyncio.timeout(DEADLINE_S):
                await database.write(lambda tx, name=name: state.put(tx, name, "x"))  # type: ignore[misc]
                confirmed.add(name)
                await database.checkpoint()
        except (StorageError, RuntimeError, OSError):  # what a write raises itself comes through unchanged
            failed += 1
    return confirmed, failed


async def test_a_fault_at_any_call_fails_its_writes_and_the_writer_goes_on(tmp_path: Path, faults: Faults) -> None:
    names = [f"n{number}" for number in range(4)]
    with Database(tmp_path / "count.db", Cipher(b"k" * 32)) as database:
        faults.calls = 0
        await write_some(database, names)
        calls = faults.calls
    assert calls > 20
    draw, met = random.Random(20261201), 0
    for at in range(calls):
        for for_ever in (False, True):
            path = tmp_path / f"{at}-{for_ever}.db"
            with Database(path, Cipher(b"k" * 32)) as database:
                faults.arm(at, draw.choice(ERRORS), for_ever=for_ever)
                confirmed, failed = await write_some(database, names)
                met += bool(failed)
                faults.at = -1
                later, none = await write_some(database, ["later"])
                assert (later, none) == ({"later"}, 0), f"call {at}: the writer did not go on"
            with closing(sqlite3.connect(path)) as connection:
                found = {row[0] for row in connection.execute("SELECT key FROM setting")}
                assert found == confirmed | {"later"}, f"call {at}"
                assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    assert met > calls  # of two runs for each call: a log that cannot be truncated fails no write


def test_the_log_and_its_index_are_private_in_a_home_that_others_may_enter(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    before = os.umask(0o022)
    try:
        with Database(tmp_path / "a.db", Cipher(b"k" * 32)):
            modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.glob("a.db*")}
    finally:
        os.umask(before)
    assert modes == {"a.db": 0o600, "a.db-wal": 0o600, "a.db-shm": 0o600}


@pytest.mark.parametrize("left", ["nothing", "an empty file"])
async def test_a_key_whose_database_is_gone_is_refused_and_nothing_is_made(tmp_path: Path, left: str) -> None:
    home = Home(tmp_path)
    async with open_store(read_config({}, {}), home):
        pass
    home.database.unlink()
    if left != "nothing":
        home.database.touch()
    with pytest.raises(StorageError) as raised:
        async with open_store(read_config({}, {}), home):
            pass
    assert raised.value.key == "error.database_gone"
    assert not home.database.exists() or not home.database.stat().st_size


def test_a_file_system_without_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(StorageError) as raised, Lock(Home(tmp_path)):
        pass
    assert raised.value.key == "error.home_no_locks"
