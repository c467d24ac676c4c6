"""A data file (JSONL or CSV, plain or gzip, UTF-8) -> conversations and a report by line.

An unusable line is rejected with its reason; an unreadable or too large file is refused as a whole.
"""

import gzip
import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from core.i18n.messages import Lazy
from finetune.data.formats import format_of
from finetune.data.lines import GZIP, Lines, bad
from finetune.data.personal import find
from finetune.data.records import ALIKE, BadRecord, Conversation, read_record

MIN_ROWS = 10
NAMED = 20  # rejected or mended lines listed; the rest is counted
PDF, ZIP = b"%PDF-", b"PK\x03\x04"  # file types often sent by mistake


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
        lines = Lines(io.BufferedReader(gzip.GzipFile(fileobj=file)) if packed else file)
        first = lines.first()
        if not first:
            raise bad(0, "empty")
        if first.startswith(ZIP):
            raise bad(0, "zip")
        if first.startswith(PDF) or b"\0" in first:
            raise bad(0, "no_text_file")
        if first.lstrip()[:1] == b"[":
            raise bad(lines.number, "json_list")
        yield from format_of(first).records(lines, columns)
