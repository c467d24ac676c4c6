"""JSON Lines: one object a line, of bounded depth."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from finetune.data.lines import MAX_LINE_BYTES, Lines
from finetune.data.records import BadRecord

MAX_DEPTH = 8


def reads(first: bytes) -> bool:
    return first.lstrip()[:1] == b"{"


def records(lines: Lines, columns: Mapping[str, str]) -> Iterator[tuple[int, Any]]:
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
