"""Votes, /consent reply and /correct: which replies become training examples. Inside a transaction.

An example holds a reply and the turns before it, encrypted, and only with its person's consent: for everything in the
channel (/consent on), for this reply (asked after a thumb down), or because they correct it themselves.
"""

import json
import re
from dataclasses import dataclass

from core.channels import audit, people, training_permission
from core.chat import conversations, inbox
from core.chat.inbox import InboxRow
from core.commands.registry import command
from core.commands.table import Call
from core.delivery.deliveries import keep_body, new_delivery
from core.errors import BadInput, UnknownThing
from core.i18n.messages import resolve, say
from core.jobs import jobs
from core.platform import VOTE_REASONS
from core.storage import lifecycle
from core.storage.database import Row, Tx, Value
from core.storage.lifecycle import Erasure, Periods, Prune, Stage
from core.types import After, Body, Button, Caller, Outcome

_VOTE = re.compile(r"([0-9a-f]{32}):(-?1)(?::([a-z]*))?")  # reply:vote:reason; no third part: a reason may follow
_NAMED = re.compile(r"#([0-9a-f]{8})\s+(\S.*)", re.DOTALL)
_MOST, _CUT = 5, 300


@dataclass(frozen=True, slots=True)
class DeliveredReply:
    """A delivered reply and the person who asked.

    `consent_ms`: since when that person consents to everything; 0 where the reply is older, or was refused.
    """

    id: str
    inbox_id: int
    channel_id: int
    user: str
    platform: str
    consent_ms: int


def reply_of(tx: Tx, generation_id: str) -> DeliveredReply | None:
    row = tx.one(
        "SELECT generation.id, inbox_id, generation.channel_id, generation.user_hash, platform,"
        " CASE WHEN started_ms >= granted_ms AND NOT EXISTS"
        " (SELECT 1 FROM turn WHERE turn.inbox_id = generation.inbox_id AND refused)"
        " THEN granted_ms ELSE 0 END AS consent_ms"
        " FROM generation JOIN inbox ON inbox.id = inbox_id LEFT JOIN consent"
        " ON consent.user_hash = generation.user_hash AND consent.channel_id = generation.channel_id"
        " WHERE generation.id = ? AND generation.state = 'delivered'",
        [generation_id],
    )
    return DeliveredReply(*row.values()) if row else None


def own_reply(tx: Tx, user_hash: str, typed: str) -> DeliveredReply | None:
    """This person's reply of that number (all digits, or the first eight)."""
    number = typed.removeprefix("#").lower()
    if len(number) not in (8, 32):
        return None
    sql = "SELECT id FROM generation WHERE user_hash = ? AND substr(id, 1, ?) = ? ORDER BY started_ms DESC LIMIT 1"
    return reply_of(tx, tx.value(sql, [user_hash, len(number), number]) or "")


# --- thumbs ---


def vote(tx: Tx, row: InboxRow) -> bool:
    """Store the vote of the person who asked, with its reason; the last one counts.

    True where a question was stored: after a thumb down without general consent, whether this reply may be used.
    """
    found = _VOTE.fullmatch(row.value)
    reply = reply_of(tx, found[1]) if found else None
    if found is None or reply is None or reply.user != row.user_hash:
        return False
    reason = found[3] if found[3] in VOTE_REASONS else ""
    tx.run(
        "INSERT INTO feedback (generation_id, user_hash, vote, at_ms, reason) VALUES (?, ?, ?, ?, ?)"
        " ON CONFLICT DO UPDATE SET vote = excluded.vote, reason = excluded.reason",
        [reply.id, row.user_hash, int(found[2]), tx.now_ms, reason],
    )
    turns = _turns(tx, reply)
    if not turns or reply.platform in training_permission.forbidden(tx):
        return False
    if reply.consent_ms:
        _keep(tx, reply, turns, shared=False)
        return False
    if found[2] == "1" or found[3] is None or _example(tx, reply) is not None:
        return False
    language = people.language_of(tx, row.user_hash) or resolve(row.language) or "en"
    told = ((say(language, f"feedback.{one}"), f"/consent reply {reply.id} {one}") for one in ("yes", "no"))
    buttons = tuple(Button(label, "command", line) for label, line in told)
    keep_body(tx, new_delivery(tx, inbox_id=row.id), Body(say(language, "feedback.may_we"), buttons))
    inbox.mark_generated(tx, row.id)
    return True


