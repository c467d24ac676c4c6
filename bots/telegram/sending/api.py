"""Calls of one account to the Bot API: paced, refusals told apart, no token in an error. Knows no answer, no update."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from enum import Enum, auto
from typing import Any, TypeVar

from aiogram import Bot
from aiogram.client.default import DefaultBotProperties
from aiogram.client.session.aiohttp import AiohttpSession
from aiogram.client.telegram import TelegramAPIServer
from aiogram.exceptions import (
    ClientDecodeError,
    TelegramAPIError,
    TelegramBadRequest,
    TelegramEntityTooLarge,
    TelegramForbiddenError,
    TelegramMigrateToChat,
    TelegramNetworkError,
    TelegramNotFound,
    TelegramRetryAfter,
    TelegramServerError,
    TelegramUnauthorizedError,
)
from aiogram.methods import GetFile, TelegramMethod
from aiohttp import ClientConnectionError, ClientConnectorError, ClientError, ClientSession

from bots.telegram.sending.rate_limits import TelegramRateLimiter
from core.errors import AppError, BadInput
from core.platform import Unreachable

log = logging.getLogger(__name__)
T = TypeVar("T")
CALL_S = 20  # one request
PATIENCE_S = 3600.0  # how long a final text waits for a platform that is away
MAX_FILE_BYTES = 20 * 10**6  # what the cloud's Bot API lets a bot download
_PAUSES_S = (0.5, 1.0, 2.0, 4.0, 8.0, 15.0)


class TelegramProblem(Enum):
    """What a refusal means for whoever writes."""

    SAME = auto()  # the message says this already: success
    GONE = auto()  # the message to edit is not there any more
    MARKUP = auto()  # the text itself is taken, its entities or its form are not
    THREAD = auto()  # the topic is not there any more
    AWAY = auto()  # network, server: outcome unknown
    CLOSED = auto()  # blocked, thrown out, deleted: nobody can be reached there
    OTHER = auto()


_MEANINGS = (
    (TelegramProblem.SAME, ("message is not modified",)),
    (
        TelegramProblem.GONE,
        ("message to edit not found", "message can't be edited", "message_id_invalid", "message not found"),
    ),
    (TelegramProblem.THREAD, ("message thread not found", "topic_deleted", "topic_closed", "topic_id_invalid")),
    (
        TelegramProblem.MARKUP,
        ("can't parse", "entit", "message is too long", "message_too_long", "text must be non-empty", "rich"),
    ),
    (
        TelegramProblem.CLOSED,
        ("chat not found", "user is deactivated", "have no rights to send", "chat_write_forbidden"),
    ),
)


def trouble(error: Exception) -> TelegramProblem:
    """What went wrong, from what Telegram said."""
    if isinstance(error, TelegramForbiddenError | TelegramUnauthorizedError):
        return TelegramProblem.CLOSED
    if isinstance(error, TelegramNetworkError | TelegramServerError | ClientDecodeError | ClientError | TimeoutError):
        return TelegramProblem.OTHER if isinstance(error, TelegramEntityTooLarge) else TelegramProblem.AWAY
    if isinstance(error, TelegramBadRequest | TelegramNotFound):
        said = error.message.lower()
        return next(
            (meaning for meaning, words in _MEANINGS if any(word in said for word in words)), TelegramProblem.OTHER
        )
    return TelegramProblem.OTHER


class Lost(Unreachable):
    """Whether a new message was sent is not known: to repeat it could double it."""

    key = AppError.key


class Session(AiohttpSession):
    """One that can end: what aiogram's own has closed it opens anew for a late call, and nobody would close that."""

    over = False

    async def create_session(self) -> ClientSession:
        if self.over:
            raise ClientConnectionError("the bot has ended")
        return await super().create_session()


async def end(bot: Bot) -> None:
    """Close what `make_bot` opened, for good."""
    assert isinstance(bot.session, Session)
    bot.session.over = True
    await bot.session.close()


def make_bot(token: str, api: str) -> Bot:
    """aiogram's client. Entities are given explicitly, so no parse mode; nothing of a text becomes a preview."""
    session = Session(api=TelegramAPIServer.from_base(api), limit=200, timeout=CALL_S)
    return Bot(token, session, default=DefaultBotProperties(link_preview_is_disabled=True))


class RawUpdates(TelegramMethod[list[Any]]):
    """getUpdates, its answer unread: one update that cannot be read must not block those beside it."""

    __returning__ = list[Any]
    __api_method__ = "getUpdates"

    offset: int | None = None
    limit: int = 100
    timeout: int = 0
    allowed_updates: list[str] | None = None


class RawMember(TelegramMethod[dict[str, Any]]):
    """getChatMember, its answer unread: aiogram refuses a member who lacks a right that is newer than they are."""

    __returning__ = dict[str, Any]
    __api_method__ = "getChatMember"

    chat_id: int
    user_id: int


