"""Bot API calls of one account: rate limited, with errors classified and without the token in an error."""

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

from bots.shared.errors import OutcomeUnknown
from bots.telegram.sending.rate_limits import TelegramRateLimiter
from core.errors import BadInput
from core.platform import Unreachable

log = logging.getLogger(__name__)
T = TypeVar("T")
CALL_S = 20  # one request
MAX_FILE_BYTES = 20 * 10**6  # what the cloud's Bot API lets a bot download


class TelegramProblem(Enum):
    """What an API error means for the message that was being written."""

    SAME = auto()  # "message is not modified": success
    GONE = auto()  # the message was deleted
    MARKUP = auto()  # the entities or the rich form are refused; the plain text may pass
    THREAD = auto()  # the topic was deleted or closed
    AWAY = auto()  # network or server failure, outcome unknown
    CLOSED = auto()  # the bot was blocked or removed, or the account deleted
    OTHER = auto()


_MEANINGS = {
    TelegramProblem.SAME: ("message is not modified",),
    TelegramProblem.GONE: (
        "message to edit not found",
        "message can't be edited",
        "message_id_invalid",
        "message not found",
    ),
    TelegramProblem.THREAD: ("message thread not found", "topic_deleted", "topic_closed", "topic_id_invalid"),
    TelegramProblem.MARKUP: (
        "can't parse",
        "entit",
        "message is too long",
        "message_too_long",
        "text must be non-empty",
        "rich",
    ),
    TelegramProblem.CLOSED: ("chat not found", "user is deactivated", "have no rights to send", "chat_write_forbidden"),
}


def classify(error: Exception) -> TelegramProblem:
    """The problem behind an exception of aiogram or aiohttp."""
    if isinstance(error, TelegramForbiddenError | TelegramUnauthorizedError):
        return TelegramProblem.CLOSED
    if isinstance(error, TelegramNetworkError | TelegramServerError | ClientDecodeError | ClientError | TimeoutError):
        return TelegramProblem.OTHER if isinstance(error, TelegramEntityTooLarge) else TelegramProblem.AWAY
    if isinstance(error, TelegramBadRequest | TelegramNotFound):
        text = error.message.lower()
        fitting = (meaning for meaning, words in _MEANINGS.items() if any(word in text for word in words))
        return next(fitting, TelegramProblem.OTHER)
    return TelegramProblem.OTHER


class Session(AiohttpSession):
    """A session that stays closed. aiogram's own reopens for a late call, and that session would leak."""

    over = False

    async def create_session(self) -> ClientSession:
        if self.over:
            raise ClientConnectionError("the bot has ended")
        return await super().create_session()


async def end(bot: Bot) -> None:
    """Close the session of a bot from `make_bot` for good."""
    assert isinstance(bot.session, Session)
    bot.session.over = True
    await bot.session.close()


def make_bot(token: str, api: str) -> Bot:
    """An aiogram client without link previews and without a parse mode, since entities are passed explicitly."""
    session = Session(api=TelegramAPIServer.from_base(api), limit=200, timeout=CALL_S)
    return Bot(token, session, default=DefaultBotProperties(link_preview_is_disabled=True))


class RawUpdates(TelegramMethod[list[Any]]):
    """getUpdates with unparsed results, so that one malformed update does not block the others."""

    __returning__ = list[Any]
    __api_method__ = "getUpdates"

    offset: int | None = None
    limit: int = 100
    timeout: int = 0
    allowed_updates: list[str] | None = None


class RawMember(TelegramMethod[dict[str, Any]]):
    """getChatMember with an unparsed result: aiogram rejects members without a right that was added later."""

    __returning__ = dict[str, Any]
    __api_method__ = "getChatMember"

    chat_id: int
    user_id: int


class TelegramApi:
    """The calls of one account."""

    def __init__(self, bot: Bot, limiter: TelegramRateLimiter) -> None:
        self.bot, self.limiter = bot, limiter

    async def updates(self, offset: int | None, timeout_s: int, allowed: list[str]) -> list[Any]:
        """Long polling; the updates unparsed. A response that pydantic rejects is decoded by `json`."""
        method = RawUpdates(offset=offset, timeout=timeout_s, allowed_updates=allowed)
        try:
            return await self.bot(method, request_timeout=timeout_s + CALL_S)
        except ClientDecodeError as error:
            given = json.loads(error.data) if isinstance(error.data, str) else error.data
            if isinstance(given, dict) and given.get("ok") and isinstance(given.get("result"), list):
                return list(given["result"])
            raise

    async def call(self, method: TelegramMethod[T], timeout_s: int = CALL_S) -> T:
        """One request, outside the rate limits."""
        return await self.bot(method, request_timeout=timeout_s)

    async def show(self, chat: int, method: TelegramMethod[T], *, draft: bool = False) -> bool:
        """One request if the rate limits allow it now; whether it was sent."""
        if self.limiter.wait_s(chat, draft=draft, show=True) > 0:
            return False
        self.limiter.take(chat, draft=draft)
        try:
            await self.bot(method, request_timeout=CALL_S // 2)
        except TelegramRetryAfter as error:
            self.limiter.refused(chat, error.retry_after)
            return False
        return True

    async def write(self, chat: int, method: TelegramMethod[T], *, repeatable: bool = True) -> T:
        """One request, after the rate limits and any Retry-After.

        Raises Unreachable for a closed chat. `repeatable` is False for a request that creates a message: a response
        that was lost then raises OutcomeUnknown.
        """
        while True:
            await self.limiter.turn(chat)
            try:
                return await self.bot(method, request_timeout=CALL_S)
            except TelegramRetryAfter as error:
                self.limiter.refused(chat, error.retry_after)
                log.warning("telegram.flood", extra={"method": method.__api_method__, "wait_s": error.retry_after})
            except TelegramMigrateToChat:
                raise
            except (TelegramAPIError, ClientDecodeError, TimeoutError) as error:
                problem = classify(error)
                if problem is TelegramProblem.CLOSED:
                    raise Unreachable(detail=type(error).__name__) from error
                if problem is TelegramProblem.AWAY:
                    never_sent = repeatable or isinstance(error.__cause__, ClientConnectorError)
                    log.warning(
                        "telegram.away" if never_sent else "telegram.outcome_unknown",
                        extra={"method": method.__api_method__, "error": type(error).__name__},
                    )
                    if not never_sent:
                        raise OutcomeUnknown(detail=type(error).__name__) from error
                raise

    async def download(self, file_id: str, name: str, size_bytes: int = 0) -> AsyncIterator[bytes]:
        """Stream a file that a person sent. Raises BadInput for one that is too large or no longer there."""
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
