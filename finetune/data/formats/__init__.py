"""Formats of data sets. Each module is one; adding a format is adding its module.

json_lines.py   one JSON object a line
table.py        CSV of any dialect, and what no other format reads

A module has `reads(first)`, whether a file whose first line is `first` has this format, and `records(lines, columns)`,
which yields (line number, record); the record is a BadRecord if the line cannot be parsed.
"""

from functools import cache
from importlib import import_module
from pkgutil import iter_modules
from types import ModuleType

REST = "table"


def format_of(first: bytes) -> ModuleType:
    """The format of a file by its first line that is not empty."""
    return next(one for one in _formats() if one.reads(first))


@cache
def _formats() -> tuple[ModuleType, ...]:
    names = sorted((one.name for one in iter_modules(__path__)), key=lambda name: (name == REST, name))
    return tuple(import_module(f"{__name__}.{name}") for name in names)
