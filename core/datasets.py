"""How a data set comes into the home: a file that a person names or sends, or what consenting people said.

Runs before a command's transaction, because it reads and writes files. Knows nothing of what stands in a row: the
trainer checks that. A data set is kept under its sha256, so the same bytes are there once, whoever brings them.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

from core.commands import Call, Grant
from core.errors import AppError, BadInput, StorageError, StorageFull
from core.store import directory, jobs
from core.store.database import Database, Tx
from core.store.home import Home
from core.types import Caller

CONVERSATIONS = "conversations"
MAX_BYTES = 256 * 2**20
_MAX_CONVERSATIONS = 20_000
_CHUNK = 2**20


async def prepare_finetune(home: Home, database: Database, caller: Caller, call: Call) -> Call:
    """For `/finetune FILE`: the same call with the data set's sha256 in the place of the file; else the call as it is.

    Raises BadInput for a data set that is not there, cannot be read or is too large; StorageError for a full disk.
    """
    if call.key not in (("finetune", ""), ("finetune", "start")):
        return call
    grant = await database.read(lambda tx: directory.grant_of(tx, caller.user, caller.channel.id))
    if grant < Grant.OPERATOR:
        return call  # refused and audited where all commands are
    typed = call.arguments.get("dataset", "")
    if typed == CONVERSATIONS:
        sha256 = await _bring_conversations(home, database, caller)
    else:
        sha256 = await _bring_named(home, database, caller, typed)
    return replace(call, arguments={**call.arguments, "dataset": sha256})


def stored(home: Home, sha256: str) -> Path:
    return home.datasets / sha256


async def _bring_named(home: Home, database: Database, caller: Caller, typed: str) -> str:
    path = _local_path(caller, typed)
    if path is not None and await asyncio.to_thread(path.exists):
        return await _bring_file(home, database, caller, path)
    known = await database.read(lambda tx: jobs.known_dataset(tx, caller.user, typed)) if typed else None
    if known is not None and await asyncio.to_thread(stored(home, known).is_file):
        return known
    if not typed:
        raise BadInput("training.no_dataset")
    raise BadInput("training.dataset_not_found", typed=typed[:200])


def _local_path(caller: Caller, typed: str) -> Path | None:
    """A file of this machine: on the terminal alone, where the person sits at it."""
    if caller.address.platform != directory.TERMINAL:
        return None
    if caller.attachments:
        return Path(caller.attachments[0].file_id)
    try:
        return Path(typed).expanduser() if typed else None
    except RuntimeError:  # ~nobody
        return None


async def _bring_file(home: Home, database: Database, caller: Caller, path: Path) -> str:
    name = path.name
    try:
        sha256, size = await asyncio.to_thread(_copy, path, home)
    except IsADirectoryError:
        raise BadInput("training.dataset_is_folder", name=name) from None
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageFull(detail=f"no room for the data set: {error}") from error
        raise BadInput("training.dataset_unreadable", name=name, reason=error.strerror or "?") from error
    await database.write(
        lambda tx: jobs.keep_dataset(tx, sha256, name, source="file", size_bytes=size, brought_by=caller.user)
    )
    return sha256


def _copy(path: Path, home: Home) -> tuple[str, int]:
    with path.open("rb") as file:
        if not file.seekable() or path.is_dir():
            raise BadInput("training.dataset_unreadable", name=path.name, reason="not a file")
        return _keep(_chunks(file, path.name), home)


def _chunks(file: BinaryIO, name: str) -> Iterator[bytes]:
    size = 0
    while chunk := file.read(_CHUNK):
        size += len(chunk)
        if size > MAX_BYTES:
            raise BadInput("training.dataset_too_large", name=name, limit=MAX_BYTES // 2**20)
        yield chunk
    if not size:
        raise BadInput("training.dataset_empty", name=name)


def _keep(chunks: Iterator[bytes], home: Home) -> tuple[str, int]:
    """Write aside, then rename to the hash: (sha256, bytes). Nothing half written is ever found under a hash."""
    aside = home.datasets / f".new-{os.getpid()}-{os.urandom(8).hex()}"
    digest, size = hashlib.sha256(), 0
    try:
        with os.fdopen(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as out:
            for chunk in chunks:
                digest.update(chunk)
                size += len(chunk)
                out.write(chunk)
            out.flush()
            os.fsync(out.fileno())
        aside.rename(stored(home, digest.hexdigest()))
    finally:
        aside.unlink(missing_ok=True)
    return digest.hexdigest(), size


# --- conversations ---


async def _bring_conversations(home: Home, database: Database, caller: Caller) -> str:
    """What consenting people said in this channel since they consented, and what they were answered."""
    channel = caller.channel.id
    people = await database.read(lambda tx: tx.value("SELECT count(*) FROM consent WHERE channel_id = ?", [channel]))
    said = await database.read(lambda tx: _said(tx, channel))
    if not said:
        raise BadInput("training.no_conversations", people=people)
    lines = [json.dumps({"messages": messages}, ensure_ascii=False).encode() + b"\n" for _, messages in said]
    try:
        sha256, size = await asyncio.to_thread(_keep, iter(lines), home)
    except OSError as error:
        raise StorageError(detail=f"the data set cannot be written: {error}") from error
    whose = {user for user, _ in said}

    def keep(tx: Tx) -> None:
        consenting = {
            row["user_hash"] for row in tx.all("SELECT user_hash FROM consent WHERE channel_id = ?", [channel])
        }
        if not whose <= consenting:  # taken back meanwhile
            raise AppError("training.consent_changed")
        jobs.keep_dataset(tx, sha256, CONVERSATIONS, source=CONVERSATIONS, size_bytes=size, brought_by=caller.user)
        for user in sorted(whose):
            tx.run("INSERT OR IGNORE INTO dataset_person VALUES (?, ?)", [sha256, user])

    await database.write(keep)
    return sha256


def _said(tx: Tx, channel_id: int) -> list[tuple[str, list[dict[str, str]]]]:
    """(whose, messages) for each conversation and person: their questions, each with its answer."""
    rows = tx.all(
        "SELECT conversation_id, turn.user_hash, role, text FROM turn"
        " JOIN conversation ON conversation.id = conversation_id"
        " JOIN consent ON consent.user_hash = turn.user_hash AND consent.channel_id = conversation.channel_id"
        " WHERE conversation.channel_id = ? AND at_ms >= granted_ms ORDER BY conversation_id, turn.user_hash, turn.id"
        " LIMIT ?",
        [channel_id, 2 * _MAX_CONVERSATIONS],
    )
    said: dict[tuple[int, str], list[dict[str, str]]] = {}
    question: tuple[tuple[int, str], str] | None = None
    for row in rows:
        whose = (row["conversation_id"], row["user_hash"])
        text = tx.cipher.unseal(row["text"])
        if row["role"] == "user":
            question = (whose, text)
        elif question is not None and question[0] == whose:
            said.setdefault(whose, []).extend(
                [{"role": "user", "content": question[1]}, {"role": "assistant", "content": text}]
            )
            question = None
    return [(user, messages) for (_, user), messages in said.items()]
