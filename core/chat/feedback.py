"""What becomes of a thumb and of /correct: votes, and replies that may be learned from. Knows no model and no data set.

A reply is kept to learn from, sealed and with what its person said before it, only where that person allows it: for
all that they say here (/consent on), for this one (asked after a thumb down), or because they correct it themselves.
Runs inside a transaction.
"""

from __future__ import annotations

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
from core.storage import lifecycle
from core.storage.database import Row, Tx, Value
from core.storage.lifecycle import Erasure, Periods, Prune, Stage
from core.types import After, Body, Button, Caller, Outcome

REASONS = ("untrue", "unhelpful", "other")
_VOTE = re.compile(r"([0-9a-f]{32}):(-?1)(?::([a-z]*))?")  # the third part: no other press follows, a reason or not
_SHORT = 8  # of a reply's number, as people see it
_NAMED = re.compile(r"#([0-9a-f]{8})\s+(\S.*)", re.DOTALL)
_MOST, _CUT = 5, 300


@dataclass(frozen=True, slots=True)
class DeliveredReply:
    """A delivered one, and whom it answered.

    `consent_ms`: since when they allow all; 0 where this reply is older, or was refused.
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
    """The reply of this number, whole or its first eight digits, that this person was given."""
    number = typed.removeprefix("#").lower()
    if len(number) not in (_SHORT, 32):
        return None
    found = tx.value(
        "SELECT id FROM generation WHERE user_hash = ? AND substr(id, 1, ?) = ? ORDER BY started_ms DESC LIMIT 1",
        [user_hash, len(number), number],
    )
    return reply_of(tx, found or "")


# --- thumbs ---


def vote(tx: Tx, row: InboxRow) -> bool:
    """Keep a thumb, and why; the last one counts. Only who was answered has a vote. Whether something is to be said.

    After a thumb down, whoever has not allowed all is asked for this one reply: by buttons, where it could be used.
    """
    found = _VOTE.fullmatch(row.value)
    reply = reply_of(tx, found[1]) if found else None
    if found is None or reply is None or reply.user != row.user_hash:
        return False
    reason = found[3] if found[3] in REASONS else ""
    tx.run(
        "INSERT INTO feedback (generation_id, user_hash, vote, at_ms, reason) VALUES (?, ?, ?, ?, ?)"
        " ON CONFLICT DO UPDATE SET vote = excluded.vote, reason = excluded.reason",
        [reply.id, row.user_hash, int(found[2]), tx.now_ms, reason],
    )
    said = _said(tx, reply)
    if not said or reply.platform in training_permission.forbidden(tx):
        return False
    if reply.consent_ms:
        _keep(tx, reply, said, shared=False)
        return False
    if found[2] == "1" or found[3] is None or _example(tx, reply) is not None:
        return False
    language = people.language_of(tx, row.user_hash) or resolve(row.language) or "en"
    buttons = [
        Button(say(language, f"feedback.{one}"), "command", f"/consent reply {reply.id} {one}") for one in ("yes", "no")
    ]
    keep_body(tx, new_delivery(tx, inbox_id=row.id), Body(say(language, "feedback.may_we"), tuple(buttons)))
    inbox.mark_generated(tx, row.id)
    return True


def share(tx: Tx, reply: DeliveredReply) -> None:
    """Keep a reply because its person allows it for this one. Raises BadInput where its text is gone."""
    _mark(tx, reply, refused=False)
    said = _said(tx, reply)
    if not said and _example(tx, reply) is None:
        raise BadInput("feedback.too_late")
    _keep(tx, reply, said, shared=True)


def refuse(tx: Tx, reply: DeliveredReply) -> bool:
    """Nothing is learned from this reply, whatever else its person allows. Whether it may have been until now."""
    _mark(tx, reply, refused=True)
    return bool(tx.run("DELETE FROM example WHERE generation_id = ?", [reply.id]) or reply.consent_ms)


@command("consent", "reply")
def consent_reply(tx: Tx, caller: Caller, call: Call) -> Outcome:
    """For one reply that the caller was given. Withdrawing also erases the data sets that may hold it."""
    reply = own_reply(tx, caller.user, call.arguments["reply"])
    if reply is None:
        raise UnknownThing("feedback.no_reply_of_yours")
    if call.arguments["choice"] == "yes":
        share(tx, reply)
        return Outcome(Body(say(caller.language, "feedback.shared")))
    after = jobs.withdraw(tx, caller.user, reply.channel_id) if refuse(tx, reply) else ()
    return Outcome(Body(say(caller.language, "feedback.not_shared")), tuple(after))


# --- corrections ---


@command("correct")
def correct(tx: Tx, caller: Caller, call: Call) -> Outcome:
    """Keep what should have been answered. Without a text: which replies people have given away, and wait for one.

    What was said elsewhere is not shown where others read. Raises UnknownThing where no reply is meant, BadInput where
    its person does not allow it or its text is gone.
    """
    text = call.arguments.get("text", "").strip()
    if caller.public and (not text or _NAMED.fullmatch(text)):
        raise BadInput("feedback.in_private")
    if not text:
        return Outcome(Body(_waiting(tx, caller)))
    reply, text = _meant(tx, caller, text)
    if reply is None or reply.channel_id != caller.channel.id:
        raise UnknownThing("feedback.no_reply")
    if reply.platform in training_permission.forbidden(tx):
        raise BadInput("feedback.platform_stays_out", platform=reply.platform)
    kept, own = _example(tx, reply), reply.user == caller.user
    if not own and not reply.consent_ms and not (kept and kept["shared"]):
        raise BadInput("feedback.not_allowed")
    if own:
        _mark(tx, reply, refused=False)
    said = _said(tx, reply)
    if kept is None and not said:
        raise BadInput("feedback.too_late")
    _keep(tx, reply, said, shared=own)
    tx.run(
        "UPDATE example SET correction = ?, corrected_by = ? WHERE generation_id = ?",
        [tx.cipher.seal(text), caller.user, reply.id],
    )
    audit.record(tx, caller, "correct", reply.id[:8])
    kept = _example(tx, reply)
    assert kept is not None
    asked = json.loads(tx.cipher.unseal(kept["said"]))[-2]["content"]
    return Outcome(Body("\n".join([say(caller.language, "feedback.corrected"), "", *_fenced(f"{asked} ▶ {text}")])))


def _meant(tx: Tx, caller: Caller, text: str) -> tuple[DeliveredReply | None, str]:
    """The reply that is named by its number, else the one that the command answers, else the last one here."""
    at = caller.address
    if named := _NAMED.fullmatch(text):
        found = tx.value(
            "SELECT generation_id FROM example WHERE channel_id = ? AND substr(generation_id, 1, 8) = ?",
            [caller.channel.id, named[1]],
        )
        return reply_of(tx, found or ""), named[2]
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


def _waiting(tx: Tx, caller: Caller) -> str:
    """What people have given away and nobody has corrected: not what they liked. Oldest first."""
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
    """As it stands, on one line: nobody's markup is ours."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return [fence, " ".join(text.split()), fence]


