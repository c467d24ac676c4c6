"""A channel's usage of the last days as a picture or a table: files for a chat. Knows no sentence.

Runs before a command's transaction, because it writes a file.
"""

from __future__ import annotations

import asyncio
import csv
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from core import charts, files
from core.channels import operators
from core.commands.table import Call
from core.storage.database import Database, Row, Tx
from core.storage.home import Home
from core.types import Caller, Grant
from core.usage.ledger import day_of

DAYS = 30
_DAY_MS = 86_400_000
_COUNTS = ("replies", "tokens_in", "tokens_reused", "tokens_out", "gross_nano", "partner_nano")
_OF_JOBS = ("jobs", "tokens_trained", "jobs_nano")


async def prepare_usage(home: Home, database: Database, caller: Caller, call: Call) -> Call:
    """For `/usage chart` and `/usage csv`: the same call with the path of the file as `file`. Others as they are."""
    if call.key not in (("usage", "chart"), ("usage", "csv")):
        return call
    grant = await database.read(lambda tx: operators.grant_of(tx, caller.user, caller.channel.id))
    if grant < Grant.OPERATOR:
        return call  # refused and audited where all commands are
    rows = await database.read(lambda tx: daily(tx, caller.channel.id, DAYS))
    name = f"{caller.channel.name}-usage-{rows[-1]['day']}-{caller.inbox_id}"
    if call.form.word == "csv":
        path = await asyncio.to_thread(_table, rows, home.sent / f"{name}.csv")
    else:
        days = [(str(row["day"]), int(row["replies"])) for row in rows]
        path = await asyncio.to_thread(charts.day_bars, days, home.sent / f"{name}.png")
    return replace(call, arguments={**call.arguments, "file": str(path)})


def daily(tx: Tx, channel_id: int, count: int) -> list[Row]:
    """One row for each of the last `count` days, oldest first, also where nothing was used."""
    sums = ", ".join(f"sum({name}) AS {name}" for name in (*_COUNTS, *_OF_JOBS))
    days = [day_of(tx.now_ms - back * _DAY_MS) for back in reversed(range(count))]
    found = tx.all(
        f"SELECT day, {sums} FROM usage_daily WHERE channel_id = ? AND day >= ? GROUP BY day", [channel_id, days[0]]
    )
    by_day = {row["day"]: row for row in found}
    return [by_day.get(day, {"day": day, **dict.fromkeys((*_COUNTS, *_OF_JOBS), 0)}) for day in days]


def _table(rows: Sequence[Row], path: Path) -> Path:
    """Amounts in billionths of the currency, as the ledger has them: nothing is rounded."""
    with files.replacing(path) as aside, aside.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["day", *_COUNTS, *_OF_JOBS])
        writer.writerows([row["day"], *(row[name] for name in (*_COUNTS, *_OF_JOBS))] for row in rows)
    return path
