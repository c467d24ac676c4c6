"""Telegram updates -> Incoming, by aiogram's dispatcher.

Updates that are not for this bot give no Incoming: group messages that do not address it, other bots, service messages.
"""

import logging
import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from aiogram import Bot, Dispatcher, F, Router
from aiogram.enums import ChatMemberStatus, ChatType
from aiogram.exceptions import ClientDecodeError, TelegramAPIError
from aiogram.types import (
    CallbackQuery,
    ChatMemberUpdated,
    InaccessibleMessage,
    InlineKeyboardMarkup,
    Message,
    MessageGenerationStopped,
    Update,
    User,
)
from cachetools import LRUCache, TTLCache
from pydantic import ValidationError

from bots.shared.incoming import notice
from bots.shared.incoming import press as pressed
from bots.telegram.addresses import PLATFORM, conversation, receipt, topic_of
from bots.telegram.sending.api import RawMember
from bots.telegram.sending.buttons import action_of
from core.commands.parser import is_command, read
from core.commands.table import BY_NAME, Call
from core.errors import AppError, BadCommand
from core.types import Address, Attachment, Grant, Incoming, Kind, Lane

log = logging.getLogger(__name__)
ALLOWED = ["message", "edited_message", "callback_query", "my_chat_member", "stopped_message_generation"]
_GROUPS = (ChatType.GROUP, ChatType.SUPERGROUP)
_IN, _OUT = (ChatMemberStatus.MEMBER, ChatMemberStatus.ADMINISTRATOR), (ChatMemberStatus.LEFT, ChatMemberStatus.KICKED)
_ADMINS = (ChatMemberStatus.CREATOR, ChatMemberStatus.ADMINISTRATOR)
_ADMIN_KNOWN_S = 60.0
_QUOTE = 1_000
_MEDIA = "document photo video audio voice animation sticker video_note location contact poll dice story".split()
_COMMAND = re.compile(r"/([A-Za-z0-9_]{1,32})(?:@([A-Za-z0-9_]+))?(?=\s|$)")


class UnreadableUpdate(Exception):
    """An update that cannot be parsed."""


@dataclass(frozen=True, slots=True)
class ReadUpdate:
    """A parsed update. `press` is the callback query to be answered, `album` the media group."""

    incoming: Incoming | None
    press: CallbackQuery | None = None
    album: str = ""


