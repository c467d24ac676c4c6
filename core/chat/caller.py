"""The author of a message: channel, language, conversation and grant. Inside a transaction."""

from dataclasses import replace

from core.channels import bindings, operators, people
from core.chat import conversations
from core.chat.inbox import InboxRow
from core.errors import NotAllowed
from core.i18n.messages import resolve
from core.storage.database import Tx
from core.types import Caller


def caller_of(tx: Tx, row: InboxRow) -> Caller:
    """Raises NotAllowed where no channel is bound to the place."""
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
