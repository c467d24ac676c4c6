"""A data file (JSONL or CSV, plain or gzip, UTF-8) -> conversations and a report by line.

An unusable line is rejected with its reason; an unreadable or too large file is refused as a whole.
"""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from core.errors import BadDataset
from core.i18n.messages import Lazy
from finetune.data.personal import find
from finetune.data.records import ALIKE, BadRecord, Conversation, read_record
from finetune.data.sheets import BadSheet, rows

MAX_BYTES = 200 * 10**6  # unpacked
MAX_LINE_BYTES = 64 * 1024
MAX_LINES = 200_000
MAX_DEPTH = 8
MIN_ROWS = 10
NAMED = 20  # rejected or mended lines listed; the rest is counted
BOM, GZIP = b"\xef\xbb\xbf", b"\x1f\x8b"
PDF, ZIP = b"%PDF-", b"PK\x03\x04"  # file types often sent by mistake
Stream = io.BufferedIOBase | IO[bytes]
TWO_BYTE_BOMS = (b"\xff\xfe", b"\xfe\xff")


@dataclass(slots=True)
class Report:
    """Counts of a file's rows: rows = used + duplicates + rejected; the first ones are listed by line."""

    rows: int = 0
    used: int = 0
    duplicates: int = 0
    rejected: int = 0
    mended: int = 0
    near: int = 0  # used, but equal to an earlier row up to case, punctuation and spaces
    first_near: int = 0  # line of the first
    rejections: list[Lazy] = field(default_factory=list)
    mendings: list[Lazy] = field(default_factory=list)
    doubled: list[int] = field(default_factory=list)  # lines
    first: int = 0  # the line of the first rejection
    personal: dict[str, tuple[int, int]] = field(default_factory=dict)  # kind -> (count, line of the first)

    def reject(self, line: int, reason: Lazy) -> None:
        self.rejected += 1
        self.first = self.first or line
        if len(self.rejections) < NAMED:
            self.rejections.append(Lazy("data.line", line=line, reason=reason))

    def double(self, line: int) -> None:
        self.duplicates += 1
        if len(self.doubled) < NAMED:
            self.doubled.append(line)

    def note_near(self, line: int) -> None:
        self.near += 1
        self.first_near = self.first_near or line

    def note_personal(self, line: int, text: str) -> None:
        for kind, n in find(text).items():
            before, first = self.personal.get(kind, (0, line))
            self.personal[kind] = (before + n, first)

    def personal_data(self) -> list[Lazy]:
        return [Lazy(f"data.personal_{kind}", n=n, line=line) for kind, (n, line) in self.personal.items()]

    def noted(self) -> list[Lazy]:
        """Near duplicates, then mended lines."""
        near = [Lazy("data.near", n=self.near, line=self.first_near)] if self.near else []
        return [*near, *self.mendings]

    def mend(self, line: int, reason: Lazy) -> None:
        self.mended += 1
        if len(self.mendings) < NAMED:
            self.mendings.append(Lazy("data.line", line=line, reason=reason))


def bad(line: int, key: str, **fields: object) -> BadDataset:
    """The error that refuses the file for `line` (0: no line); `key` is a message of [data]."""
    reason = Lazy(f"data.{key}", **fields)
    where = f"line {line}: " if line else ""
    return BadDataset(detail=f"{where}{reason.render('en')}", line=line, reason=reason)