class UpdateReader:
    """The reader of one account. `me` is the bot's own user, `grant` that of BotService."""

    def __init__(self, bot: Bot, me: User, account: str, grant: Callable[[Address, str], Awaitable[Grant]]) -> None:
        self._bot, self._me, self._account, self._grant = bot, me, account, grant
        self._admins: TTLCache[tuple[int, int], bool] = TTLCache(1_000, _ADMIN_KNOWN_S)
        self._pressers: LRUCache[tuple[int, int], int] = LRUCache(1_000)  # message -> who last pressed its buttons
        router = Router(name=account)
        router.message.register(self._service, F.migrate_to_chat_id)
        router.message.register(self._private, F.chat.type == ChatType.PRIVATE)
        router.message.register(self._group, F.chat.type.in_(_GROUPS))
        router.edited_message.register(self._edited)
        router.callback_query.register(self._press)
        router.my_chat_member.register(self._membership)
        router.stopped_message_generation.register(self._stopped)
        self._dispatcher = Dispatcher(disable_fsm=True)
        self._dispatcher.include_router(router)

    async def read(self, raw: Mapping[str, Any]) -> ReadUpdate:
        """Raises UnreadableUpdate only."""
        try:
            update = Update.model_validate(raw, context={"bot": self._bot})
            incoming = await self._dispatcher.feed_update(self._bot, update, key=str(update.update_id))
        except ValidationError as error:
            raise UnreadableUpdate(f"{error.error_count()} fields") from None
        except Exception as error:
            log.exception("telegram.update_failed", extra={"account": self._account})
            raise UnreadableUpdate(type(error).__name__) from None
        taken = incoming if isinstance(incoming, Incoming) else None
        message = update.message
        return ReadUpdate(taken, update.callback_query, (message.media_group_id or "") if message else "")

    # --- handlers ---

    async def _service(self, message: Message, key: str) -> Incoming:
        """A group became a supergroup, with another id."""
        return self._quiet(message, key, Kind.MEMBERSHIP, "moved", str(message.migrate_to_chat_id))

    async def _private(self, message: Message, key: str) -> Incoming | None:
        if not _has_content(message) or _is_bot(message):
            return None
        return self._incoming(message, key, _text(message))

    async def _group(self, message: Message, key: str) -> Incoming | None:
        """A message that mentions the bot, replies to it or is one of its commands."""
        if not _has_content(message) or message.is_automatic_forward or _is_bot(message):
            return None
        text = _text(message)
        command = _COMMAND.match(text)
        if command is not None:
            mine = command[2].lower() == self._name if command[2] else command[1].lower() in BY_NAME
            if not mine:
                return None
            text = f"/{command[1]}{'' if command[1].lower() == 'start' else text[command.end() :]}"
        else:
            named, text = self._unnamed(message, text)
            if not named and not self._answers_me(message):
                return None
        call = read(text)
        if _needs_grant(call) and not await self._is_admin(message):
            return self._incoming(message, key, "", notice="telegram.operators_in_private")
        moderates = isinstance(call, Call) and call.command.name == "stop" and await self._is_admin(message)
        return replace(self._incoming(message, key, text), moderates=moderates)

    async def _edited(self, message: Message, key: str) -> Incoming | None:
        """An edit runs no command and gets no second reply."""
        if message.chat.type != ChatType.PRIVATE or _is_bot(message):
            return None
        return self._quiet(message, key, Kind.EDIT)

    async def _press(self, press: CallbackQuery, key: str) -> Incoming | None:
        found, message = action_of(press.data or ""), press.message
        if found is None or message is None:
            return None
        (action, value), label = found, _label(message, press.data or "")
        if action == "say" and value.startswith("#"):
            value = label or value
        topic = None if isinstance(message, InaccessibleMessage) else topic_of(message)
        group = message.chat.type != ChatType.PRIVATE
        if group and _needs_grant(read(value)) and not await self._admin(message, press.from_user.id):
            return None
        moderates = False
        if group and action == "stop" and (asker := self._asker(message)) != press.from_user.id:
            moderates = await self._admin(message, press.from_user.id)
            if asker is not None and not moderates and not await self._operates(message, topic, press.from_user.id):
                return None
        if group and action in ("say", "command"):
            self._pressers[message.chat.id, message.message_id] = press.from_user.id
        at, user = self._address(message, topic, str(message.message_id)), str(press.from_user.id)
        made = pressed(at, user, key, f"press:{press.id}", action, value, label)
        return replace(made, language=press.from_user.language_code or "", moderates=moderates)

    async def _membership(self, change: ChatMemberUpdated, key: str) -> Incoming | None:
        before, now, chat = change.old_chat_member.status, change.new_chat_member.status, change.chat
        user, language = str(change.from_user.id), change.from_user.language_code or ""
        at = Address(PLATFORM, self._account, str(chat.id), conversation(chat, None))
        if chat.type in _GROUPS and before in _OUT and now in _IN:
            return notice(replace(at, reply_to="-"), user, key, "telegram.joined", language)
        if now not in _OUT:
            return None
        return Incoming(Lane.CONTROL, Kind.MEMBERSHIP, at, user, key, "", language=language, action="blocked")

    async def _stopped(self, stopped: MessageGenerationStopped, key: str) -> Incoming:
        """Telegram's own stop button below a draft."""
        chat = stopped.chat
        at = Address(PLATFORM, self._account, str(chat.id), conversation(chat, stopped.message_thread_id))
        return Incoming(Lane.CONTROL, Kind.STOP, at, str(chat.id), key, "")

    # --- parts ---

    @property
    def _name(self) -> str:
        return (self._me.username or "").lower()

    def _address(self, message: Message | InaccessibleMessage, topic: int | None, reply_to: str) -> Address:
        chat = message.chat
        return Address(PLATFORM, self._account, str(chat.id), conversation(chat, topic), reply_to)

    def _incoming(self, message: Message, key: str, text: str, *, notice: str = "") -> Incoming:
        """A message for the bot. Forwarded commands, and those of anonymous senders, get a notice instead."""
        command = is_command(text)
        if command and _second_hand(message):
            text, notice = "", "telegram.second_hand"
        elif text and not command:
            text = f"{self._quoted(message)}{text}"
        files = () if notice else _files(message) or _files(message.reply_to_message if command else None)
        album = message.media_group_id if not _text(message) else None
        replied = message.reply_to_message if self._answers_me(message) else None
        return Incoming(
            Lane.TURN,
            Kind.MESSAGE,
            self._address(message, topic_of(message), str(message.message_id)),
            _user(message),
            key,
            f"{message.chat.id}:" + (f"album:{album}" if album else str(message.message_id)),
            text,
            language=(message.from_user.language_code or "") if message.from_user else "",
            attachments=files,
            action="notice" if notice else "",
            value=notice,
            answers=receipt(message.chat.id, replied.message_id) if replied else "",
            public=message.chat.type != ChatType.PRIVATE,
            second_hand=_second_hand(message),
        )

    def _quiet(self, message: Message, key: str, kind: Kind, action: str = "", value: str = "") -> Incoming:
        at = self._address(message, topic_of(message), "")
        return Incoming(Lane.CONTROL, kind, at, _user(message), key, "", action=action, value=value)

    def _unnamed(self, message: Message, text: str) -> tuple[bool, str]:
        """Whether the bot is mentioned, and the text without the mention."""
        raw = message.text or message.caption or ""
        for entity in message.entities or message.caption_entities or []:
            part = entity.extract_from(raw)
            by_name = entity.type == "mention" and part[1:].lower() == self._name
            if by_name or (entity.type == "text_mention" and entity.user and entity.user.id == self._me.id):
                return True, text.replace(part, " ", 1).strip().strip(" ,:").strip()
        return False, text

    def _answers_me(self, message: Message) -> bool:
        replied = message.reply_to_message
        return bool(replied and replied.from_user and replied.from_user.id == self._me.id)

    def _quoted(self, message: Message) -> str:
        """The quoted passage, or the replied message of another person, as a Markdown quote."""
        quote = message.quote.text if message.quote is not None else ""
        if not quote and message.reply_to_message is not None and not self._answers_me(message):
            quote = _text(message.reply_to_message)
        cut = quote if len(quote) <= _QUOTE else f"{quote[:_QUOTE]}…"
        return "\n".join(f"> {line}" for line in cut.splitlines()) + "\n\n" if quote else ""

    async def _is_admin(self, message: Message) -> bool:
        """Whether the author is an identified administrator of the group."""
        if message.sender_chat is not None or message.from_user is None or _second_hand(message):
            return False
        return await self._admin(message, message.from_user.id)

    def _asker(self, message: Message | InaccessibleMessage) -> int | None:
        """Whose question a reply answers; None where Telegram does not show it, and the core decides."""
        asked = None if isinstance(message, InaccessibleMessage) else message.reply_to_message
        if asked is None or asked.from_user is None:
            return None
        if asked.from_user.id == self._me.id:
            return self._pressers.get((asked.chat.id, asked.message_id))
        return asked.from_user.id

    async def _operates(self, message: Message | InaccessibleMessage, topic: int | None, user: int) -> bool:
        try:
            return await self._grant(self._address(message, topic, ""), str(user)) >= Grant.OPERATOR
        except AppError:
            return False  # not verified: the press is refused

    async def _admin(self, message: Message | InaccessibleMessage, user: int) -> bool:
        known = self._admins.get((message.chat.id, user))
        if known is not None:
            return known
        try:
            member = await self._bot(RawMember(chat_id=message.chat.id, user_id=user), request_timeout=5)
        except (TelegramAPIError, ClientDecodeError, TimeoutError):
            return False  # not verified: the person is asked to write in private
        admin = self._admins[message.chat.id, user] = member.get("status") in _ADMINS
        return admin


