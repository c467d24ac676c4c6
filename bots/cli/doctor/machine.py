"""Checks of the machine: Python, torch, the compiled operators, SQLite, the clock."""

import os
import platform
import sqlite3
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from importlib.util import find_spec

import sqlite_utils

from bots import control
from bots.cli.doctor.findings import Finding, Level, Setup
from core.storage.cipher import Cipher
from core.storage.clock import IS_RIGHT, MOST_AHEAD_MS, last_used_ms
from core.storage.database import Tx, open_read_only

_YEARS = range(2026, 2100)
_OFF_S = 300.0  # between the system's time and that of a running program


def python(setup: Setup) -> Iterator[Finding]:
    good = sys.version_info >= (3, 11)
    level, key = (Level.GOOD, "version") if good else (Level.BAD, "python_old")
    yield setup.finding(level, "python", key, version=platform.python_version())


def torch(setup: Setup) -> Iterator[Finding]:
    """torch and the device that the model will run on."""
    if setup.config and setup.config.engine.kind == "scripted":
        return
    if find_spec("torch") is None:
        yield setup.finding(Level.BAD, "torch", "torch_missing")
        return
    import torch

    wanted = setup.config.model.device if setup.config else "auto"
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    index = int(wanted.partition(":")[2] or 0)  # of cuda:N
    device = torch.cuda.get_device_name(index) if index < gpus else f"CPU, {os.cpu_count()} cores"
    if wanted.startswith("cuda") and gpus and index >= gpus:
        there = ", ".join(f"cuda:{number}" for number in range(gpus))
        yield setup.finding(Level.BAD, "torch", "no_such_gpu", device=wanted, there=there)
    elif wanted.startswith("cuda") and not gpus:
        yield setup.finding(Level.BAD, "torch", "no_gpu", device=wanted)
    else:
        yield setup.finding(Level.GOOD, "torch", "torch_device", version=torch.__version__, device=device)
        if index >= gpus or wanted == "cpu":
            yield _operators(setup)


def _operators(setup: Setup) -> Finding:
    from core.engine.cpu.compiled import unavailable_reason

    reason = unavailable_reason()
    if reason:
        return setup.finding(Level.WARNING, "operators", "not_compiled", reason=reason.splitlines()[0])
    return setup.finding(Level.GOOD, "operators", "compiled")


def sqlite(setup: Setup) -> Iterator[Finding]:
    version = sqlite3.sqlite_version_info
    level, key = (Level.WARNING, "wal_reset") if has_wal_reset_bug(version) else (Level.GOOD, "version")
    yield setup.finding(level, "sqlite", key, version=".".join(map(str, version)))


def has_wal_reset_bug(version: tuple[int, ...]) -> bool:
    """Source: https://sqlite.org/wal.html#walresetbug, fixed in 3.51.3, 3.50.7 and 3.44.6."""
    fixed = version >= (3, 51, 3) or (3, 50, 7) <= version < (3, 51) or (3, 44, 6) <= version < (3, 45)
    return version >= (3, 7, 0) and not fixed


def clock(setup: Setup) -> Iterator[Finding]:
    """The clock against the century and the database's last write."""
    now, database = time.time(), setup.home.database
    files = (database, database.with_name(f"{database.name}-wal"))
    newest = max((file.stat().st_mtime for file in files if file.exists()), default=0.0)
    used_s = _last_used_s(setup)
    if time.gmtime(now).tm_year not in _YEARS:
        yield setup.finding(Level.BAD, "clock", "clock_year", year=time.gmtime(now).tm_year)
    elif newest > now + 60:
        yield setup.finding(Level.BAD, "clock", "clock_back", minutes=round((newest - now) / 60))
    elif used_s and abs(now - used_s) > _OFF_S and control.ask(setup.home, {"probe": True}) is not None:
        yield setup.finding(Level.BAD, "clock", "clock_jumped", minutes=round((now - used_s) / 60))
    elif used_s and (now - used_s) * 1000 > MOST_AHEAD_MS:
        days = round((now - used_s) / 86_400)
        yield setup.finding(Level.BAD, "clock", "clock_ahead", days=days, variable=f"{IS_RIGHT}=1")
    else:
        shown = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(now))
        yield setup.finding(Level.GOOD, "clock", "clock_good", time=shown)


def _last_used_s(setup: Setup) -> float:
    """The home's own time when it was last in use, each minute while a program serves; 0 where it cannot be read."""
    try:
        with closing(open_read_only(setup.home.database)) as connection:
            tx = Tx(sqlite_utils.Database(connection, execute_plugins=False), Cipher(b"no text is read"), 0)
            return last_used_ms(tx) / 1000
    except sqlite3.Error:
        return 0.0