@command("consent", "reply")
def consent_reply(tx: Tx, caller: Caller, call: Call) -> Outcome:
    """Consent for one of the caller's replies. Raises UnknownThing, or BadInput where its text is gone.

    Withdrawing it excludes the reply whatever the general consent, and erases the data sets that may hold it.
    """
    reply = own_reply(tx, caller.user, call.arguments["reply"])
    if reply is None:
        raise UnknownThing("feedback.no_reply_of_yours")
    shares = call.arguments["choice"] == "yes"
    _set_refused(tx, reply, refused=not shares)
    if not shares:
        used = tx.run("DELETE FROM example WHERE generation_id = ?", [reply.id]) or reply.consent_ms
        after = jobs.withdraw(tx, caller.user, reply.channel_id) if used else ()
        return Outcome(Body(say(caller.language, "feedback.not_shared")), tuple(after))
    turns = _turns(tx, reply)
    if not turns and _example(tx, reply) is None:
        raise BadInput("feedback.too_late")
    _keep(tx, reply, turns, shared=True)
    return Outcome(Body(say(caller.language, "feedback.shared")))


# --- corrections ---


@command("correct")
def correct(tx: Tx, caller: Caller, call: Call) -> Outcome:
    """Store the right answer to a reply; without a text, list the shared replies that wait for one.

    In public places neither lists nor names replies from elsewhere. Raises UnknownThing where no reply is meant,
    BadInput without consent or where the text is gone.
    """
    text = call.arguments.get("text", "").strip()
    if caller.public and (not text or _NAMED.fullmatch(text)):
        raise BadInput("feedback.in_private")
    if not text:
        return Outcome(Body(_uncorrected(tx, caller)))
    reply, text = _target(tx, caller, text)
    if reply is None or reply.channel_id != caller.channel.id:
        raise UnknownThing("feedback.no_reply")
    if reply.platform in training_permission.forbidden(tx):
        raise BadInput("feedback.platform_stays_out", platform=reply.platform)
    kept, own = _example(tx, reply), reply.user == caller.user
    if not own and not reply.consent_ms and not (kept and kept["shared"]):
        raise BadInput("feedback.not_allowed")
    if own:
        _set_refused(tx, reply, refused=False)
    turns = _turns(tx, reply)
    if kept is None and not turns:
        raise BadInput("feedback.too_late")
    _keep(tx, reply, turns, shared=own)
    sql = "UPDATE example SET correction = ?, corrected_by = ? WHERE generation_id = ?"
    tx.run(sql, [tx.cipher.seal(text), caller.user, reply.id])
    audit.record(tx, caller, "correct", reply.id[:8])
    kept = _example(tx, reply)
    assert kept is not None
    asked = json.loads(tx.cipher.unseal(kept["said"]))[-2]["content"]
    return Outcome(Body("\n".join([say(caller.language, "feedback.corrected"), "", *_fenced(f"{asked} ▶ {text}")])))


def _target(tx: Tx, caller: Caller, text: str) -> tuple[DeliveredReply | None, str]:
    """The reply that is named by its number, else the one that the message replies to, else the last one here."""
    at = caller.address
    if named := _NAMED.fullmatch(text):
        sql = "SELECT generation_id FROM example WHERE channel_id = ? AND substr(generation_id, 1, 8) = ?"
        return reply_of(tx, tx.value(sql, [caller.channel.id, named[1]]) or ""), named[2]
    if caller.answers:
        found = tx.value(
            "SELECT generation.id FROM part JOIN delivery ON delivery.id = delivery_id"
            " JOIN generation ON generation.inbox_id = delivery.inbox_id JOIN inbox ON inbox.id = generation.inbox_id"
            " WHERE receipt = ? AND platform = ? AND account = ? AND place = ?",
            [caller.answers, at.platform, at.account, at.place],
        )
    else:
        found = tx.value(
            "SELECT generation.id FROM generation JOIN inbox ON inbox.id = inbox_id WHERE platform = ? AND account = ?"
            " AND place = ? AND conversation = ? AND generation.state = 'delivered' ORDER BY inbox_id DESC LIMIT 1",
            [at.platform, at.account, at.place, at.conversation],
        )
    return reply_of(tx, found or ""), text


