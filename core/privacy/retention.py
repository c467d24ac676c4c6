"""Retention: runs every owner's prune and sweep steps (core.storage.lifecycle) once a minute.

The ledger, prices and counts are never pruned.
"""

import asyncio
import json
import logging
from dataclasses import asdict

from core.config.schema import Retention
from core.errors import AppError
from core.privacy import tombstones
from core.storage import lifecycle, state
from core.storage.clock import keep_time
from core.storage.database import Database, Tx
from core.storage.home import Home
from core.storage.lifecycle import HOUR_MS, Periods

log = logging.getLogger(__name__)
_EVERY_S = 60.0
_SENT_S = 30 * 86_400.0


def keep_retention(tx: Tx, retention: Retention) -> None:
    """Store the periods in force; /privacy and the sweep read them."""
    state.put(tx, "retention", json.dumps(asdict(retention)))


def retention_of(tx: Tx) -> Retention:
    kept = state.get(tx, "retention")
    return Retention(**json.loads(kept)) if kept else Retention()


def periods_of(retention: Retention) -> Periods:
    payload = round(retention.payload_minutes * 60_000)
    return Periods(
        conversation=round(retention.conversation_hours * HOUR_MS),
        payload=payload,
        dead=max(payload, round(retention.dead_days * 24 * HOUR_MS)),
        dataset=round(retention.dataset_days * 24 * HOUR_MS),
        audit=round(retention.audit_days * 24 * HOUR_MS),
    )


async def keep_clean(database: Database, home: Home, retention: Retention) -> None:
    """Run `clean` once a minute, until cancelled. An error is logged; the next minute tries again."""
    await database.write(lambda tx: keep_retention(tx, retention))
    while True:
        try:
            await database.write(keep_time)
            await clean(database, home, retention)
        except (AppError, OSError) as error:
            log.error("retention.failed", extra={"error": str(error)})
        await asyncio.sleep(_EVERY_S)


async def clean(database: Database, home: Home, retention: Retention) -> int:
    """One pass by the database's clock, in small transactions; the number of rows changed.

    Files are swept on each pass: an erasure since the last one may have left some.
    """
    changed = 0
    for step in lifecycle.prune_steps(periods_of(retention)):
        while count := await database.write(step):
            changed += count
            if count < lifecycle.BATCH:
                break
    if changed:
        log.info("retention.cleaned", extra={"rows": changed})
    await sweep(database, home)
    return changed


async def sweep(database: Database, home: Home) -> None:
    """Write tombstones to their file, remove the files of erased rows, truncate the WAL. Raises OSError, AppError."""
    stored, steps = await database.read(
        lambda tx: (tombstones.stored(tx), lifecycle.sweep_steps(tx, periods_of(retention_of(tx))))
    )

    def work() -> None:
        tombstones.append_to_file(home, stored)
        for step in steps:
            step(home)
        for path in lifecycle.entries(home.sent):
            if lifecycle.age_s(path) > _SENT_S:
                path.unlink(missing_ok=True)

    await asyncio.to_thread(work)
    await database.checkpoint()


async def try_sweep(database: Database, home: Home) -> None:
    """`sweep`, but an error is logged and left to the next `clean`."""
    try:
        await sweep(database, home)
    except (AppError, OSError) as error:
        log.error("retention.failed", extra={"error": str(error)})
