"""Plain text -> rows of tokens, all in the loss: pre-training data for a new model.

The text is cut at paragraphs into rows as long as allowed; only the last row ends with the end token.
"""

import gzip
import hashlib
import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from core.model.chat_format import TrainingRow
from finetune.data.encode import Row
from finetune.data.lines import GZIP, bad
from finetune.data.reader import Report, check_enough
from finetune.data.records import Conversation

SUFFIXES = (".txt", ".md", ".text", ".txt.gz", ".md.gz")
MAX_BYTES = 64 * 10**6  # unpacked; token ids take 40 times as much memory
_PARAGRAPH = re.compile(r"\n[ \t]*\n\s*")
NOTHING = Conversation((), "")


def is_plain(path: Path) -> bool:
    return path.name.lower().endswith(SUFFIXES)


def read_text(path: Path) -> str:
    """Raises BadDataset for a file that is too large or not UTF-8."""
    with path.open("rb") as file:
        packed = file.read(2) == GZIP
    try:
        with gzip.open(path) if packed else path.open("rb") as stream:
            content = stream.read(MAX_BYTES + 1)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise bad(0, "bad_gzip", error=error) from error
    if len(content) > MAX_BYTES:
        raise bad(0, "large", limit=MAX_BYTES // 10**6)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise bad(content.count(b"\n", 0, error.start) + 1, "no_utf8") from error


def encode_text(text: str, tokenizer: Any, *, max_tokens: int, report: Report) -> list[Row]:
    """Distinct rows of at most max_tokens tokens. Updates `report`; raises BadDataset if there are too few."""
    rows: dict[str, Row] = {}
    for line, ids in _cut(text, tokenizer, max_tokens):
        if len(ids) < 2:
            continue  # a remainder of one token, which nothing predicts
        report.rows += 1
        key = hashlib.sha256(repr(ids).encode()).hexdigest()
        if key in rows:
            report.duplicates += 1
            continue
        rows[key] = Row(TrainingRow(tuple(ids), (True,) * len(ids)), key, line, NOTHING)
    report.used = len(rows)
    check_enough(report)
    return list(rows.values())


def second_half(row: TrainingRow) -> TrainingRow:
    """The row with only its second half in the loss."""
    half = len(row.ids) // 2
    return TrainingRow(row.ids, (False,) * half + (True,) * (len(row.ids) - half))


def behind(row: TrainingRow, other: TrainingRow) -> TrainingRow:
    """The second half of the row after the first half of another."""
    before, own = other.ids[: len(other.ids) // 2], row.ids[len(row.ids) // 2 :]
    return TrainingRow(before + own, (False,) * len(before) + (True,) * len(own))


def _cut(text: str, tokenizer: Any, limit: int) -> Iterator[tuple[int, list[int]]]:
    """(line, ids) of each row."""
    row: list[int] = []
    began = line = 1
    for piece, ids in _paragraphs(text, tokenizer):
        if row and len(row) + len(ids) > limit:
            yield began, row
            row = []
        if not row:
            began = line
        row += ids
        while len(row) > limit:  # one paragraph longer than a row
            yield began, row[:limit]
            row = row[limit:]
        line += piece.count("\n")
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    if row:
        yield began, row + end if len(row) < limit else row


def _paragraphs(text: str, tokenizer: Any) -> Iterator[tuple[str, Sequence[int]]]:
    """Paragraphs with their trailing blank lines. Control tokens in the text are encoded as text."""
    at = 0
    for found in _PARAGRAPH.finditer(text):
        yield (piece := text[at : found.end()]), _encode(piece, tokenizer)
        at = found.end()
    if text[at:].strip():
        yield text[at:], _encode(text[at:], tokenizer)


def _encode(text: str, tokenizer: Any) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True, verbose=False))
