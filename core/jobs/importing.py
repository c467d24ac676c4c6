"""/adapter import: a PEFT folder from elsewhere becomes a job that evaluates it.

The archive is unpacked into jobs/ before the command's transaction. Only names, sizes and headers are checked here; the
trainer reads the weights with the code that serves them.
"""

import asyncio
import json
import os
import shutil
import tarfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import IO, BinaryIO, Self

from core.channels import audit, terminal
from core.commands.registry import CommandContext, Fetch, command
from core.commands.table import Call
from core.delivery.deliveries import new_delivery
from core.errors import BadInput
from core.i18n.messages import Lazy, say
from core.jobs import datasets, jobs
from core.jobs.commands import check_room
from core.model.weights import tensor_entries
from core.storage.database import Tx
from core.storage.home import Home
from core.types import Body, Caller, Effect, Outcome

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MOST_BYTES = {CONFIG: 2**20, WEIGHTS: 2 * 2**30}
MOST_MEMBERS, MOST_UNPACKED = 1000, 32 * 2**30
_CHUNK = 2**20
_MOST_HEADER = 2**14  # bytes of one extended header; several may follow each other
_LONG_HEADERS = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)


@dataclass(frozen=True, slots=True)
class UnpackedAdapter:
    """A folder in jobs/ with the two files of an adapter, its title, and the data set for the evaluation."""

    folder: str
    title: str
    dataset_sha256: str
    dataset: str


async def unpack_adapter(context: CommandContext, caller: Caller, call: Call) -> UnpackedAdapter:
    """Unpack the adapter of `/adapter import` and find its data set. Raises BadInput, AppError."""
    source, typed = call.arguments.get("file", ""), call.arguments.get("dataset", "")
    if caller.attachments and not typed:  # beside an uploaded adapter the first argument is the data set
        source, typed = "", source
    try:
        if typed:
            found: tuple[str, str] | None = await datasets.store_named(context, replace(caller, attachments=()), typed)
        else:
            found = await context.database.read(lambda tx: datasets.newest_of_channel(tx, caller.channel.id))
        if found is None:
            raise BadInput("import.no_dataset")
        unpacked, title = await _unpacked(context.home, context.fetch, caller, source)
    except OSError as error:  # of the home folder; errors of the given file are BadInput
        raise datasets.storage_error(error) from error
    return UnpackedAdapter(unpacked.name, title, *found)


@command("adapter", "import", prepare=unpack_adapter, check=check_room)
def import_adapter(tx: Tx, caller: Caller, call: Call, given: UnpackedAdapter) -> Outcome:
    """Queue a job that evaluates the adapter."""
    job = jobs.create(tx, caller, given.dataset_sha256, given.dataset, imported=given.folder)
    new_delivery(tx, job_id=job.id)
    audit.record(tx, caller, call.action, job.label, None, {"job": job.id, "file": given.title})
    before = jobs.jobs_ahead(tx, job.id)
    fields = {"id": job.id, "name": given.title, "dataset": given.dataset, "label": job.label, "before": before}
    return Outcome(Body(say(caller.language, "import.started", **fields)), (Effect.WAKE_TRAINING,))


# --- files (blocking) ---


async def _unpacked(home: Home, fetch: Fetch, caller: Caller, typed: str) -> tuple[Path, str]:
    """(folder in jobs/ with the two files, title). Raises BadInput."""
    target = home.jobs / f"new-{os.urandom(8).hex()}"
    local = caller.address.platform == terminal.TERMINAL
    if caller.attachments and not local:
        sent = caller.attachments[0]
        file = await datasets.download(home, fetch(caller.address, sent), sent.name, MOST_BYTES[WEIGHTS])
        await asyncio.to_thread(_unpack_archive, file, sent.name, target)
        return target, sent.name
    path = Path(caller.attachments[0].file_id) if caller.attachments else datasets.typed_path(typed)
    if path is None or not local:
        raise BadInput("import.no_file")
    await asyncio.to_thread(_unpack_path, path, target)
    return target, path.name


def _unpack_path(path: Path, target: Path) -> None:
    if not os.path.isdir(path):  # raises nothing
        file = datasets.open_plain(path, "import.unreadable")
        if file is None:
            raise BadInput("import.not_found", typed=str(path)[:200])
        _unpack_archive(file, path.name, target)
        return
    with _making(target):
        for name in MOST_BYTES:
            member = datasets.open_plain(path / name, "import.unreadable")
            if member is None:
                raise BadInput("import.missing", name=path.name, what=name)
            with member:
                _copy(member, target, name)


