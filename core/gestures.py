"""What people do without a word: a vote, a stop, a group that moves; and what a bot has to say by itself.

Runs inside a transaction. Knows no model and no platform.
"""

from __future__ import annotations

import json
import re

from core.delivery import keep_body, new_delivery
from core.retention import retention_of
from core.store import directory, inbox
from core.store.database import Tx
from core.store.inbox import Taken
from core.texts import duration, say
from core.types import Body, Caller, Kind

QUIET = (Kind.STOP, Kind.EDIT, Kind.MEMBERSHIP)  # nothing is said to these
REASONS = ("untrue", "unhelpful", "other")
_VOTE = re.compile(r"([0-9a-f]{32}):(-?1)(?::([a-z]+))?")


def close(tx: Tx, row: Taken) -> None:
    """Do what a quiet update asks for, and end it."""
    if row.kind is Kind.STOP:
        return inbox.close(tx, row.id, "stop")
    if row.action == "feedback":
        _vote(tx, row)
    elif row.action == "moved":
        directory.move_place(tx, row.address.platform, row.address.account, row.address.place, row.value)
    return inbox.close(tx, row.id, "ignored" if row.kind is Kind.EDIT else "control")


def keep_notice(tx: Tx, row: Taken, caller: Caller) -> None:
    """What a bot itself has to say of a message: `value` is the key of its sentence."""
    kept = duration(caller.language, retention_of(tx).conversation_hours * 3600)
    text = say(caller.language, row.value, title=caller.channel.title, kept=kept)
    keep_body(tx, new_delivery(tx, inbox_id=row.id), Body(text))
    inbox.mark_generated(tx, row.id)


def _vote(tx: Tx, row: Taken) -> None:
    """Keep a thumb, and why; the last one counts. Only the person who was answered has a vote, on a delivered reply."""
    found = _VOTE.fullmatch(row.value)
    if found is None or not tx.value(
        "SELECT 1 FROM generation WHERE id = ? AND user_hash = ? AND state = 'delivered'", [found[1], row.user_hash]
    ):
        return
    reason = found[3] if found[3] in REASONS else ""
    tx.run(
        "INSERT INTO feedback (generation_id, user_hash, vote, at_ms, reason) VALUES (?, ?, ?, ?, ?)"
        " ON CONFLICT DO UPDATE SET vote = excluded.vote, reason = excluded.reason",
        [found[1], row.user_hash, int(found[2]), tx.now_ms, reason],
    )
    if found[2] == "1":
        _keep_example(tx, found[1])
    else:
        tx.run("DELETE FROM example WHERE generation_id = ? AND correction IS NULL", [found[1]])


def _keep_example(tx: Tx, generation_id: str) -> None:
    """A reply that its person liked may be learned from, where they consented: kept sealed, beside the conversation."""
    row = tx.one(
        "SELECT inbox_id, generation.channel_id, generation.user_hash, platform FROM generation"
        " JOIN consent ON consent.user_hash = generation.user_hash AND consent.channel_id = generation.channel_id"
        " JOIN inbox ON inbox.id = inbox_id WHERE generation.id = ? AND started_ms >= granted_ms",
        [generation_id],
    )
    turns = tx.all("SELECT role, text FROM turn WHERE inbox_id = ? ORDER BY id", [row["inbox_id"]]) if row else []
    if row is None or [turn["role"] for turn in turns] != ["user", "assistant"]:
        return
    said = [{"role": turn["role"], "content": tx.cipher.unseal(turn["text"])} for turn in turns]
    tx.run(
        "INSERT OR IGNORE INTO example (generation_id, channel_id, user_hash, platform, shared, said, at_ms)"
        " VALUES (?, ?, ?, ?, 0, ?, ?)",
        [
            generation_id,
            row["channel_id"],
            row["user_hash"],
            row["platform"],
            tx.cipher.seal(json.dumps(said)),
            tx.now_ms,
        ],
    )
