"""The lines of a data set's file, bounded in number, length and size."""

import gzip
import io
import zlib
from collections.abc import Iterator
from typing import IO

from core.errors import BadDataset
from core.i18n.messages import Lazy

MAX_BYTES = 200 * 10**6  # unpacked
MAX_LINE_BYTES = 64 * 1024
MAX_LINES = 200_000
BOM, GZIP = b"\xef\xbb\xbf", b"\x1f\x8b"
TWO_BYTE_BOMS = (b"\xff\xfe", b"\xfe\xff")
Stream = io.BufferedIOBase | IO[bytes]


def bad(line: int, key: str, **fields: object) -> BadDataset:
    """The error that refuses the file for `line` (0: no line); `key` is a message of [data]."""
    reason = Lazy(f"data.{key}", **fields)
    where = f"line {line}: " if line else ""
    return BadDataset(detail=f"{where}{reason.render('en')}", line=line, reason=reason)


class Lines:
    """Numbered lines of at most MAX_LINE_BYTES, MAX_BYTES in total. A longer line is skipped and read as None."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self.number = 0
        self.bytes = 0
        self._again: bytes | None = None

    def first(self) -> bytes:
        """The first non-blank line without byte order mark; iteration yields it again."""
        line: bytes | None = b"\n"
        while line and not line.strip():
            line = self._next()
            if self.number == 1 and line is not None:
                if line[:2] in TWO_BYTE_BOMS:
                    raise bad(0, "utf16")
                line = line.removeprefix(BOM)
        if line is None:
            raise bad(self.number, "first_line_long", limit=MAX_LINE_BYTES)
        self._again = line
        return line

    def __iter__(self) -> Iterator[bytes | None]:
        if self._again is not None:
            line, self._again = self._again, None
            yield line
        while (following := self._next()) != b"":
            yield following

    def _next(self) -> bytes | None:
        """The next line, b"" at the end, None if too long."""
        line = self._read()
        if not line:
            return b""
        self.number += 1
        if self.number > MAX_LINES:
            raise bad(self.number, "many_lines", limit=MAX_LINES)
        if len(line) <= MAX_LINE_BYTES:
            return line
        while line and not line.endswith(b"\n"):
            line = self._read()
        return None

    def _read(self) -> bytes:
        try:
            line = self.stream.readline(MAX_LINE_BYTES + 1)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise bad(self.number + 1, "bad_gzip", error=error) from error
        self.bytes += len(line)
        if self.bytes > MAX_BYTES:
            raise bad(self.number + 1, "large", limit=MAX_BYTES // 10**6)
        return line
