"""What people do without a word: a stop, a vote, a group that moves; and what a bot has to say by itself.

Runs inside a transaction. Knows no model and no platform.
"""

from __future__ import annotations

from core.channels import bindings
from core.chat import conversations, feedback, inbox
from core.chat.inbox import InboxRow
from core.delivery.deliveries import keep_body, new_delivery
from core.i18n.messages import duration, say
from core.jobs import jobs
from core.privacy.retention import retention_of
from core.storage.database import Tx
from core.types import Body, Caller, Kind

QUIET = (Kind.STOP, Kind.EDIT, Kind.MEMBERSHIP)  # nothing is said to these


def close(tx: Tx, row: InboxRow) -> bool:
    """Do what a quiet update asks for, and end it; or keep what is to be said to it, and return True."""
    if row.action == "feedback" and feedback.vote(tx, row):
        return True
    if row.action == "moved":
        for owner in (bindings, conversations, inbox, jobs):
            owner.move_place(tx, row.address.platform, row.address.account, row.address.place, row.value)
    inbox.close(tx, row.id, {Kind.STOP: "stop", Kind.EDIT: "ignored"}.get(row.kind, "control"))
    return False


def keep_notice(tx: Tx, row: InboxRow, caller: Caller) -> None:
    """What a bot itself has to say of a message: `value` is the key of its sentence."""
    kept = duration(caller.language, retention_of(tx).conversation_hours * 3600)
    text = say(caller.language, row.value, title=caller.channel.title, kept=kept)
    keep_body(tx, new_delivery(tx, inbox_id=row.id), Body(text))
    inbox.mark_generated(tx, row.id)