def read(path: Path, columns: Mapping[str, str] | None = None) -> tuple[list[Conversation], Report]:
    """Distinct usable conversations in file order. `columns` maps question, answer and system to names in the file.

    Raises BadDataset if the file cannot be used.
    """
    report = Report()
    found: dict[str, Conversation] = {}
    alike: set[str] = set()
    for line, record in _records(path, columns or {}):
        report.rows += 1
        if isinstance(record, BadRecord):
            report.reject(line, record.reason)
            continue
        try:
            conversation, mended = read_record(record, columns)
        except BadRecord as error:
            report.reject(line, error.reason)
            continue
        if conversation.key in found:
            report.double(line)
            continue
        if (said := conversation.key[:ALIKE]) in alike:
            report.note_near(line)
        alike.add(said)
        for what in mended:
            report.mend(line, what)
        report.note_personal(line, "\n".join(message.text for message in conversation.messages))
        found[conversation.key] = Conversation(conversation.turns, conversation.key, line)
    report.used = len(found)
    check_enough(report)
    return list(found.values()), report


def check_enough(report: Report) -> None:
    """Raises BadDataset, naming the first rejected line, if too few rows are usable."""
    if report.used < MIN_ROWS and not report.rejections:
        raise bad(report.first, "few_rows", used=report.used, fewest=MIN_ROWS)
    first = report.rejections[0] if report.rejections else None
    counts = {"used": report.used, "rejected": report.rejected, "rows": report.rows, "first": first}
    if report.used < MIN_ROWS:
        raise bad(report.first, "few_usable_rows", fewest=MIN_ROWS, **counts)
    if report.rejected > report.used + report.duplicates:
        raise bad(report.first, "most_rejected", **counts)


def _records(path: Path, columns: Mapping[str, str]) -> Iterator[tuple[int, Any]]:
    """(line, record); BadRecord in place of a line that does not parse."""
    with path.open("rb") as file:
        packed = file.read(2) == GZIP
        file.seek(0)
        lines = _Lines(io.BufferedReader(gzip.GzipFile(fileobj=file)) if packed else file)
        first = lines.first()
        if not first:
            raise bad(0, "empty")
        if first.startswith(ZIP):
            raise bad(0, "zip")
        if first.startswith(PDF) or b"\0" in first:
            raise bad(0, "no_text_file")
        if first.lstrip()[:1] == b"[":
            raise bad(lines.number, "json_list")
        yield from _json_records(lines) if first.lstrip()[:1] == b"{" else _csv_records(lines, columns)


class _Lines:
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


def _json_records(lines: _Lines) -> Iterator[tuple[int, Any]]:
    for line in lines:
        if line is None:
            yield lines.number, BadRecord("long_line", limit=MAX_LINE_BYTES)
        elif line.strip():
            try:
                yield lines.number, parse_json(line)
            except BadRecord as error:
                yield lines.number, error


def parse_json(line: bytes) -> Any:
    """One JSON value of bounded depth. Raises BadRecord, also for NaN and over-long integers."""
    try:
        value = json.loads(line.decode("utf-8"), parse_constant=_refuse_constant)
    except BadRecord:
        raise
    except UnicodeDecodeError as error:
        raise BadRecord("no_utf8") from error
    except json.JSONDecodeError as error:
        raise BadRecord("no_json", error=error.msg, at=error.pos + 1) from error
    except RecursionError as error:
        raise BadRecord("deep", limit=MAX_DEPTH) from error
    except ValueError as error:  # an integer longer than sys.get_int_max_str_digits()
        raise BadRecord("digits") from error
    _check_depth(value)
    return value


def _refuse_constant(name: str) -> Any:
    raise BadRecord("constant", name=name)


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [inner for outer in level for inner in _inside(outer)]
        if not level:
            return
    raise BadRecord("deep", limit=MAX_DEPTH)


def _inside(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []


def _csv_records(lines: _Lines, columns: Mapping[str, str]) -> Iterator[tuple[int, Any]]:
    def text_lines() -> Iterator[str]:
        for line in lines:
            if line is None:
                raise bad(lines.number, "long_line", limit=MAX_LINE_BYTES)
            try:
                yield line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise bad(lines.number, "no_utf8") from error

    try:
        yield from rows(text_lines(), lambda: lines.number, columns, limit=MAX_LINE_BYTES)
    except BadSheet as error:
        raise bad(error.line, error.key, **error.fields) from error
