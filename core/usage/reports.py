"""A channel's usage of the last days, as rows and as a CSV file."""

import csv
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from core import files
from core.storage.database import Row, Tx
from core.usage.ledger import day_of

DAYS = 30
_DAY_MS = 86_400_000
_COUNTS = ("replies", "tokens_in", "tokens_reused", "tokens_out", "gross_nano", "partner_nano")
_OF_JOBS = ("jobs", "tokens_trained", "jobs_nano")


def daily(tx: Tx, channel_id: int, count: int) -> list[Row]:
    """One row for each of the last `count` days, oldest first; zeros where nothing was used."""
    sums = ", ".join(f"sum({name}) AS {name}" for name in (*_COUNTS, *_OF_JOBS))
    days = [day_of(tx.now_ms - back * _DAY_MS) for back in reversed(range(count))]
    sql = f"SELECT day, {sums} FROM usage_daily WHERE channel_id = ? AND day >= ? GROUP BY day"
    by_day = {row["day"]: row for row in tx.all(sql, [channel_id, days[0]])}
    return [by_day.get(day, {"day": day, **dict.fromkeys((*_COUNTS, *_OF_JOBS), 0)}) for day in days]


def usage_by_day(connection: sqlite3.Connection, channel: str) -> list[dict[str, Any]]:
    """Usage of each day and channel, oldest first; "" as the channel is all of them. Raises sqlite3.Error."""
    sums = ", ".join(f"sum(usage_daily.{name}) AS {name}" for name in (*_COUNTS, "owner_nano", *_OF_JOBS))
    connection.row_factory = sqlite3.Row
    rows = connection.execute(
        f"SELECT day, channel.name AS channel, partner.name AS partner, {sums} FROM usage_daily"
        " JOIN channel ON channel.id = channel_id JOIN partner ON partner.id = partner_id"
        " WHERE ? IN ('', channel.name) GROUP BY day, channel.id ORDER BY day, channel.name",
        [channel],
    )
    return [dict(row) for row in rows]


def totals(tx: Tx, most: int, other: str) -> list[Row]:
    """Sums of all times by channel; channels beyond the first `most` are summed under the name `other`."""
    return tx.all(
        "SELECT CASE WHEN channel.id IN (SELECT id FROM channel ORDER BY id LIMIT ?) THEN channel.name ELSE ? END"
        " AS name, sum(replies) AS replies, sum(jobs) AS jobs, sum(gross_nano) AS gross, sum(partner_nano) AS partner"
        " FROM usage_daily JOIN channel ON channel.id = channel_id GROUP BY 1",
        [most, other],
    )


def write_table(rows: Sequence[Row], path: Path) -> Path:
    """Write the rows as CSV. Amounts are nano-units of the currency, unrounded."""
    with files.replacing(path) as aside, aside.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["day", *_COUNTS, *_OF_JOBS])
        writer.writerows([row["day"], *(row[name] for name in (*_COUNTS, *_OF_JOBS))] for row in rows)
    return path
