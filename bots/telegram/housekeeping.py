"""Callback answers and command menus: sent after the commit, best effort, from a bounded queue.

A lost one leaves a spinner or an old menu, never a missing reply.
"""

import asyncio
import logging
from collections.abc import Awaitable, Iterable

from aiogram.exceptions import TelegramAPIError
from aiogram.methods import AnswerCallbackQuery, DeleteMyCommands, EditMessageReplyMarkup, SetMyCommands
from aiogram.types import (
    BotCommand,
    BotCommandScopeAllGroupChats,
    BotCommandScopeAllPrivateChats,
    BotCommandScopeChat,
    BotCommandScopeUnion,
    CallbackQuery,
    Message,
)
from cachetools import LRUCache

from bots.telegram.sending.api import TelegramApi
from bots.telegram.sending.buttons import DONE, action_of, reasons_keyboard
from bots.telegram.updates import ReadUpdate
from core.commands.table import COMMANDS, Command
from core.errors import AppError
from core.i18n.messages import languages, resolve, say
from core.platform import BotService
from core.types import Grant, Incoming, Kind

log = logging.getLogger(__name__)
IN_GROUPS = frozenset({"help", "new", "stop", "usage", "privacy"})
_QUEUE = 1_000
_KNOWN = 5_000
_DESCRIPTION = 256  # characters, Telegram's limit


class TelegramHousekeeping:
    """The housekeeping of one account. `run` must be running."""

    def __init__(self, api: TelegramApi, service: BotService) -> None:
        self._api, self._service = api, service
        self._queue: asyncio.Queue[ReadUpdate] = asyncio.Queue(_QUEUE)
        self._menus: LRUCache[tuple[str, str], Grant] = LRUCache(_KNOWN)

    def offer(self, reads: Iterable[ReadUpdate]) -> None:
        """Queue updates that are committed; drops them when the queue is full."""
        for read in reads:
            if not self._queue.full() and (read.press is not None or read.incoming is not None):
                self._queue.put_nowait(read)

    async def run(self) -> None:
        """Work until cancelled."""
        await self._best_effort(self._general_menus())
        while True:
            read = await self._queue.get()
            if read.press is not None:
                await self._best_effort(self._confirm(read.press, taken=read.incoming is not None))
            elif read.incoming is not None and read.incoming.kind is Kind.MESSAGE:
                await self._best_effort(self._own_menu(read.incoming))

    async def _best_effort(self, call: Awaitable[None]) -> None:
        try:
            async with asyncio.timeout(30):
                await call
        except (TelegramAPIError, AppError, TimeoutError, OSError) as error:
            log.info("telegram.housekeeping_failed", extra={"error": type(error).__name__})

    # --- presses ---

    async def _confirm(self, press: CallbackQuery, *, taken: bool) -> None:
        """Answer a callback query, else its button keeps spinning; a thumb down then offers the reasons."""
        language = resolve(press.from_user.language_code or "") or "en"
        action, value = action_of(press.data or "") or ("", "")
        text = None
        if not taken and press.data != DONE:  # DONE is a label, no action
            text = say(language, "telegram.press_refused")
        elif action == "feedback":
            text = say(language, "telegram.thanks")
        await self._api.call(AnswerCallbackQuery(callback_query_id=press.id, text=text))
        message = press.message
        if not taken or action != "feedback" or not isinstance(message, Message) or message.reply_markup is None:
            return
        markup = reasons_keyboard(language, value) if value.endswith(":-1") else None
        if markup is not None or value.count(":") == 2:
            chat, id = message.chat.id, message.message_id
            await self._api.show(chat, EditMessageReplyMarkup(chat_id=chat, message_id=id, reply_markup=markup))

    # --- menus ---

    async def _general_menus(self) -> None:
        everyone = [one for one in COMMANDS if one.who is Grant.ANYONE]
        scopes: list[tuple[BotCommandScopeUnion, list[Command]]] = [
            (BotCommandScopeAllPrivateChats(), everyone),
            (BotCommandScopeAllGroupChats(), [one for one in everyone if one.name in IN_GROUPS]),
        ]
        for language in ("", *languages()):
            for scope, commands in scopes:
                menu = _menu(commands, language)
                await self._api.call(SetMyCommands(commands=menu, scope=scope, language_code=language or None))

    async def _own_menu(self, incoming: Incoming) -> None:
        """Show operators their commands in their private chat."""
        at = incoming.address
        if not at.place.isdecimal():
            return
        grant = await self._service.grant(at, incoming.user)
        key = (at.place, incoming.language)
        known = self._menus.get(key)
        if known == grant or (known is None and grant is Grant.ANYONE):
            return
        scope = BotCommandScopeChat(chat_id=int(at.place))
        if grant is Grant.ANYONE:
            await self._api.call(DeleteMyCommands(scope=scope))
        else:
            language = resolve(incoming.language) or "en"
            menu = _menu([one for one in COMMANDS if one.who <= grant], language)
            await self._api.call(SetMyCommands(commands=menu, scope=scope))
        self._menus[key] = grant


def _menu(commands: Iterable[Command], language: str) -> list[BotCommand]:
    return [
        BotCommand(command=one.name, description=one.help(language or "en")[:_DESCRIPTION] or one.name)
        for one in commands
    ]
