"""Tombstones: who was erased, and up to when. In the database and in a file beside it.

The file outlives the database: one restored from a copy erases the same people again before it serves.
"""

import os

from core.storage.database import Tx
from core.storage.home import Home

_FILE = "erasures"  # "hash milliseconds" on a line

Tombstone = tuple[str, int]


def add(tx: Tx, user_hash: str, at_ms: int) -> None:
    tx.insert("erasure", user_hash=user_hash, at_ms=at_ms)


def stored(tx: Tx) -> set[Tombstone]:
    return {(row["user_hash"], row["at_ms"]) for row in tx.all("SELECT user_hash, at_ms FROM erasure")}


def in_file(home: Home) -> set[Tombstone]:
    path = home.path / _FILE
    if not path.exists():
        return set()
    parts = (line.split() for line in path.read_text("ascii", "replace").splitlines())
    return {(part[0], int(part[1])) for part in parts if len(part) == 2 and part[1].isdecimal()}


def append_to_file(home: Home, found: set[Tombstone]) -> None:
    """Append those that are missing. A line that a crash has cut is not read, and written again."""
    if not (missing := sorted(found - in_file(home))):
        return
    descriptor = os.open(home.path / _FILE, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        os.write(descriptor, "".join(f"\n{user_hash} {at_ms}" for user_hash, at_ms in missing).encode() + b"\n")
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
