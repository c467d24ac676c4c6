"""How long things are kept, and that they go when the time is over: rows by the clock, files by what rows say.

Knows no person and no command. The ledger, prices and counts are never touched.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from core import files
from core.channels import terminal
from core.config.schema import Retention
from core.errors import AppError
from core.jobs import jobs
from core.storage.database import Database, Tx
from core.storage.home import Home

log = logging.getLogger(__name__)
_EVERY_S = 60.0
_BATCH = 1000
_MINUTE_MS, _HOUR_MS, _DAY_MS = 60_000, 3_600_000, 86_400_000
_LEFT_OVER_S = 3600.0  # a file without a row may be about to get one
_LOG_S = 30 * 86_400.0
_TOMBSTONES = "erasures"
_TOLD = "NOT EXISTS (SELECT 1 FROM delivery WHERE job_id = job.id AND state IN ('open', 'generated'))"
_CLOSED = "inbox.state IN ('done', 'dead')"


def keep_retention(tx: Tx, retention: Retention) -> None:
    """Write the periods down, so that /privacy says what is in force."""
    tx.run(
        "INSERT INTO setting VALUES ('retention', ?) ON CONFLICT DO UPDATE SET value = excluded.value",
        [json.dumps(asdict(retention))],
    )


def retention_of(tx: Tx) -> Retention:
    kept = tx.value("SELECT value FROM setting WHERE key = 'retention'")
    return Retention(**json.loads(kept)) if kept else Retention()


# --- rows ---


async def keep_clean(database: Database, home: Home, retention: Retention) -> None:
    """Once a minute, until cancelled. Trouble is logged, and tried again the next time."""
    await database.write(lambda tx: keep_retention(tx, retention))
    while True:
        try:
            await clean(database, home, retention)
        except (AppError, OSError) as error:
            log.error("retention.failed", extra={"error": str(error)})
        await asyncio.sleep(_EVERY_S)


async def clean(database: Database, home: Home, retention: Retention) -> int:
    """One pass by the database's clock: how many rows it changed. Small transactions, so that no one waits long.

    The files are swept each time: who was erased since may have been left to this pass.
    """
    changed = 0
    for step in _steps(retention):
        while count := await database.write(step):
            changed += count
            if count < _BATCH:
                break
    if changed:
        log.info("retention.cleaned", extra={"rows": changed})
    await sweep(database, home)
    return changed


def _steps(retention: Retention) -> list[Callable[[Tx], int]]:
    """Each changes at most _BATCH rows and says how many."""
    turn_ms = round(retention.conversation_hours * _HOUR_MS)
    payload_ms = round(retention.payload_minutes * _MINUTE_MS)
    dead_ms = max(payload_ms, round(retention.dead_days * _DAY_MS))
    dataset_ms = round(retention.dataset_days * _DAY_MS)
    audit_ms = round(retention.audit_days * _DAY_MS)

    def each(change: str, table: str, key: str, where: str, *ages_ms: int) -> Callable[[Tx], int]:
        sql = f"{change} WHERE {key} IN (SELECT {key} FROM {table} WHERE {where} LIMIT {_BATCH})"
        return lambda tx: tx.run(sql, [tx.now_ms - age for age in ages_ms])

    said = "SELECT 1 FROM inbox WHERE inbox.id = inbox_id"
    open_here = (
        "SELECT 1 FROM inbox WHERE inbox.platform = conversation.platform AND inbox.account = conversation.account"
        f" AND inbox.place = conversation.place AND inbox.conversation = conversation.conversation AND NOT {_CLOSED}"
    )
    return [
        each("DELETE FROM turn", "turn", "id", "at_ms <= ?", turn_ms),
        each(
            "DELETE FROM conversation",
            "conversation",
            "id",
            f"started_ms <= ? AND NOT EXISTS (SELECT 1 FROM turn WHERE conversation_id = conversation.id)"
            f" AND NOT EXISTS ({open_here})",
            turn_ms,
        ),
        each(
            "UPDATE inbox SET payload = NULL",
            "inbox",
            "id",
            "payload IS NOT NULL AND state = 'done' AND closed_ms <= ?",
            payload_ms,
        ),
        each(
            "UPDATE inbox SET payload = NULL",
            "inbox",
            "id",
            "payload IS NOT NULL AND state = 'dead' AND closed_ms <= ?",
            dead_ms,
        ),
        each(
            "UPDATE delivery SET body = NULL",
            "delivery",
            "id",
            f"body IS NOT NULL AND EXISTS ({said} AND {_CLOSED} AND closed_ms <= ?)",
            payload_ms,
        ),
        # Where something was said is the address of a person: it goes when nothing can be written there any more.
        each(
            "UPDATE inbox SET place = '', conversation = '', reply_to = ''",
            "inbox",
            "id",
            f"place <> '' AND {_CLOSED} AND closed_ms <= ?",
            dead_ms,
        ),
        each(
            "UPDATE part SET handle = '', receipt = ''",
            "part",
            "delivery_id",
            "handle <> '' AND delivery_id IN (SELECT delivery.id FROM delivery JOIN inbox ON inbox.id = inbox_id"
            f" WHERE {_CLOSED} AND closed_ms <= ?)",
            dead_ms,
        ),
        each(
            "UPDATE job SET place = '', conversation = ''",
            "job",
            "id",
            f"place <> '' AND ended_ms <= ? AND {_TOLD} AND NOT ({jobs.RESUMABLE})",
            dead_ms,
        ),
        each(
            "UPDATE part SET handle = '', receipt = ''",
            "part",
            "delivery_id",
            "handle <> '' AND delivery_id IN (SELECT delivery.id FROM delivery JOIN job ON job.id = job_id"
            f" WHERE ended_ms <= ? AND {_TOLD})",
            dead_ms,
        ),
        _unlink,
        lambda tx: _expire_datasets(tx, dataset_ms),
        each(
            "DELETE FROM job_event",
            "job_event",
            "job_id",
            "job_id IN (SELECT id FROM job WHERE ended_ms <= ?)",
            dataset_ms,
        ),
        each("DELETE FROM example", "example", "generation_id", "at_ms <= ?", dataset_ms),
        # A question of a test row's goes with its data set; one that was typed is what somebody said.
        each(
            "UPDATE comparison SET question = NULL",
            "comparison",
            "id",
            "question IS NOT NULL AND typed = 1 AND at_ms <= ?",
            turn_ms,
        ),
        each("DELETE FROM audit", "audit", "id", "at_ms <= ?", audit_ms),
        each("DELETE FROM invite", "invite", "code_hash", "expires_ms <= ?", audit_ms),
        each(
            "DELETE FROM person",
            "person",
            "user_hash",
            "last_ms <= ? AND user_hash NOT IN (SELECT user_hash FROM operator)"
            " AND user_hash NOT IN (SELECT user_hash FROM consent)",
            max(turn_ms, dataset_ms),
        ),
    ]


def _unlink(tx: Tx) -> int:
    """Take forgotten people out of what is kept: no count says any more whose it was.

    An hour later than the rest: the limits of a channel look back so far, and /forget must not renew them.
    """
    changed = 0
    for table, at in (("generation", "started_ms"), ("inbox", "received_ms")):
        changed += tx.run(
            f"UPDATE {table} SET user_hash = '' WHERE user_hash <> '' AND {at} <= ? AND EXISTS"
            f" (SELECT 1 FROM erasure WHERE erasure.user_hash = {table}.user_hash AND at_ms >= {at})",
            [tx.now_ms - _HOUR_MS],
        )
    return changed


def _expire_datasets(tx: Tx, age_ms: int) -> int:
    return tx.run(
        "UPDATE dataset SET erased_ms = ? WHERE erased_ms IS NULL AND created_ms <= ? AND NOT EXISTS (SELECT 1 FROM job"
        " WHERE dataset_sha256 = dataset.sha256 AND (ended_ms IS NULL OR ended_ms > ?))",
        [tx.now_ms, tx.now_ms - age_ms, tx.now_ms - age_ms],
    )


# --- files ---


async def sweep(database: Database, home: Home) -> None:
    """Tombstones to their file, then the files of what is erased go, then the WAL: deleted text is in no file then."""
    found, rows = await database.read(lambda tx: (tombstones(tx), _rows(tx)))
    await asyncio.to_thread(_keep_tombstones, home, found)
    await asyncio.to_thread(_sweep_files, home, rows)
    await database.checkpoint()


async def try_sweep(database: Database, home: Home) -> None:
    """The same, where what was erased stays erased whatever the disk says: trouble is logged, and left to `clean`."""
    try:
        await sweep(database, home)
    except (AppError, OSError) as error:
        log.error("retention.failed", extra={"error": str(error)})


@dataclass(frozen=True, slots=True)
class _StoredFiles:
    """What the database says of files: what it knows, and what of this is to go."""

    datasets: frozenset[str]
    erased_datasets: frozenset[str]
    adapters: frozenset[str]
    erased_adapters: frozenset[str]
    jobs: frozenset[str]
    ended_jobs: frozenset[str]
    typed_ms: int  # what was typed at the terminal before that is not kept


def _rows(tx: Tx) -> _StoredFiles:
    def column(sql: str) -> frozenset[str]:
        return frozenset(str(row["value"]) for row in tx.all(sql))

    local = tx.cipher.hash_user(terminal.TERMINAL, "home", terminal.LOCAL_USER)
    return _StoredFiles(
        datasets=column("SELECT sha256 AS value FROM dataset WHERE erased_ms IS NULL"),
        erased_datasets=column("SELECT sha256 AS value FROM dataset WHERE erased_ms IS NOT NULL"),
        adapters=column("SELECT sha256 AS value FROM adapter"),
        erased_adapters=column("SELECT sha256 AS value FROM adapter WHERE unpublished_reason = 'erased'"),
        jobs=column("SELECT id AS value FROM job UNION SELECT imported FROM job WHERE ended_ms IS NULL"),
        ended_jobs=column(f"SELECT id AS value FROM job WHERE ended_ms IS NOT NULL AND NOT ({jobs.RESUMABLE})"),
        typed_ms=max(
            tx.now_ms - round(retention_of(tx).conversation_hours * _HOUR_MS),
            int(tx.value("SELECT ifnull(max(at_ms), 0) FROM erasure WHERE user_hash = ?", [local])) + 1000,
        ),
    )


def _sweep_files(home: Home, rows: _StoredFiles) -> None:
    for path in _entries(home.datasets):
        if path.name in rows.erased_datasets or (path.name not in rows.datasets and _age_s(path) > _LEFT_OVER_S):
            path.unlink(missing_ok=True)
    for path in _entries(home.adapters):
        if path.name in rows.erased_adapters or (path.name not in rows.adapters and _age_s(path) > _LEFT_OVER_S):
            shutil.rmtree(path, ignore_errors=True)
    for path in _entries(home.jobs):
        if path.name in rows.ended_jobs or (path.name not in rows.jobs and _age_s(path) > _LEFT_OVER_S):
            shutil.rmtree(path, ignore_errors=True)
    for path in _entries(home.sent):
        if _age_s(path) > _LOG_S:
            path.unlink(missing_ok=True)
    for path in _entries(home.logs):
        if path.name.startswith("job-") and _age_s(path) > _LOG_S:
            path.unlink(missing_ok=True)
    _prune_history(home.path / "history", rows.typed_ms)


def _prune_history(path: Path, oldest_ms: int) -> None:
    """Forget what was typed before that, to the second; an entry begins with a blank line and its local time."""
    if not path.exists():
        return
    oldest = time.strftime("# %Y-%m-%d %H:%M:%S", time.localtime(oldest_ms // 1000))
    text = path.read_text(encoding="utf-8", errors="replace")
    entries = [entry.strip("\n") for entry in text.split("\n\n")]
    kept = "".join(f"\n{entry}\n" for entry in entries if entry[: len(oldest)] >= oldest)
    if kept == text:
        return
    files.write(path, kept.encode("utf-8"))


def _entries(folder: Path) -> list[Path]:
    return [folder / name for name in sorted(os.listdir(folder))] if folder.is_dir() else []


def _age_s(path: Path) -> float:
    try:
        return time.time() - path.stat().st_ctime
    except OSError:
        return 0.0


# --- tombstones in a file: "hash milliseconds" on a line ---


def tombstones(tx: Tx) -> set[tuple[str, int]]:
    return {(row["user_hash"], row["at_ms"]) for row in tx.all("SELECT user_hash, at_ms FROM erasure")}


def kept_tombstones(home: Home) -> set[tuple[str, int]]:
    path = home.path / _TOMBSTONES
    if not path.exists():
        return set()
    parts = (line.split() for line in path.read_text("ascii", "replace").splitlines())
    return {(part[0], int(part[1])) for part in parts if len(part) == 2 and part[1].isdecimal()}


def _keep_tombstones(home: Home, found: set[tuple[str, int]]) -> None:
    """Add those that are missing. A line that a crash has cut is not read, and written again."""
    missing = sorted(found - kept_tombstones(home))
    if not missing:
        return
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
    descriptor = os.open(home.path / _TOMBSTONES, flags, 0o600)
    try:
        os.write(descriptor, "".join(f"\n{user_hash} {at_ms}" for user_hash, at_ms in missing).encode() + b"\n")
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
