"""CSV text of any dialect -> records.

The separator (comma, semicolon, tab or bar) is the one under which the header has a question and an answer column.
Quoted cells may hold separators and line breaks; Excel's first line "sep=;" is honoured.
"""

import csv
import re
from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from typing import Any

from finetune.data.records import SHAPES, BadRecord, find_name, pair_of

SEPARATORS = ",;\t|"
_SHOWN = 12  # names of columns
_SAYS_SEPARATOR = re.compile(r'sep=([^\w\s"\0]|\t)\s*', re.IGNORECASE)


class BadSheet(Exception):
    """The table cannot be used; `key` is a message of [data]."""

    def __init__(self, line: int, key: str, **fields: object) -> None:
        super().__init__(key)
        self.line, self.key, self.fields = line, key, fields


def rows(
    lines: Iterator[str], number: Callable[[], int], columns: Mapping[str, str], *, limit: int
) -> Iterator[tuple[int, Any]]:
    """(first line, record); BadRecord in place of a row that does not fit the header.

    `number` returns the number of the line read last; `limit` bounds the characters of a cell. Raises BadSheet.
    """
    csv.field_size_limit(limit)
    head = next(lines)
    said = _SAYS_SEPARATOR.fullmatch(head)
    if said:
        head = next(lines, "")
    delimiter = said[1] if said else _separator(head, columns)
    table = csv.reader(chain([head], lines), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    starts = number()
    while True:
        try:
            row = next(table)
        except StopIteration:
            return
        except csv.Error as error:
            raise BadSheet(starts, "no_csv", error=error) from error
        if header is None:
            header = _header(row, columns, number())
        elif any(cell.strip() for cell in row):
            yield starts, _record(header, row)
        starts = number() + 1


def _separator(head: str, columns: Mapping[str, str]) -> str:
    """The first separator whose header has the needed columns, else the one with most columns."""
    cut = {separator: _cut(head, separator) for separator in SEPARATORS}
    fitting = (separator for separator in SEPARATORS if _fits(cut[separator], columns))
    return next(fitting, max(SEPARATORS, key=lambda separator: len(cut[separator])))


def _cut(head: str, separator: str) -> list[str]:
    try:
        return _names(next(csv.reader([head], delimiter=separator), []))
    except csv.Error:
        return []


def _names(row: list[str]) -> list[str]:
    return [" ".join(cell.split()) for cell in row]


def _fits(names: list[str], columns: Mapping[str, str]) -> bool:
    if columns:
        return all(find_name(names, theirs) for theirs in columns.values())
    known = {name.lower() for name in names}
    return any(known.issuperset(shape) for shape in SHAPES if len(shape) == 2) or pair_of(names) is not None


def _header(row: list[str], columns: Mapping[str, str], line: int) -> list[str]:
    names = _names(row)
    if not _fits(names, columns):
        missing = next((theirs for theirs in columns.values() if not find_name(names, theirs)), "")
        found = ", ".join(name[:40] or "?" for name in names[:_SHOWN])
        raise BadSheet(line, "no_named_column" if missing else "no_columns", name=missing[:40], found=found)
    lower = [name.lower() for name in names if name]
    if len(set(lower)) != len(lower):
        raise BadSheet(line, "same_columns")
    return names if columns else [name.lower() for name in names]


def _record(header: list[str], row: list[str]) -> dict[str, str] | BadRecord:
    if len(row) != len(header):
        return BadRecord("columns", n=len(row), header=len(header))
    return dict(zip(header, row, strict=True))
