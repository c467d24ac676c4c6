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
import tempfile
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from core import files
from core.channels import terminal
from core.commands.registry import CommandContext, Fetch
from core.commands.table import Call
from core.errors import AppError, BadInput
from core.i18n.messages import Lazy
from core.jobs import datasets, jobs
from core.jobs.datasets import CONVERSATIONS, FEEDBACK
from core.jobs.examples import MOST_TURNS, ConsentedExample, conversations_of, examples_of
from core.storage.database import Database, Tx
from core.storage.home import Home
from core.types import Caller

MAX_BYTES = 200 * 10**6
MAX_OPEN = 8
COLUMNS = ("question", "answer", "system")  # that may be named
_MAX_LICENCE, _MAX_COLUMN = 100, 200
_CHUNK = 2**20
_FETCH_S = 300.0


@dataclass(frozen=True, slots=True)
class BroughtData:
    """A data set in the home. `agreed`: train without asking; `unreadable`: stored texts that cannot be decrypted."""

    sha256: str
    name: str
    agreed: bool
    unreadable: int = 0


async def bring_data(context: CommandContext, caller: Caller, call: Call) -> BroughtData:
    """Copy the data set of `/finetune` into the home: a file that was named or sent, or what consenting people said.

    Raises BadInput for a data set that is missing, unreadable or too large, AppError for a disk that is full.
    """
    given, home, database = call.arguments, context.home, context.database
    typed, agreed = given.get("source", given.get("dataset", "")), given.get("go") == "yes"
    if caller.attachments and typed == "yes":  # below a file that was sent, which needs no name
        typed, agreed = "", True
    _check_settings(given)
    try:
        if typed in (CONVERSATIONS, FEEDBACK) and not caller.attachments:
            sha256, unreadable = await _bring_sayings(home, database, caller, typed)
            return BroughtData(sha256, typed, agreed, unreadable)
        licence = given.get("licence", "")
        sha256, name = await bring_named(home, database, context.fetch, caller, typed, licence=licence)
        return BroughtData(sha256, name, agreed)
    except OSError as error:  # of the home: an error of the file itself is a BadInput
        raise no_storage(error) from error


def check_room(tx: Tx, caller: Caller) -> int:
    """How many jobs would be trained before a new one. Raises BadInput where the channel has one, or too many wait.

    A job that only waits for a yes is in nobody's way.
    """
    at_work = [job for job in jobs.open_jobs(tx) if job.state != "waiting"]
    for job in at_work:
        if job.channel_id == caller.channel.id and job.state != "validating":
            raise BadInput("training.busy", title=job.title, id=job.id)
    if len(at_work) >= MAX_OPEN:
        raise BadInput("training.too_many", n=len(at_work))
    return sum(job.state in jobs.AT_WORK for job in at_work)


