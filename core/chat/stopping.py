"""Whose answer a stop reaches: one's own; for an operator, and for whom the bot knows to moderate the place, anybody's.

Runs inside a transaction. Knows no platform.
"""

from __future__ import annotations

from core.channels import bindings, operators
from core.chat import inbox
from core.chat.inbox import InboxRow
from core.commands.table import Call
from core.storage.database import Tx
from core.types import Address, Grant, Kind


def reaches_all(tx: Tx, user_hash: str, channel_id: int, *, moderates: bool) -> bool:
    """Whether this person may stop what others asked for."""
    return moderates or operators.grant_of(tx, user_hash, channel_id) >= Grant.OPERATOR


def reaches_all_at(tx: Tx, at: Address, user_hash: str, *, moderates: bool) -> bool:
    """The same, by the place."""
    channel = bindings.channel_of_person(tx, at.platform, at.account, at.place, user_hash)
    return reaches_all(tx, user_hash, channel.id if channel else 0, moderates=moderates)


def stopped_user(tx: Tx, row: InboxRow) -> str:
    """Whose answer this stop is for; "" is anybody's."""
    return "" if reaches_all_at(tx, row.address, row.user_hash, moderates=row.moderates) else row.user_hash


def stopped_since(tx: Tx, row: InboxRow, channel_id: int) -> bool:
    """Whether this turn was stopped: a stop for it came after it, when the turn before it had ended."""
    stops = [
        one.received_ms
        for one in inbox.controls_after(tx, row)
        if _is_stop(one)
        and (one.user_hash == row.user_hash or reaches_all(tx, one.user_hash, channel_id, moderates=one.moderates))
    ]
    if not stops:
        return False
    before = inbox.turn_before_closed_ms(tx, row)
    return before is None or max(stops) >= before


def _is_stop(row: InboxRow) -> bool:
    """Pressed or typed."""
    return row.kind is Kind.STOP or (isinstance(row.command, Call) and row.command.command.name == "stop")
