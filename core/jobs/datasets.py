"""Data sets as rows: immutable, known by the hash of their bytes, with whose they are. Knows no file, no sentence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from core.storage import lifecycle
from core.storage.database import Row, Tx
from core.storage.home import Home
from core.storage.lifecycle import Periods, Prune

CONVERSATIONS, FEEDBACK = "conversations", "feedback"  # sources: what people said, and what they said of answers
OF_PEOPLE = (CONVERSATIONS, FEEDBACK)


# What a person may know of: what they brought themselves, and what jobs of the channels that they operate have read.
# What people said is not among it, because they consented for one channel.
_KNOWN = (
    " FROM dataset JOIN ("
    " SELECT sha256, name, created_ms AS at_ms FROM dataset WHERE brought_by = ?"
    " UNION ALL SELECT dataset_sha256, job.dataset, job.created_ms FROM job JOIN operator ON user_hash = ?"
    " AND (operator.channel_id IS NULL OR operator.channel_id = job.channel_id)"
    ") AS known ON known.sha256 = dataset.sha256"
    f" WHERE erased_ms IS NULL AND source NOT IN ('{CONVERSATIONS}', '{FEEDBACK}')"
)


@dataclass(frozen=True, slots=True)
class Dataset:
    """`name` is what those call it who ask; `rows` is 0 until it was checked."""

    sha256: str
    name: str
    source: str
    licence: str
    size_bytes: int
    rows: int
    brought_by: str
    created_ms: int
    parent: str


def keep_dataset(
    tx: Tx, sha256: str, name: str, *, source: str, size_bytes: int, brought_by: str, licence: str = ""
) -> None:
    """Write a data set down. The same bytes brought again are there again; whose they were first, they stay."""
    tx.run(
        "INSERT INTO dataset (sha256, name, source, licence, size_bytes, brought_by, created_ms)"
        " VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO UPDATE SET created_ms = excluded.created_ms, erased_ms = NULL,"
        " licence = CASE excluded.licence WHEN '' THEN licence ELSE excluded.licence END",
        [sha256, name, source, licence, size_bytes, brought_by, tx.now_ms],
    )


def keep_derived(tx: Tx, parent: str, sha256: str, *, size_bytes: int) -> None:
    """Another data set made of one: it has its licence, who brought it, and whose words are in it."""
    tx.run(
        "INSERT INTO dataset (sha256, name, source, licence, size_bytes, brought_by, created_ms, parent)"
        " SELECT ?, name, source, licence, ?, brought_by, ?, sha256 FROM dataset WHERE sha256 = ?"
        " ON CONFLICT DO UPDATE SET created_ms = excluded.created_ms, erased_ms = NULL",
        [sha256, size_bytes, tx.now_ms, parent],
    )
    tx.run(
        "INSERT OR IGNORE INTO dataset_person SELECT ?, user_hash FROM dataset_person WHERE dataset_sha256 = ?",
        [sha256, parent],
    )


def count_rows(tx: Tx, sha256: str, rows: int) -> None:
    tx.run("UPDATE dataset SET rows = ? WHERE sha256 = ?", [rows, sha256])


def known_dataset(tx: Tx, user_hash: str, typed: str) -> tuple[str, str] | None:
    """(sha256, name) of a data set by its name or the beginning of its hash: one that this person may know of."""
    row = tx.one(
        f"SELECT known.sha256, known.name {_KNOWN}"
        " AND (known.name = ? OR (length(?) >= 8 AND substr(known.sha256, 1, length(?)) = ?))"
        " ORDER BY at_ms DESC LIMIT 1",
        [user_hash, user_hash, typed, typed, typed, typed.lower()],
    )
    return (row["sha256"], row["name"]) if row else None


def known_datasets(tx: Tx, user_hash: str, limit: int) -> list[Dataset]:
    """Newest first, each once."""
    rows = tx.all(
        "SELECT dataset.*, known.name AS called, max(at_ms)"
        f" {_KNOWN} GROUP BY dataset.sha256 ORDER BY created_ms DESC LIMIT ?",
        [user_hash, user_hash, limit],
    )
    return [_dataset(row) for row in rows]


def is_erased(tx: Tx, sha256: str) -> bool:
    """Whether it was erased, or never was."""
    return not tx.value("SELECT 1 FROM dataset WHERE sha256 = ? AND erased_ms IS NULL", [sha256])


def _dataset(row: Row) -> Dataset:
    return Dataset(
        sha256=row["sha256"],
        name=row["called"],
        source=row["source"],
        licence=row["licence"],
        size_bytes=row["size_bytes"],
        rows=row["rows"] or 0,
        brought_by=row["brought_by"],
        created_ms=row["created_ms"],
        parent=row["parent"] or "",
    )


def erase_unneeded(tx: Tx, sha256: str) -> None:
    """Erase a data set of people's messages when its last job ends. Whose messages they were stays recorded."""
    marks = ", ".join("?" * len(OF_PEOPLE))
    tx.run(
        f"UPDATE dataset SET erased_ms = ? WHERE erased_ms IS NULL AND source IN ({marks}) AND sha256 = ?"
        " AND NOT EXISTS (SELECT 1 FROM job WHERE dataset_sha256 = dataset.sha256 AND ended_ms IS NULL)",
        [tx.now_ms, *OF_PEOPLE, sha256],
    )


def add_person(tx: Tx, sha256: str, user_hash: str) -> None:
    """Record that a data set holds messages of this person."""
    tx.run("INSERT OR IGNORE INTO dataset_person VALUES (?, ?)", [sha256, user_hash])


def of_person(tx: Tx, user_hash: str, channel_id: int | None = None) -> list[str]:
    """The data sets that hold messages of this person: those that jobs of one channel alone read, or all."""
    rows = tx.all(
        "SELECT DISTINCT dataset_sha256 FROM dataset_person WHERE user_hash = ? AND (? IS NULL OR NOT EXISTS"
        " (SELECT 1 FROM job WHERE job.dataset_sha256 = dataset_person.dataset_sha256 AND job.channel_id <> ?))",
        [user_hash, channel_id, channel_id],
    )
    return [row["dataset_sha256"] for row in rows]


def drop_person(tx: Tx, user_hash: str) -> None:
    tx.run("DELETE FROM dataset_person WHERE user_hash = ?", [user_hash])


def erase(tx: Tx, sha256: str) -> None:
    """Its file goes with the next sweep."""
    tx.run("UPDATE dataset SET erased_ms = ? WHERE sha256 = ? AND erased_ms IS NULL", [tx.now_ms, sha256])


@lifecycle.prunes
def _prunes(kept: Periods) -> list[Prune]:
    def expire(tx: Tx) -> int:
        return tx.run(
            "UPDATE dataset SET erased_ms = ? WHERE sha256 IN (SELECT sha256 FROM dataset"
            " WHERE erased_ms IS NULL AND created_ms <= ? AND NOT EXISTS (SELECT 1 FROM job"
            " WHERE dataset_sha256 = dataset.sha256 AND (ended_ms IS NULL OR ended_ms > ?)) LIMIT ?)",
            [tx.now_ms, tx.now_ms - kept.dataset, tx.now_ms - kept.dataset, lifecycle.BATCH],
        )

    return [expire]


@lifecycle.sweeps
def _sweep(tx: Tx, kept: Periods) -> Callable[[Home], None]:
    rows = tx.all("SELECT sha256, erased_ms FROM dataset")
    known = {row["sha256"] for row in rows if row["erased_ms"] is None}
    gone = {row["sha256"] for row in rows if row["erased_ms"] is not None}
    return lambda home: lifecycle.remove_files(home.datasets, gone=gone, known=known)
