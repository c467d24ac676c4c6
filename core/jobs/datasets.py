"""Data sets: rows, and files that are stored under the SHA-256 of their bytes. A data set never changes.

A file is stored before the transaction of its command. The trainer checks what the rows of a file hold.
"""

import asyncio
import errno
import hashlib
import os
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

from core import files
from core.channels import terminal
from core.commands.registry import CommandContext
from core.errors import AppError, BadInput
from core.i18n.messages import Lazy
from core.storage import lifecycle
from core.storage.database import Row, Tx
from core.storage.home import Home
from core.storage.lifecycle import Periods, Prune
from core.types import Caller

CONVERSATIONS, FEEDBACK = "conversations", "feedback"  # sources with people's messages; any other is a file
CONSENTED = (CONVERSATIONS, FEEDBACK)
MAX_BYTES = 200 * 10**6
_CHUNK = 2**20
_FETCH_S = 300.0
# Data sets that a person may know: their own, and those that jobs of channels which they operate have read. People
# consent for one channel, so data sets of their messages are not among them.
_KNOWN = (
    " FROM dataset JOIN ("
    " SELECT sha256, name, created_ms AS at_ms FROM dataset WHERE brought_by = ?"
    " UNION ALL SELECT dataset_sha256, job.dataset, job.created_ms FROM job JOIN operator ON user_hash = ?"
    " AND (operator.channel_id IS NULL OR operator.channel_id = job.channel_id)"
    ") AS known ON known.sha256 = dataset.sha256"
    f" WHERE erased_ms IS NULL AND source NOT IN ('{CONVERSATIONS}', '{FEEDBACK}')"
)


def keep_dataset(
    tx: Tx, sha256: str, name: str, source: str, size_bytes: int, brought_by: str, licence: str = ""
) -> None:
    """Insert a data set, or restore an erased one; the first owner of the same bytes stays the owner."""
    tx.run(
        "INSERT INTO dataset (sha256, name, source, licence, size_bytes, brought_by, created_ms)"
        " VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO UPDATE SET created_ms = excluded.created_ms, erased_ms = NULL,"
        " licence = CASE excluded.licence WHEN '' THEN licence ELSE excluded.licence END",
        [sha256, name, source, licence, size_bytes, brought_by, tx.now_ms],
    )


def keep_derived(tx: Tx, parent: str, sha256: str, *, size_bytes: int) -> None:
    """Insert a data set made from another one, with the same licence, owner and people."""
    tx.run(
        "INSERT INTO dataset (sha256, name, source, licence, size_bytes, brought_by, created_ms, parent)"
        " SELECT ?, name, source, licence, ?, brought_by, ?, sha256 FROM dataset WHERE sha256 = ?"
        " ON CONFLICT DO UPDATE SET created_ms = excluded.created_ms, erased_ms = NULL",
        [sha256, size_bytes, tx.now_ms, parent],
    )
    people = "SELECT ?, user_hash FROM dataset_person WHERE dataset_sha256 = ?"
    tx.run(f"INSERT OR IGNORE INTO dataset_person {people}", [sha256, parent])


def count_rows(tx: Tx, sha256: str, rows: int) -> None:
    tx.run("UPDATE dataset SET rows = ? WHERE sha256 = ?", [rows, sha256])


def known_dataset(tx: Tx, user_hash: str, typed: str) -> tuple[str, str] | None:
    """(sha256, name) of the newest known data set with this name, or with this hash prefix of 8 digits or more."""
    row = tx.one(
        f"SELECT known.sha256, known.name {_KNOWN}"
        " AND (known.name = ? OR (length(?) >= 8 AND substr(known.sha256, 1, length(?)) = ?))"
        " ORDER BY at_ms DESC LIMIT 1",
        [user_hash, user_hash, typed, typed, typed, typed.lower()],
    )
    return (row["sha256"], row["name"]) if row else None


def known_datasets(tx: Tx, user_hash: str, limit: int) -> list[Row]:
    """Data sets that the person may know, newest first; `called` is the name under which the person knows it."""
    grouped = f"{_KNOWN} GROUP BY dataset.sha256 ORDER BY created_ms DESC LIMIT ?"
    return tx.all(f"SELECT dataset.*, known.name AS called, max(at_ms) {grouped}", [user_hash, user_hash, limit])


def newest_of_channel(tx: Tx, channel_id: int) -> tuple[str, str] | None:
    """(sha256, name) of the newest job's data set in a channel that is not erased."""
    row = tx.one(
        "SELECT dataset_sha256, job.dataset FROM job JOIN dataset ON sha256 = dataset_sha256"
        " WHERE channel_id = ? AND erased_ms IS NULL ORDER BY job.id DESC LIMIT 1",
        [channel_id],
    )
    return (row["dataset_sha256"], row["dataset"]) if row else None


def is_erased(tx: Tx, sha256: str) -> bool:
    """Whether the data set is erased or unknown."""
    return not tx.value("SELECT 1 FROM dataset WHERE sha256 = ? AND erased_ms IS NULL", [sha256])


# --- files ---


def path_of(home: Home, sha256: str) -> Path:
    return home.datasets / sha256


