"""`distributary usage`: usage by day and channel, read from the database beside the process that owns the home."""

import json
import sqlite3
from contextlib import closing
from typing import Any

import click

from bots.cli.options import Options, pass_options, shared_options, write_out
from core.errors import StorageError, UnknownThing
from core.i18n.messages import money
from core.storage.database import open_read_only
from core.storage.home import Home
from core.usage.reports import usage_by_day

_COUNTS = ("replies", "tokens_in", "tokens_reused", "tokens_out", "jobs", "tokens_trained")
_MONEY = ("gross_nano", "partner_nano")
_COLUMNS = ("day", "channel", *_COUNTS, *(name.removesuffix("_nano") for name in _MONEY))


@click.command()
@click.argument("channel", default="")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@shared_options
@pass_options
def usage(options: Options, channel: str, as_json: bool) -> int:
    """Show what was used, by day and channel."""
    write_out(usage_text(options.home, channel, as_json=as_json))
    return 0


def usage_text(home: Home, channel: str, *, as_json: bool) -> str:
    """Every day's usage of one channel, or of all. Raises UnknownThing, StorageError."""
    try:
        with closing(open_read_only(home.database)) as connection:
            known = [row[0] for row in connection.execute("SELECT name FROM channel ORDER BY name")]
            rows = usage_by_day(connection, channel)
    except sqlite3.Error as error:
        raise StorageError(detail=f"{home.database} cannot be read: {error}") from error
    if channel and channel not in known:
        raise UnknownThing(detail=f"no channel {channel!r}; there are {', '.join(known) or 'none'}", name=channel)
    if as_json:
        return json.dumps(rows, indent=2) + "\n"
    return _table(rows)


def _table(rows: list[dict[str, Any]]) -> str:
    total: dict[str, Any] = {"day": "total", "channel": ""}
    for name in (*_COUNTS, *_MONEY):
        total[name] = sum(row[name] for row in rows)
    lines = [_COLUMNS, *(_cells(row) for row in [*rows, total])]
    widths = [max(len(line[i]) for line in lines) for i in range(len(_COLUMNS))]
    return "".join(_line(line, widths) for line in lines)


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    counts = (f"{row[name]:,}" for name in _COUNTS)
    return (row["day"], row["channel"], *counts, *(money(row[name]) for name in _MONEY))


def _line(cells: tuple[str, ...], widths: list[int]) -> str:
    padded = [
        cell.ljust(width) if index < 2 else cell.rjust(width)
        for index, (cell, width) in enumerate(zip(cells, widths, strict=True))
    ]
    return "  ".join(padded).rstrip() + "\n"