def _has_content(message: Message) -> bool:
    """Whether the message has content; service messages have none."""
    return bool(message.text or message.caption or any(getattr(message, kind, None) for kind in _MEDIA))


def _text(message: Message) -> str:
    return (message.text or message.caption or "").strip()


def _is_bot(message: Message) -> bool:
    """Whether another bot wrote it. Messages of a group or channel carry the user of a Telegram bot."""
    return message.from_user is not None and message.from_user.is_bot and message.sender_chat is None


def _second_hand(message: Message) -> bool:
    """Forwarded, or without an identified author."""
    copied = message.forward_origin or message.via_bot
    return bool(copied) or message.sender_chat is not None or message.from_user is None


def _user(message: Message) -> str:
    if message.sender_chat is not None:
        return str(message.sender_chat.id)
    return str(message.from_user.id) if message.from_user is not None else str(message.chat.id)


def _needs_grant(call: Call | BadCommand) -> bool:
    return isinstance(call, Call) and call.form.who > Grant.ANYONE


def _files(message: Message | None) -> tuple[Attachment, ...]:
    if message is None:
        return ()
    if (file := message.document) is not None and message.animation is None:
        return (Attachment(file.file_id, file.file_name or "file", file.file_size or 0, file.mime_type or ""),)
    for kind in _MEDIA:
        sent = getattr(message, kind, None)
        if sent:
            one = sent[-1] if isinstance(sent, list) else sent
            return (Attachment(getattr(one, "file_id", ""), kind, getattr(one, "file_size", 0) or 0),)
    return ()


def _label(message: Message | InaccessibleMessage, data: str) -> str:
    """The label of the button with this data."""
    markup = None if isinstance(message, InaccessibleMessage) else message.reply_markup
    if not isinstance(markup, InlineKeyboardMarkup):
        return ""
    return next((one.text for row in markup.inline_keyboard for one in row if one.callback_data == data), "")
