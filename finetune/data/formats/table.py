"""A table as text, CSV of any dialect: what no other format reads."""

from collections.abc import Iterator, Mapping
from typing import Any

from finetune.data.lines import MAX_LINE_BYTES, Lines, bad
from finetune.data.sheets import BadSheet, rows


def reads(first: bytes) -> bool:
    return True


def records(lines: Lines, columns: Mapping[str, str]) -> Iterator[tuple[int, Any]]:
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