# --- rows ---


def _example(tx: Tx, reply: DeliveredReply) -> Row | None:
    return tx.one("SELECT shared, said FROM example WHERE generation_id = ?", [reply.id])


def _answer(tx: Tx, reply: DeliveredReply) -> Row | None:
    return tx.one(
        "SELECT id, conversation_id, refused FROM turn WHERE inbox_id = ? AND role = 'assistant'", [reply.inbox_id]
    )


def _mark(tx: Tx, reply: DeliveredReply, *, refused: bool) -> None:
    """The answer and its question, which may be of an earlier message; of a text that is gone there is nothing."""
    answer = _answer(tx, reply)
    if answer is not None:
        conversations.set_refused(tx, answer["conversation_id"], reply.user, answer["id"], refused=refused)


def _said(tx: Tx, reply: DeliveredReply) -> list[dict[str, str]]:
    """The conversation of its person up to this answer, as far as it may be used; empty where its text is gone."""
    answer = _answer(tx, reply)
    if answer is None or answer["refused"]:
        return []
    rows = tx.all(
        "SELECT role, text FROM turn WHERE conversation_id = ? AND user_hash = ? AND id <= ? AND at_ms >= ?"
        " AND NOT refused ORDER BY id DESC LIMIT ?",
        [answer["conversation_id"], reply.user, answer["id"], reply.consent_ms, conversations.MAX_TURNS],
    )
    said = [{"role": row["role"], "content": tx.cipher.unseal(row["text"])} for row in reversed(rows)]
    while said and said[0]["role"] == "assistant":
        said.pop(0)
    return said if [one["role"] for one in said[-2:]] == ["user", "assistant"] else []


def _keep(tx: Tx, reply: DeliveredReply, said: list[dict[str, str]], *, shared: bool) -> None:
    """Once; again it can only become shared. For as long as a data set, from the first time on."""
    tx.run(
        "INSERT INTO example (generation_id, channel_id, user_hash, platform, shared, said, at_ms)"
        " VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO UPDATE SET shared = max(shared, excluded.shared)",
        [
            reply.id,
            reply.channel_id,
            reply.user,
            reply.platform,
            int(shared),
            tx.cipher.seal(json.dumps(said)),
            tx.now_ms,
        ],
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
    return [lifecycle.batch("DELETE FROM example", "example", "generation_id", "at_ms <= ?", kept.dataset)]