def no_storage(error: OSError) -> AppError:
    """What to raise where a person's file cannot be kept."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return AppError("error.storage_full" if full else "error.storage", f"it cannot be kept: {error}")


def _check_settings(given: Mapping[str, str]) -> None:
    for key in COLUMNS:
        if len(given.get(key, "")) > _MAX_COLUMN:
            raise BadInput("training.setting_too_long", setting=key, limit=_MAX_COLUMN)
    if len(given.get("licence", "")) > _MAX_LICENCE:
        raise BadInput("training.setting_too_long", setting="licence", limit=_MAX_LICENCE)
    if bool(given.get("question")) != bool(given.get("answer")):
        raise BadInput("training.both_columns")


def stored(home: Home, sha256: str) -> Path:
    return home.datasets / sha256


async def bring_named(
    home: Home, database: Database, fetch: Fetch, caller: Caller, typed: str, *, licence: str = ""
) -> tuple[str, str]:
    """(sha256, name) of a file that was sent, of a path on the terminal, or of a data set that was brought earlier."""
    local = caller.address.platform == terminal.TERMINAL  # where the person sits at this machine
    if caller.attachments and not local:
        sent = caller.attachments[0]
        file = await fetched(home, fetch(caller.address, sent), sent.name)
        return await _bring_file(home, database, caller, sent.name, file, licence=licence)
    path = Path(caller.attachments[0].file_id) if caller.attachments else typed_path(typed) if local else None
    opened = await asyncio.to_thread(_open, path) if path is not None else None
    if path is not None and opened is not None:
        return await _bring_file(home, database, caller, path.name, opened, licence=licence)
    known = await database.read(lambda tx: datasets.known_dataset(tx, caller.user, typed)) if typed else None
    if known is not None and await asyncio.to_thread(stored(home, known[0]).is_file):
        return known
    if not typed and path is None:
        raise BadInput("training.no_dataset")
    raise BadInput("training.dataset_not_found", typed=(typed or str(path))[:200])


async def fetched(home: Home, chunks: AsyncIterator[bytes], name: str, limit: int = MAX_BYTES) -> BinaryIO:
    """What a platform holds, in a file that has no name. Raises BadInput."""
    file = tempfile.TemporaryFile(dir=home.datasets)  # noqa: SIM115 - whoever gets it closes it
    try:
        size = 0
        async with asyncio.timeout(_FETCH_S):
            async for chunk in chunks:
                size += len(chunk)
                if size > limit:
                    raise BadInput("training.dataset_too_large", name=name, limit=limit // 10**6)
                await asyncio.to_thread(file.write, chunk)
        await asyncio.to_thread(file.seek, 0)
    except TimeoutError as error:
        file.close()
        raise BadInput("training.dataset_unreadable", name=name, reason=Lazy("training.read_too_slow")) from error
    except BaseException:
        file.close()
        raise
    return file


def typed_path(typed: str) -> Path | None:
    try:
        return Path(typed).expanduser() if typed else None
    except RuntimeError:  # ~nobody
        return None


def _open(path: Path) -> BinaryIO | None:
    """A plain file, open; None where there is none. Raises BadInput for what is not a file that can be read."""
    try:
        return files.open_plain(path)
    except FileNotFoundError:
        return None
    except IsADirectoryError as error:
        raise BadInput("training.dataset_is_folder", name=path.name) from error
    except OSError as error:
        plain = not isinstance(error, files.NotPlainFile)
        reason = (error.strerror or "?") if plain else Lazy("training.read_no_file")
        raise BadInput("training.dataset_unreadable", name=path.name, reason=reason) from error


async def _bring_file(
    home: Home, database: Database, caller: Caller, name: str, file: BinaryIO, *, licence: str
) -> tuple[str, str]:
    def copy() -> tuple[str, int]:
        with file:
            return _keep(_chunks(file, name), home)

    sha256, size = await asyncio.to_thread(copy)
    await database.write(
        lambda tx: datasets.keep_dataset(
            tx, sha256, name, source="file", size_bytes=size, brought_by=caller.user, licence=licence
        )
    )
    return sha256, name


def keep_file(home: Home, file: BinaryIO) -> str:
    """Keep what is in a file of the home's own; its sha256. Raises OSError."""
    return _keep(iter(lambda: file.read(_CHUNK), b""), home)[0]


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
        files.move(aside, stored(home, digest.hexdigest()))
    finally:
        aside.unlink(missing_ok=True)
    return digest.hexdigest(), size


# --- what people said ---


async def _bring_sayings(home: Home, database: Database, caller: Caller, source: str) -> tuple[str, int]:
    """What consenting people said in this channel, or what became of their answers' thumbs and corrections.

    Its sha256, and how many stored texts could not be read. Raises BadInput, and AppError where none could.
    """
    channel = caller.channel.id
    read = conversations_of if source == CONVERSATIONS else examples_of
    sayings = await database.read(lambda tx: read(tx, channel))
    said = sayings.said
    if not said and sayings.unreadable:
        raise BadInput("training.none_readable", n=sayings.unreadable)
    if not said:
        people = await database.read(
            lambda tx: tx.value("SELECT count(*) FROM consent WHERE channel_id = ?", [channel])
        )
        raise BadInput(f"training.no_{source}", people=people)
    lines = [json.dumps({"messages": one.messages}, ensure_ascii=False).encode() + b"\n" for one in said]
    sha256, size = await asyncio.to_thread(_keep, iter(lines), home)

    def keep(tx: Tx) -> None:
        now = read(tx, channel, most=2 * MOST_TURNS).said  # more may have been said meanwhile
        if not {_identity(one) for one in said} <= {_identity(one) for one in now}:
            raise AppError("training.consent_changed")  # taken back meanwhile
        datasets.keep_dataset(tx, sha256, source, source=source, size_bytes=size, brought_by=caller.user)
        for user in sorted(set().union(*(one.people for one in said))):
            datasets.add_person(tx, sha256, user)

    try:
        await database.write(keep)
    except AppError:
        if await database.read(lambda tx: datasets.is_erased(tx, sha256)):
            await asyncio.to_thread(stored(home, sha256).unlink, missing_ok=True)
        raise
    return sha256, sayings.unreadable


def _identity(said: ConsentedExample) -> tuple[str, str, str]:
    return said.user, said.id, said.corrected_by