def _uncorrected(tx: Tx, caller: Caller) -> str:
    """The shared replies without a thumb up or a correction, oldest first."""
    forbidden = training_permission.forbidden(tx)
    rows = tx.all(
        "SELECT example.generation_id, said, ifnull(reason, '') AS reason FROM example"
        " LEFT JOIN feedback ON feedback.generation_id = example.generation_id"
        " AND feedback.user_hash = example.user_hash"
        " WHERE example.channel_id = ? AND correction IS NULL AND ifnull(vote, -1) = -1"
        f" AND platform NOT IN ({', '.join('?' * len(forbidden))}) ORDER BY example.at_ms LIMIT ?",
        [caller.channel.id, *forbidden, _MOST],
    )
    if not rows:
        return say(caller.language, "feedback.none_waits")
    lines = [say(caller.language, "feedback.waiting")]
    for row in rows:
        *_, asked, answer = json.loads(tx.cipher.unseal(row["said"]))
        why = say(caller.language, f"feedback.reason_{row['reason']}") if row["reason"] else ""
        lines += ["", f"**#{row['generation_id'][:8]}** {why}".rstrip()]
        lines += _fenced(f"{_cut(asked['content'])} ▶ {_cut(answer['content'])}")
    return "\n".join(lines)


def _cut(text: str) -> str:
    return text if len(text) <= _CUT else f"{text[:_CUT]}…"


def _fenced(text: str) -> list[str]:
    """Text of others on one line, its markup inactive."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return [fence, " ".join(text.split()), fence]


# --- rows ---


def _example(tx: Tx, reply: DeliveredReply) -> Row | None:
    return tx.one("SELECT shared, said FROM example WHERE generation_id = ?", [reply.id])


def _answer(tx: Tx, reply: DeliveredReply) -> Row | None:
    sql = "SELECT id, conversation_id, refused FROM turn WHERE inbox_id = ? AND role = 'assistant'"
    return tx.one(sql, [reply.inbox_id])


def _set_refused(tx: Tx, reply: DeliveredReply, *, refused: bool) -> None:
    """Mark the answer and its question, where their text still exists."""
    if answer := _answer(tx, reply):
        conversations.set_refused(tx, answer["conversation_id"], reply.user, answer["id"], refused=refused)


def _turns(tx: Tx, reply: DeliveredReply) -> list[dict[str, str]]:
    """The turns of its person up to this answer that may be used; empty where its text is gone."""
    answer = _answer(tx, reply)
    if answer is None or answer["refused"]:
        return []
    rows = tx.all(
        "SELECT role, text FROM turn WHERE conversation_id = ? AND user_hash = ? AND id <= ? AND at_ms >= ?"
        " AND NOT refused ORDER BY id DESC LIMIT ?",
        [answer["conversation_id"], reply.user, answer["id"], reply.consent_ms, conversations.MAX_TURNS],
    )
    turns = [{"role": row["role"], "content": tx.cipher.unseal(row["text"])} for row in reversed(rows)]
    while turns and turns[0]["role"] == "assistant":
        turns.pop(0)
    return turns if [one["role"] for one in turns[-2:]] == ["user", "assistant"] else []


def _keep(tx: Tx, reply: DeliveredReply, turns: list[dict[str, str]], *, shared: bool) -> None:
    """Store once, with the time of the first call; a repeat can only set `shared`."""
    said = tx.cipher.seal(json.dumps(turns))
    tx.run(
        "INSERT INTO example (generation_id, channel_id, user_hash, platform, shared, said, at_ms)"
        " VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO UPDATE SET shared = max(shared, excluded.shared)",
        [reply.id, reply.channel_id, reply.user, reply.platform, int(shared), said, tx.now_ms],
    )


@lifecycle.erases(Stage.TEXT)
def _erase(tx: Tx, erasure: Erasure) -> None:
    who: list[Value] = [erasure.user_hash, erasure.until_ms]
    tx.run("DELETE FROM feedback WHERE user_hash = ? AND at_ms <= ?", who)
    tx.run("DELETE FROM example WHERE user_hash = ? AND at_ms <= ?", who)
    tx.run("UPDATE example SET correction = NULL, corrected_by = NULL WHERE corrected_by = ? AND at_ms <= ?", who)


@lifecycle.withdraws
def _withdraw(tx: Tx, user_hash: str, channel_id: int) -> tuple[After, ...]:
    tx.run("DELETE FROM example WHERE user_hash = ? AND channel_id = ?", [user_hash, channel_id])
    return ()


@lifecycle.prunes
def _prunes(kept: Periods) -> list[Prune]:
    return [lifecycle.batch("DELETE FROM example", "at_ms <= ?", kept.dataset, key="generation_id")]
