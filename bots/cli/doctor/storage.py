"""Checks of what is stored: the home, disk space, the key, the database and its ledger."""

import os
import shutil
import sqlite3
import stat
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import sqlite_utils

from bots import control
from bots.app import key_file
from bots.cli.doctor.findings import Finding, Level, Setup
from core.config.schema import Config
from core.errors import AppError
from core.storage.cipher import Cipher
from core.storage.database import Tx, now_ms, open_read_only
from core.usage import ledger

_GIB = 2**30
_LITTLE_DISK, _NO_DISK = 5 * _GIB, 1 * _GIB
_LARGE_WAL = 64 * 2**20


def home(setup: Setup) -> Iterator[Finding]:
    """The folder's rights."""
    path, there = setup.home.path, _existing(setup.home.path)
    if not os.access(there, os.W_OK | os.X_OK):
        yield setup.finding(Level.BAD, "home", "home_unwritable", path=str(there))
    elif path.exists() and stat.S_IMODE(path.stat().st_mode) & 0o077:
        yield setup.finding(Level.WARNING, "home", "home_open", path=str(path))
    else:
        yield setup.finding(Level.GOOD, "home", "home_good", path=str(path))


def disk(setup: Setup) -> Iterator[Finding]:
    """Free space where the home is, or will be."""
    there = _existing(setup.home.path)
    free = shutil.disk_usage(there).free
    level = Level.BAD if free < _NO_DISK else Level.WARNING if free < _LITTLE_DISK else Level.GOOD
    key = "disk_good" if level is Level.GOOD else "disk_low"
    yield setup.finding(level, "disk", key, gib=round(free / _GIB, 1), path=str(there))


def _existing(path: Path) -> Path:
    """The path, or its nearest parent that exists."""
    return next(folder for folder in (path, *path.parents) if folder.exists())


def key(setup: Setup) -> Iterator[Finding]:
    """The key file: there if a database is, and readable by its owner alone."""
    path = key_file(setup.config or Config(), setup.home)
    if not path.exists():
        if setup.home.database.exists():
            yield setup.finding(Level.BAD, "key", "key_missing", path=str(path))
        return
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        yield setup.finding(Level.BAD, "key", "key_open", path=str(path), mode=f"{mode:04o}")
    else:
        yield setup.finding(Level.GOOD, "key", "key_good", path=str(path))


def database(setup: Setup) -> Iterator[Finding]:
    """The database and the rules of its ledger. Needs the key: without one, `key` has said what is wrong."""
    path, secret = setup.home.database, key_file(setup.config or Config(), setup.home)
    if not path.exists() or not secret.exists():
        return
    log = path.with_name(f"{path.name}-wal")
    if log.exists() and log.stat().st_size > _LARGE_WAL:
        yield setup.finding(Level.WARNING, "database", "wal_large", mib=log.stat().st_size // 2**20)
    try:
        cipher = Cipher.open(secret, create=False)
    except AppError as error:
        yield setup.finding(Level.BAD, "key", "key_unreadable", path=str(secret), error=error.detail or str(error))
        return
    try:
        with closing(open_read_only(path)) as connection:
            connection.execute("BEGIN")
            broken = ledger.check(Tx(sqlite_utils.Database(connection, execute_plugins=False), cipher, now_ms()))
    except (sqlite3.Error, AppError) as error:
        yield setup.finding(Level.BAD, "database", "database_unreadable", error=str(error))
        return
    try:
        if (answered := control.ask(setup.home, {"probe": True})) is not None and "error" in answered:
            yield setup.finding(Level.BAD, "database", "database_stuck", error=answered["error"])
    except AppError as error:
        yield setup.finding(Level.BAD, "database", "database_stuck", error=error.detail or str(error))
    for rule in broken:
        yield setup.finding(Level.BAD, "books", "books_broken", rule=rule)
    if not broken:
        yield setup.finding(Level.GOOD, "books", "books_good", mib=round(path.stat().st_size / 2**20, 1))
