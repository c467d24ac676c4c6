"""What everyone's commands do: help, new, stop, retry, usage, language, whoami, claim. Knows no model and no bot."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from core.channels import audit, bindings, operators, people
from core.channels.commands import Handler
from core.chat import conversations
from core.chat.stopping import reaches_all
from core.commands.help import help_text
from core.commands.table import Call
from core.errors import BadInput
from core.i18n.messages import duration, language_name, languages, money, resolve, say
from core.privacy.retention import retention_of
from core.storage.database import Row, Tx
from core.types import AnswerAgain, Body, Button, Caller, ForgetMemory, Grant, Outcome, StopReply
from core.usage.ledger import day_of
from core.usage.reports import DAYS

_DAY_MS = 86_400_000


def start(tx: Tx, caller: Caller, call: Call) -> Outcome:
    """Say who answers here. The payload of a channel's link brings the person to that channel."""
    at, payload = caller.address, call.arguments.get("link", "")
    own = tx.cipher.hash_user(at.platform, at.account, at.place) == caller.user
    linked = bindings.channel_of_link(tx, at.platform, at.account, payload) if payload and own else None
    if linked is not None and linked.id != caller.channel.id:
        people.came_by_link(tx, caller.user, at.platform, linked.id)
    channel = linked or caller.channel
    language = people.language_of(tx, caller.user) or caller.language
    kept = duration(language, retention_of(tx).conversation_hours * 3600)
    questions = tuple(Button(question, "say", question) for question in channel.questions)
    return Outcome(Body(say(language, "users.hello", title=channel.title, kept=kept), questions))


def show_help(tx: Tx, caller: Caller, call: Call) -> Outcome:
    grant = operators.grant_of(tx, caller.user, caller.channel.id)
    return Outcome(Body(help_text(caller.language, grant, call.arguments.get("command", ""))))


def new(tx: Tx, caller: Caller, call: Call) -> Outcome:
    conversations.restart(tx, caller.conversation_id)
    forget = ForgetMemory(caller.channel.name, str(caller.conversation_id))
    return Outcome(Body(say(caller.language, "users.new")), (forget,))


def stop(tx: Tx, caller: Caller, call: Call) -> Outcome:
    """The answer that is being written here: the caller's own; for those who may, anybody's (core.chat.stopping)."""
    at = caller.address
    asked_by = tx.value(
        "SELECT user_hash FROM inbox WHERE platform = ? AND account = ? AND place = ? AND conversation = ?"
        " AND lane = 'turn' AND state = 'running'",
        [at.platform, at.account, at.place, at.conversation],
    )
    everybody = reaches_all(tx, caller.user, caller.channel.id, moderates=caller.moderates)
    if asked_by is None:
        key = "users.nothing_to_stop"
    else:
        key = "users.stop" if everybody or asked_by == caller.user else "users.not_yours_to_stop"
    return Outcome(Body(say(caller.language, key)), (StopReply("" if everybody else caller.user),))


def retry(tx: Tx, caller: Caller, call: Call) -> Outcome:
    """Raises BadInput where there is no question to answer again."""
    asked = "SELECT 1 FROM turn WHERE conversation_id = ? AND role = 'user'"
    if not tx.value(asked, [caller.conversation_id]):
        raise BadInput("service.nothing_to_retry")
    return Outcome(Body(""), (AnswerAgain(),))


def usage(tx: Tx, caller: Caller, call: Call) -> Outcome:
    """The caller's own, in this channel; for its operators the channel's as well."""
    today = day_of(tx.now_ms)
    lines = _own_usage(tx, caller, today)
    if operators.grant_of(tx, caller.user, caller.channel.id) < Grant.OPERATOR:
        return Outcome(Body("\n".join(lines)))
    lines += ["", _channel_usage(tx, caller, today)]
    forms = ("chart", "csv")
    buttons = (Button(say(caller.language, f"users.usage_{one}"), "command", f"/usage {one}") for one in forms)
    return Outcome(Body("\n".join(lines), tuple(buttons)))


def usage_file(tx: Tx, caller: Caller, call: Call) -> Outcome:
    """The file that core.usage.reports has made: a chart, or the same days as a table."""
    key = "users.usage_drawn" if call.form.word == "chart" else "users.usage_listed"
    text = say(caller.language, key, title=caller.channel.title, days=DAYS)
    path = call.arguments.get("file")
    return Outcome(Body(text, files=(Path(path),) if path else ()))


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
    """What was charged to this person's questions from that day on. A reply is booked soon after it began."""
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
    row = tx.one(
        f"SELECT {sums} FROM usage_daily WHERE channel_id = ? AND day >= ?", [caller.channel.id, f"{today[:8]}01"]
    )
    assert row is not None
    of_replies = {"gross": money(row["gross_nano"] - row["jobs_nano"]), "partner": money(row["partner_nano"])}
    told = say(caller.language, "users.usage_channel", title=caller.channel.title, **row, **of_replies)
    if not row["jobs"]:
        return told
    return f"{told}\n\n{say(caller.language, 'users.usage_jobs', **row, amount=money(row['jobs_nano']))}"


def whoami(tx: Tx, caller: Caller, call: Call) -> Outcome:
    grant = operators.grant_of(tx, caller.user, caller.channel.id)
    text = say(
        caller.language,
        "users.whoami",
        user=caller.user[:12],
        platform=caller.address.platform,
        title=caller.channel.title,
        channel=caller.channel.name,
        rights=say(caller.language, f"users.rights_{grant.name.lower()}"),
        language=language_name(caller.language),
    )
    return Outcome(Body(text.strip()))


def language(tx: Tx, caller: Caller, call: Call) -> Outcome:
    """Raises BadInput for a language that there is no file of."""
    typed = call.arguments.get("language", "")
    codes = ", ".join((*languages(), "auto"))
    if not typed:
        name = language_name(caller.language)
        return Outcome(Body(say(caller.language, "users.language_is", name=name, codes=codes)))
    chosen = resolve(typed)
    if not chosen and typed.lower() != "auto":
        raise BadInput("users.language_unknown", typed=typed[:40], codes=codes)
    people.set_language(tx, caller.user, caller.address.platform, chosen)
    if not chosen:
        return Outcome(Body(say(resolve(caller.channel.language) or caller.language, "users.language_auto")))
    return Outcome(Body(say(chosen, "users.language_set", name=language_name(chosen))))


def claim(tx: Tx, caller: Caller, call: Call) -> Outcome:
    """Raises BadInput for a code that is wrong, used or too old: which of these is not said."""
    claimed = operators.claim(tx, call.arguments["code"], caller.user)
    if claimed is None:
        raise BadInput("users.claim_bad")
    channel = tx.value("SELECT name FROM channel WHERE id = ?", [claimed.channel_id])
    audit.record(tx, caller, "claim", channel or "all", None, {"operator": caller.user, "label": claimed.label})
    key = "users.claim_all" if claimed.channel_id is None else "users.claim_channel"
    return Outcome(Body(say(caller.language, key, title=claimed.title)))


HANDLERS: Mapping[tuple[str, str], Handler] = {
    ("start", ""): start,
    ("help", ""): show_help,
    ("new", ""): new,
    ("stop", ""): stop,
    ("retry", ""): retry,
    ("usage", ""): usage,
    ("usage", "chart"): usage_file,
    ("usage", "csv"): usage_file,
    ("whoami", ""): whoami,
    ("language", ""): language,
    ("claim", ""): claim,
}