def _unpack_archive(file: BinaryIO, name: str, target: Path) -> None:
    """Extract the two files of the outermost adapter in a zip or tar archive, and nothing else.

    The output folder of a trainer also holds checkpoints, each an adapter in a deeper folder.
    """
    with file, _making(target):
        try:
            members = _zip_members(file) if zipfile.is_zipfile(file) else _tar_members(file)
            found: dict[str, PurePosixPath] = {}
            twice: set[str] = set()
            for member, opened in members:
                path = PurePosixPath(member)
                before = found.get(path.name)
                with opened as inside:
                    if before is None or len(path.parts) < len(before.parts):
                        _copy(inside, target, path.name)
                        found[path.name] = path
                        twice.discard(path.name)
                    elif len(path.parts) == len(before.parts):
                        twice.add(path.name)
        except (zipfile.BadZipFile, tarfile.TarError, EOFError, OSError, RuntimeError, NotImplementedError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise BadInput("import.unreadable", name=name, reason=Lazy("import.no_archive")) from error
        outermost = min((len(path.parts) for path in found.values()), default=0)
        for what in MOST_BYTES:
            if what not in found or len(found[what].parts) > outermost:
                raise BadInput("import.missing", name=name, what=what)
            if what in twice:
                raise BadInput("import.two", name=name, what=what)
        if len({path.parent for path in found.values()}) > 1:
            raise BadInput("import.two", name=name, what=CONFIG)


def _zip_members(file: BinaryIO) -> Iterator[tuple[str, IO[bytes]]]:
    with zipfile.ZipFile(file) as archive:
        size = 0
        for number, member in enumerate(archive.infolist()):
            wanted = not member.is_dir() and PurePosixPath(member.filename).name in MOST_BYTES
            size += member.file_size if wanted else 0
            _check_size(number, size)
            if wanted:
                yield member.filename, archive.open(member)


class _TarHeader(tarfile.TarInfo):
    """Refuses headers of other members that tarfile would read whole into memory."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        header = super().frombuf(buf, encoding, errors)
        if header.type == tarfile.GNUTYPE_SPARSE or (header.type in _LONG_HEADERS and header.size > _MOST_HEADER):
            raise tarfile.HeaderError("a long header")
        return header

    def _proc_gnusparse_10(self, *_: object) -> None:
        """tarfile calls this to read the map of a sparse file of format 1.0."""
        raise tarfile.HeaderError("a file with holes")


def _tar_members(file: BinaryIO) -> Iterator[tuple[str, IO[bytes]]]:
    file.seek(0)
    with tarfile.open(fileobj=file, mode="r:*", tarinfo=_TarHeader) as archive:
        size = 0
        for number, member in enumerate(archive):
            archive.members.clear()  # type: ignore[attr-defined]  # free their headers
            size += member.size  # skipped members are decompressed too
            _check_size(number, size)
            wanted = member.isfile() and PurePosixPath(member.name).name in MOST_BYTES
            if wanted and (inside := archive.extractfile(member)) is not None:
                yield member.name, inside


def _check_size(members: int, size: int) -> None:
    if members >= MOST_MEMBERS or size > MOST_UNPACKED:
        raise BadInput("import.many", limit=MOST_MEMBERS, size=MOST_UNPACKED // 2**30)


@contextmanager
def _making(folder: Path) -> Iterator[None]:
    """Make the folder, check its files at the end, and remove it on failure."""
    folder.mkdir(mode=0o700)
    try:
        yield
        _check_headers(folder)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _copy(file: IO[bytes], folder: Path, name: str) -> None:
    size = 0
    with (folder / name).open("wb") as out:
        while chunk := file.read(_CHUNK):
            size += len(chunk)
            if size > MOST_BYTES[name]:
                raise BadInput("import.too_large", what=name, limit=MOST_BYTES[name] // 2**20)
            out.write(chunk)


def _check_headers(folder: Path) -> None:
    """Check what can be checked without torch; the trainer checks the rest."""
    try:
        config = json.loads((folder / CONFIG).read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise BadInput("import.no_json", what=CONFIG) from error
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind != "LORA":
        raise BadInput("import.no_lora", kind=str(kind)[:40])
    try:
        if not list(tensor_entries(folder / WEIGHTS)):
            raise BadInput("import.no_tensors", what=WEIGHTS)
    except ValueError as error:
        with suppress(OSError):
            (folder / WEIGHTS).unlink()
        raise BadInput("import.no_tensors", what=WEIGHTS) from error
