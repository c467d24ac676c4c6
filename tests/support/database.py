"""Database calls for tests that are no coroutines, or block their loop on purpose."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from core.storage.database import Database, Tx

T = TypeVar("T")


def write_now(database: Database, work: Callable[[Tx], T]) -> T:
    return database._submit(work).result()


def read_now(database: Database, work: Callable[[Tx], T]) -> T:
    return database._readers.submit(database._read, work).result()
