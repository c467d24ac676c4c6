"""What is owed to a chat besides answers, after the commit: presses confirmed, menus by role. Best effort, bounded.

Losing one of these costs a spinner or an old menu, never an answer.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Iterable, Sequence

from aiogram.exceptions import TelegramAPIError
from aiogram.methods import AnswerCallbackQuery, DeleteMyCommands, EditMessageReplyMarkup, SetMyCommands
from aiogram.types import (
    BotCommand,
    BotCommandScopeAllGroupChats,
    BotCommandScopeAllPrivateChats,
    BotCommandScopeChat,
    CallbackQuery,
    Message,
)

from bots.telegram.sending.api import TelegramApi
from bots.telegram.sending.buttons import DONE, pressed, reasons_keyboard
from bots.telegram.updates import ReadUpdate
from core.commands.table import COMMANDS
from core.errors import AppError
from core.i18n.messages import languages, resolve, say
from core.platform import BotService
from core.types import Grant, Incoming, Kind

log = logging.getLogger(__name__)
IN_GROUPS = frozenset({"help", "new", "stop", "usage", "privacy"})
_MOST = 1_000
_KNOWN = 5_000
_MEANING = 256  # characters that Telegram allows


class TelegramHousekeeping:
    """One account's. `run` must be running."""

    def __init__(self, api: TelegramApi, service: BotService) -> None:
        self._api, self._service = api, service
        self._queue: asyncio.Queue[ReadUpdate] = asyncio.Queue(_MOST)
        self._menus: OrderedDict[tuple[str, str], Grant] = OrderedDict()

    def offer(self, reads: Iterable[ReadUpdate]) -> None:
        """Never waits: what is too much is left out."""
        for read in reads:
            if not self._queue.full() and (read.press is not None or read.incoming is not None):
                self._queue.put_nowait(read)

    async def run(self) -> None:
        """Until cancelled."""
        await self._best(self._general_menus())
        while True:
            read = await self._queue.get()
            if read.press is not None:
                await self._best(self._confirm(read.press, taken=read.incoming is not None))
            elif read.incoming is not None and read.incoming.kind is Kind.MESSAGE:
                await self._best(self._own_menu(read.incoming))

    async def _best(self, doing: object) -> None:
        try:
            async with asyncio.timeout(30):
                await doing  # type: ignore[misc]
        except (TelegramAPIError, AppError, TimeoutError, OSError) as error:
            log.info("telegram.housekeeping_failed", extra={"error": type(error).__name__})

    # --- presses ---

    async def _confirm(self, press: CallbackQuery, *, taken: bool) -> None:
        """Every press is answered, or its button keeps spinning. A thumb down asks what was wrong."""
        language = resolve(press.from_user.language_code or "") or "en"
        action, value = pressed(press.data or "") or ("", "")
        text = None
        if press.data == DONE:
            pass  # it only says what was chosen
        elif not taken:
            text = say(language, "telegram.press_refused")
        elif action == "feedback":
            text = say(language, "telegram.thanks")
        await self._api.call(AnswerCallbackQuery(callback_query_id=press.id, text=text))
        message = press.message
        if not taken or action != "feedback" or not isinstance(message, Message) or message.reply_markup is None:
            return
        if value.endswith(":-1"):
            markup = reasons_keyboard(language, value)
            edit = EditMessageReplyMarkup(chat_id=message.chat.id, message_id=message.message_id, reply_markup=markup)
            await self._api.show(message.chat.id, edit)
        elif value.count(":") == 2:
            gone = EditMessageReplyMarkup(chat_id=message.chat.id, message_id=message.message_id)
            await self._api.show(message.chat.id, gone)

    # --- menus ---

    async def _general_menus(self) -> None:
        everyone = [one.name for one in COMMANDS if one.who is Grant.ANYONE]
        for language in ("", *languages()):
            code = language or None
            await self._api.call(
                SetMyCommands(
                    commands=_menu(everyone, language), scope=BotCommandScopeAllPrivateChats(), language_code=code
                )
            )
            await self._api.call(
                SetMyCommands(
                    commands=_menu([name for name in everyone if name in IN_GROUPS], language),
                    scope=BotCommandScopeAllGroupChats(),
                    language_code=code,
                )
            )

    async def _own_menu(self, incoming: Incoming) -> None:
        """Operators see their commands too, in their own chat."""
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
            names = [one.name for one in COMMANDS if one.who <= grant]
            await self._api.call(SetMyCommands(commands=_menu(names, language), scope=scope))
        self._menus[key] = grant
        if len(self._menus) > _KNOWN:
            self._menus.popitem(last=False)


def _menu(names: Sequence[str], language: str) -> list[BotCommand]:
    known = {one.name: one for one in COMMANDS}
    return [
        BotCommand(command=name, description=known[name].help(language or "en")[:_MEANING] or name) for name in names
    ]
