"""Who speaks, where, in which language and lane. Runs inside a transaction; knows no command's work and no model."""

from __future__ import annotations

from dataclasses import replace

from core.channels import bindings, operators, people
from core.chat import conversations
from core.chat.inbox import InboxRow
from core.commands.parser import parse
from core.errors import NotAllowed, UserError
from core.i18n.messages import resolve
from core.storage.database import Tx
from core.types import Caller, Incoming, Kind, Lane


def lane_of(incoming: Incoming) -> Lane:
    """A bot says which lane; a command has its own on every platform, typed or by a button."""
    pressed = incoming.kind is Kind.PRESS and incoming.action == "command"
    text = incoming.value if pressed else incoming.text if incoming.kind is Kind.MESSAGE else ""
    if text.lstrip()[:1] in ("/", "／") and len(text) < 200:
        try:
            return parse(text.strip()).command.lane
        except UserError:
            return incoming.lane
    return incoming.lane


def caller_of(tx: Tx, row: InboxRow) -> Caller:
    """Who is speaking, in which channel and language. Raises NotAllowed where no channel is bound to the place."""
    at = row.address
    channel = bindings.channel_of_person(tx, at.platform, at.account, at.place, row.user_hash)
    language = people.language_of(tx, row.user_hash) or resolve(row.language)
    if channel is None:
        raise NotAllowed("service.no_channel")
    people.touch(tx, row.user_hash, at.platform)
    return Caller(
        user=row.user_hash,
        address=at,
        channel=channel,
        language=language or resolve(channel.language) or "en",
        inbox_id=row.id,
        conversation_id=conversations.conversation_id(tx, replace(at, reply_to=""), channel.id),
        attachments=row.attachments,
        answers=row.answers,
        public=row.public,
        moderates=row.moderates,
        grant=operators.grant_of(tx, row.user_hash, channel.id),
    )
