"""Who may stop a reply: its author; operators and the moderators of the place may stop any. Inside a transaction."""

from core.channels import bindings, operators
from core.chat import inbox
from core.chat.inbox import InboxRow
from core.commands.table import Call
from core.storage.database import Tx
from core.types import Grant, Kind


def may_stop_all(tx: Tx, user_hash: str, channel_id: int, *, moderates: bool) -> bool:
    """Whether this person may stop other people's replies."""
    return moderates or operators.grant_of(tx, user_hash, channel_id) >= Grant.OPERATOR


def stopped_user(tx: Tx, row: InboxRow) -> str:
    """Whose reply this stop applies to; "" is anybody's."""
    at = row.address
    channel = bindings.channel_of_person(tx, at.platform, at.account, at.place, row.user_hash)
    everybody = may_stop_all(tx, row.user_hash, channel.id if channel else 0, moderates=row.moderates)
    return "" if everybody else row.user_hash


def stopped_since(tx: Tx, row: InboxRow, channel_id: int) -> bool:
    """Whether a stop for this turn was accepted after it, once the turn before it had ended."""
    stops = [
        one.received_ms
        for one in inbox.controls_after(tx, row)
        if (one.kind is Kind.STOP or (isinstance(one.command, Call) and one.command.command.name == "stop"))
        and (one.user_hash == row.user_hash or may_stop_all(tx, one.user_hash, channel_id, moderates=one.moderates))
    ]
    before = inbox.turn_before_closed_ms(tx, row) if stops else None
    return bool(stops) and (before is None or max(stops) >= before)