async def store_named(context: CommandContext, caller: Caller, typed: str, *, licence: str = "") -> tuple[str, str]:
    """(sha256, name) of a stored upload or terminal path, or of a known data set. Raises BadInput."""
    home, database = context.home, context.database
    local = caller.address.platform == terminal.TERMINAL
    if caller.attachments and not local:
        sent = caller.attachments[0]
        file = await download(home, context.fetch(caller.address, sent), sent.name)
        return await _store_file(context, caller, sent.name, file, licence)
    path = Path(caller.attachments[0].file_id) if caller.attachments else typed_path(typed) if local else None
    if path is not None:
        if await asyncio.to_thread(os.path.isdir, path):
            raise BadInput("training.dataset_is_folder", name=path.name)
        if opened := await asyncio.to_thread(open_plain, path):
            return await _store_file(context, caller, path.name, opened, licence)
    known = await database.read(lambda tx: known_dataset(tx, caller.user, typed)) if typed else None
    if known is not None and await asyncio.to_thread(path_of(home, known[0]).is_file):
        return known
    if not typed and path is None:
        raise BadInput("training.no_dataset")
    raise BadInput("training.dataset_not_found", typed=(typed or str(path))[:200])


async def download(home: Home, chunks: AsyncIterator[bytes], name: str, limit: int = MAX_BYTES) -> BinaryIO:
    """Write an uploaded file to an unnamed temporary file, which the caller closes. Raises BadInput."""
    size = 0
    with ExitStack() as opened:
        file = opened.enter_context(tempfile.TemporaryFile(dir=home.datasets))
        try:
            async with asyncio.timeout(_FETCH_S):
                async for chunk in chunks:
                    size += len(chunk)
                    if size > limit:
                        raise BadInput("training.dataset_too_large", name=name, limit=limit // 10**6)
                    await asyncio.to_thread(file.write, chunk)
        except TimeoutError as error:
            raise BadInput("training.dataset_unreadable", name=name, reason=Lazy("training.read_too_slow")) from error
        file.seek(0)
        opened.pop_all()
        return file


def typed_path(typed: str) -> Path | None:
    return Path(os.path.expanduser(typed)) if typed else None  # raises nothing


def open_plain(path: Path, unreadable: str = "training.dataset_unreadable") -> BinaryIO | None:
    """Open a regular file; None where there is none. Raises BadInput, with the sentence `unreadable`."""
    try:
        return files.open_plain(path)
    except FileNotFoundError:
        return None
    except (IsADirectoryError, files.NotPlainFile) as error:
        raise BadInput(unreadable, name=path.name, reason=Lazy("training.read_no_file")) from error
    except OSError as error:
        raise BadInput(unreadable, name=path.name, reason=error.strerror or "?") from error


async def _store_file(
    context: CommandContext, caller: Caller, name: str, file: BinaryIO, licence: str
) -> tuple[str, str]:
    def copy() -> tuple[str, int]:
        with file:
            return store(context.home, _chunks(file, name))

    sha256, size = await asyncio.to_thread(copy)
    await context.database.write(lambda tx: keep_dataset(tx, sha256, name, "file", size, caller.user, licence))
    return sha256, name


def _chunks(file: BinaryIO, name: str) -> Iterator[bytes]:
    size = 0
    try:
        while chunk := file.read(_CHUNK):
            size += len(chunk)
            if size > MAX_BYTES:
                raise BadInput("training.dataset_too_large", name=name, limit=MAX_BYTES // 10**6)
            yield chunk
    except OSError as error:
        raise BadInput("training.dataset_unreadable", name=name, reason=error.strerror or "?") from error
    if not size:
        raise BadInput("training.dataset_empty", name=name)


def store(home: Home, chunks: Iterator[bytes]) -> tuple[str, int]:
    """Write a file, then rename it to its SHA-256; (sha256, size in bytes). Raises OSError."""
    new = home.datasets / f".new-{os.getpid()}-{os.urandom(8).hex()}"
    digest, size = hashlib.sha256(), 0
    try:
        with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as out:
            for chunk in chunks:
                digest.update(chunk)
                size += len(chunk)
                out.write(chunk)
        files.move(new, path_of(home, digest.hexdigest()))
    finally:
        new.unlink(missing_ok=True)
    return digest.hexdigest(), size


def storage_error(error: OSError) -> AppError:
    """The error of a command whose file cannot be stored."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return AppError("error.storage_full" if full else "error.storage", f"it cannot be kept: {error}")


# --- erasure and retention ---


def erase_unneeded(tx: Tx, sha256: str) -> None:
    """Erase a data set of people's messages when its last job has ended; `dataset_person` rows stay."""
    marks = ", ".join("?" * len(CONSENTED))
    tx.run(
        f"UPDATE dataset SET erased_ms = ? WHERE erased_ms IS NULL AND source IN ({marks}) AND sha256 = ?"
        " AND NOT EXISTS (SELECT 1 FROM job WHERE dataset_sha256 = dataset.sha256 AND ended_ms IS NULL)",
        [tx.now_ms, *CONSENTED, sha256],
    )


def add_person(tx: Tx, sha256: str, user_hash: str) -> None:
    """Record that a data set holds messages of a person."""
    tx.run("INSERT OR IGNORE INTO dataset_person VALUES (?, ?)", [sha256, user_hash])


def of_person(tx: Tx, user_hash: str, channel_id: int | None = None) -> list[str]:
    """Data sets with messages of a person: all, or those that only jobs of one channel have read."""
    rows = tx.all(
        "SELECT DISTINCT dataset_sha256 FROM dataset_person WHERE user_hash = ? AND (? IS NULL OR NOT EXISTS"
        " (SELECT 1 FROM job WHERE job.dataset_sha256 = dataset_person.dataset_sha256 AND job.channel_id <> ?))",
        [user_hash, channel_id, channel_id],
    )
    return [row["dataset_sha256"] for row in rows]


def drop_person(tx: Tx, user_hash: str) -> None:
    tx.run("DELETE FROM dataset_person WHERE user_hash = ?", [user_hash])


def erase(tx: Tx, sha256: str) -> None:
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
