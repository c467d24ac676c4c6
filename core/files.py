"""Durable atomic writes, checksums, and opening a path that a person named. All of it blocks."""

import errno
import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


class NotPlainFile(OSError):
    """The path names a device, pipe or socket."""


def sync(path: Path) -> None:
    """fsync a file's content, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def move(source: Path, target: Path) -> None:
    """fsync a file, or a folder with all that is in it; rename it to `target` on the same disk; fsync target's folder.

    A crash leaves `target` as it was, or complete. Raises OSError.
    """
    if source.is_dir():
        for path in source.rglob("*"):
            sync(path)
    sync(source)
    source.rename(target)
    sync(target.parent)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a path beside `path` to write to; afterwards move it over `path`, or remove it where the block raised."""
    aside = path.with_name(f"{path.name}.new")
    try:
        yield aside
        move(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def write(path: Path, content: bytes, mode: int = 0o600) -> None:
    """Replace the content of a file, durably and in one step. Raises OSError."""
    with replacing(path) as aside:
        descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file's content. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def open_plain(path: Path) -> BinaryIO:
    """Open a regular file for reading; a pipe or device is never waited for.

    Raises FileNotFoundError where no such file can exist, IsADirectoryError, NotPlainFile, or another OSError.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (NotADirectoryError, ValueError) as error:  # ValueError: the name holds a NUL
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path)) from error
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path)) from error
        raise
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return os.fdopen(descriptor, "rb")
    os.close(descriptor)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    raise NotPlainFile(errno.EINVAL, "not a plain file", str(path))
