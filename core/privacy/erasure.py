"""Erasure of a person: a tombstone, then every owner's erase step (core.storage.lifecycle), in one transaction."""

import asyncio

from core.privacy import tombstones
from core.privacy.retention import try_sweep
from core.storage import lifecycle
from core.storage.database import Database, Tx
from core.storage.home import Home
from core.storage.lifecycle import Erasure


def erase(tx: Tx, user_hash: str, until_ms: int, *, keep_row: int = 0) -> Erasure:
    """Erase what is stored of a person up to a moment. Charges and counts stay; retention removes the person from them.

    `keep_row` is the inbox row that asks for the erasure.
    """
    tombstones.add(tx, user_hash, until_ms)
    return lifecycle.erase(tx, Erasure(user_hash, until_ms, keep_row))


async def reapply(database: Database, home: Home) -> None:
    """At start, before anything is answered: erase again whom a restored database should have erased."""
    known = await asyncio.to_thread(tombstones.in_file, home)

    def work(tx: Tx) -> None:
        for user_hash, at_ms in sorted(known - tombstones.stored(tx)):
            erase(tx, user_hash, at_ms)

    await database.write(work)
    await try_sweep(database, home)