class TelegramApi:
    """Writes for one account."""

    def __init__(self, bot: Bot, pace: TelegramRateLimiter, patience_s: float = PATIENCE_S) -> None:
        self.bot = bot
        self.pace = pace
        self._patience_s = patience_s

    async def updates(self, offset: int | None, timeout_s: int, allowed: list[str]) -> list[Any]:
        """Long polling. What has come, as it came; a body that pydantic refuses is read by the standard library."""
        method = RawUpdates(offset=offset, timeout=timeout_s, allowed_updates=allowed)
        try:
            return await self.bot(method, request_timeout=timeout_s + CALL_S)
        except ClientDecodeError as error:
            given = json.loads(error.data) if isinstance(error.data, str) else error.data
            if isinstance(given, dict) and given.get("ok") and isinstance(given.get("result"), list):
                return list(given["result"])
            raise

    async def call(self, method: TelegramMethod[T], timeout_s: int = CALL_S) -> T:
        """One request, unpaced, once."""
        return await self.bot(method, request_timeout=timeout_s)

    async def show(self, chat: int, method: TelegramMethod[T], *, draft: bool = False) -> bool:
        """One request now, if the pace allows; whether it was done. Its turn is booked by `pace`."""
        if self.pace.wait_s(chat, draft=draft, show=True) > 0:
            return False
        self.pace.take(chat, draft=draft)
        try:
            await self.bot(method, request_timeout=CALL_S // 2)
        except TelegramRetryAfter as error:
            self.pace.refused(chat, error.retry_after)
            return False
        return True

    async def write(self, chat: int, method: TelegramMethod[T]) -> T:
        """A request that must be done: waits for its turn, through 429 and through a platform that is away.

        Only for what may be repeated. Raises what Telegram says otherwise; Unreachable where nobody can be reached any
        more.
        """
        return await self._patiently(chat, method, repeatable=True)

    async def send(self, chat: int, method: TelegramMethod[T]) -> T:
        """The same for what makes a new message: repeated only where it was not done for certain, else raises Lost."""
        return await self._patiently(chat, method, repeatable=False)

    async def _patiently(self, chat: int, method: TelegramMethod[T], *, repeatable: bool) -> T:
        try:
            async with asyncio.timeout(self._patience_s):
                return await self._write(chat, method, repeatable=repeatable)
        except TimeoutError as error:
            raise AppError(detail="Telegram did not take a message for too long") from error

    async def _write(self, chat: int, method: TelegramMethod[T], *, repeatable: bool) -> T:
        tries = 0
        while True:
            await self.pace.turn(chat)
            try:
                return await self.bot(method, request_timeout=CALL_S)
            except TelegramRetryAfter as error:
                self.pace.refused(chat, error.retry_after)
                log.warning("telegram.flood", extra={"method": method.__api_method__, "wait_s": error.retry_after})
            except TelegramMigrateToChat:
                raise
            except (TelegramAPIError, ClientDecodeError, TimeoutError) as error:
                meaning = trouble(error)
                if meaning is TelegramProblem.CLOSED:
                    raise Unreachable(detail=type(error).__name__) from error
                if meaning is not TelegramProblem.AWAY:
                    raise
                if not (repeatable or isinstance(error.__cause__, ClientConnectorError)):  # that one never went out
                    log.warning("telegram.lost", extra={"method": method.__api_method__, "error": type(error).__name__})
                    raise Lost(detail=type(error).__name__) from error
                log.warning("telegram.away", extra={"method": method.__api_method__, "error": type(error).__name__})
                await asyncio.sleep(_PAUSES_S[min(tries, len(_PAUSES_S) - 1)])
                tries += 1

    async def download(self, file_id: str, name: str, size_bytes: int = 0) -> AsyncIterator[bytes]:
        """The bytes of a file that a person sent. Raises BadInput for one that is too large or not there."""
        if size_bytes > MAX_FILE_BYTES:
            raise BadInput("telegram.file_too_large", name=name, limit=MAX_FILE_BYTES // 10**6)
        try:
            file = await self.call(GetFile(file_id=file_id))
            url = self.bot.session.api.file_url(self.bot.token, file.file_path or "")
            async for chunk in self.bot.session.stream_content(url, timeout=120):
                yield chunk
        except TelegramBadRequest as error:
            large = "too big" in error.message.lower()
            key = "telegram.file_too_large" if large else "telegram.file_gone"
            raise BadInput(key, name=name, limit=MAX_FILE_BYTES // 10**6) from error
        except (TelegramAPIError, ClientError, TimeoutError) as error:
            raise BadInput("telegram.file_gone", detail=type(error).__name__, name=name) from None
