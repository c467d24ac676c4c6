"""/usage: a person's own usage, and for operators the channel's as text, chart or table."""

import asyncio
from pathlib import Path

from core import charts
from core.commands.registry import CommandContext, command
from core.commands.table import Call
from core.i18n.messages import money, say
from core.storage.database import Row, Tx
from core.types import Body, Button, Caller, Grant, Outcome
from core.usage.ledger import day_of
from core.usage.reports import DAYS, daily, write_table

_DAY_MS = 86_400_000


@command("usage")
def usage(tx: Tx, caller: Caller, call: Call) -> Outcome:
    """The caller's usage in this channel; for operators the channel's as well."""
    today = day_of(tx.now_ms)
    lines = _own_usage(tx, caller, today)
    if caller.grant < Grant.OPERATOR:
        return Outcome(Body("\n".join(lines)))
    lines += ["", _channel_usage(tx, caller, today)]
    forms = ("chart", "csv")
    buttons = (Button(say(caller.language, f"users.usage_{one}"), "command", f"/usage {one}") for one in forms)
    return Outcome(Body("\n".join(lines), tuple(buttons)))


async def write_chart(context: CommandContext, caller: Caller, call: Call) -> Path:
    rows, path = await _days(context, caller)
    days = [(str(row["day"]), int(row["replies"])) for row in rows]
    return await asyncio.to_thread(charts.day_bars, days, path.with_suffix(".png"))


async def write_csv(context: CommandContext, caller: Caller, call: Call) -> Path:
    rows, path = await _days(context, caller)
    return await asyncio.to_thread(write_table, rows, path.with_suffix(".csv"))


@command("usage", "chart", prepare=write_chart)
def usage_chart(tx: Tx, caller: Caller, call: Call, path: Path) -> Outcome:
    text = say(caller.language, "users.usage_drawn", title=caller.channel.title, days=DAYS)
    return Outcome(Body(text, files=(path,)))


@command("usage", "csv", prepare=write_csv)
def usage_csv(tx: Tx, caller: Caller, call: Call, path: Path) -> Outcome:
    text = say(caller.language, "users.usage_listed", title=caller.channel.title, days=DAYS)
    return Outcome(Body(text, files=(path,)))


async def _days(context: CommandContext, caller: Caller) -> tuple[list[Row], Path]:
    """The channel's last days, and the path of a file for them, without suffix."""
    rows = await context.database.read(lambda tx: daily(tx, caller.channel.id, DAYS))
    return rows, context.home.sent / f"{caller.channel.name}-usage-{rows[-1]['day']}-{caller.inbox_id}.x"


def _own_usage(tx: Tx, caller: Caller, today: str) -> list[str]:
    last = tx.one(
        "SELECT tokens_in, tokens_out FROM generation WHERE user_hash = ? AND channel_id = ? AND state = 'delivered'"
        " ORDER BY started_ms DESC, inbox_id DESC LIMIT 1",
        [caller.user, caller.channel.id],
    )
    if last is None:
        return [say(caller.language, "users.usage_none")]
    month = f"{today[:8]}01"
    return [
        f"- {say(caller.language, 'users.usage_last', **last)}",
        f"- {say(caller.language, 'users.usage_today', **_sums(tx, caller, today))}",
        f"- {say(caller.language, 'users.usage_month', **_sums(tx, caller, month))}",
    ]


def _sums(tx: Tx, caller: Caller, since: str) -> Row:
    """Charges for this person since a day. Replies are charged soon after they begin: older ones are skipped."""
    row = tx.one(
        "SELECT ifnull(sum(CASE kind WHEN 'usage' THEN 1 ELSE -1 END), 0) AS replies,"
        " ifnull(sum(ledger.tokens_in), 0) AS tokens_in, ifnull(sum(ledger.tokens_out), 0) AS tokens_out"
        " FROM generation JOIN ledger ON generation_id = generation.id"
        " WHERE user_hash = ? AND generation.channel_id = ? AND started_ms > ? AND day >= ?",
        [caller.user, caller.channel.id, tx.now_ms - 32 * _DAY_MS, since],
    )
    assert row is not None
    return row


def _channel_usage(tx: Tx, caller: Caller, today: str) -> str:
    names = ("replies", "tokens_in", "tokens_reused", "tokens_out", "gross_nano", "partner_nano")
    of_jobs = ("jobs", "tokens_trained", "jobs_nano")
    sums = ", ".join(f"ifnull(sum({name}), 0) AS {name}" for name in (*names, *of_jobs))
    sql = f"SELECT {sums} FROM usage_daily WHERE channel_id = ? AND day >= ?"
    row = tx.one(sql, [caller.channel.id, f"{today[:8]}01"])
    assert row is not None
    of_replies = {"gross": money(row["gross_nano"] - row["jobs_nano"]), "partner": money(row["partner_nano"])}
    told = say(caller.language, "users.usage_channel", title=caller.channel.title, **row, **of_replies)
    if not row["jobs"]:
        return told
    return f"{told}\n\n{say(caller.language, 'users.usage_jobs', **row, amount=money(row['jobs_nano']))}"
