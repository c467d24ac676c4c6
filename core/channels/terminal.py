"""The channel of the home's own terminal, whose user operates everything."""

from __future__ import annotations

from core.channels import bindings, directory, operators, partners
from core.storage.database import Tx
from core.types import Limits

TERMINAL, LOCAL_USER = "terminal", "local"


def ensure_terminal(tx: Tx, account: str) -> None:
    """Create the terminal's partner, channel and binding where they are missing, and make its user an operator."""
    if partners.find(tx, partners.OWNER_PARTNER) is None:
        partners.create(tx, partners.OWNER_PARTNER, title="Owner")
    channel = directory.channel_by_name(tx, TERMINAL)
    if channel is None:
        channel = directory.create_channel(tx, TERMINAL, title="Terminal", limits=Limits(per_minute=0, per_hour=0))
    if not bindings.bound_to(tx, TERMINAL, account, ""):
        bindings.bind(tx, TERMINAL, account, "", channel.id)
    operators.grant(tx, tx.cipher.hash_user(TERMINAL, account, LOCAL_USER), None, "terminal", "")
