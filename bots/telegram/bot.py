"""The Telegram bot of one token: getMe, then long polling or a webhook."""

import asyncio
import logging
from collections.abc import Mapping
from contextlib import suppress
from typing import Self

from aiogram.exceptions import TelegramAPIError, TelegramNotFound, TelegramRetryAfter, TelegramUnauthorizedError
from aiogram.methods import DeleteWebhook, GetMe, SetWebhook, TelegramMethod
from aiogram.types import User

from bots.shared.backoff import pauses
from bots.shared.errors import bad_config
from bots.telegram.addresses import PLATFORM
from bots.telegram.housekeeping import TelegramHousekeeping
from bots.telegram.receiver import TelegramReceiver
from bots.telegram.sending.api import T, TelegramApi, end, make_bot
from bots.telegram.sending.rate_limits import TelegramRateLimiter
from bots.telegram.sending.sink import TelegramSink
from bots.telegram.settings import TelegramSettings, read_settings
from bots.telegram.updates import ALLOWED, UpdateReader
from bots.telegram.webhook import Webhooks, path_of
from core.errors import AppError
from core.platform import BotService

log = logging.getLogger(__name__)


class TelegramBot:
    """One account: a table [bots.NAME] with a token."""

    platform = PLATFORM
    training_allowed = True

    def __init__(self, settings: TelegramSettings, limiter: TelegramRateLimiter | None = None) -> None:
        self._settings, self._limiter = settings, limiter
        self._token_valid = False  # whether getMe has succeeded

    @classmethod
    def configure(cls, settings: Mapping[str, object]) -> Self:
        return cls(read_settings(settings))

    async def run(self, service: BotService) -> None:
        """Run until cancelled. Raises BadConfig for an invalid token."""
        settings = self._settings
        bot = make_bot(settings.token, settings.api)
        try:
            api = TelegramApi(bot, self._limiter or TelegramRateLimiter())
            me = await self._until_available(api, GetMe())
            self._token_valid = True
            await self._serve(service, api, me)
        except (TelegramUnauthorizedError, TelegramNotFound):
            detail = "Telegram does not know the token of [bots.telegram]: ask @BotFather for it with /token"
            if self._token_valid:  # revoked while running; the other bots go on
                raise AppError(detail=detail) from None
            raise bad_config("telegram", detail) from None
        finally:
            with suppress(Exception):
                await end(bot)

    async def _serve(self, service: BotService, api: TelegramApi, me: User) -> None:
        settings, account = self._settings, (me.username or str(me.id)).lower()
        sink = TelegramSink(api, transport=settings.transport, rich=settings.rich)
        housekeeping = TelegramHousekeeping(api, service)
        reader = UpdateReader(api.bot, me, account, service.grant)
        receiver = TelegramReceiver(account, api, reader, housekeeping, service)
        service.register(PLATFORM, account, sink)
        if not me.can_read_all_group_messages:
            log.info("telegram.group_privacy", extra={"account": account})
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(sink.drafts.keep(), name=f"{account} drafts")
            tasks.create_task(housekeeping.run(), name=f"{account} housekeeping")
            if settings.webhook:
                await self._listen(api, receiver)
            else:
                await self._until_available(api, DeleteWebhook(drop_pending_updates=False))
                log.info("telegram.polling", extra={"account": account})
                await receiver.poll()

    async def _listen(self, api: TelegramApi, receiver: TelegramReceiver) -> None:
        settings = self._settings
        server, secret = Webhooks.at(*settings.host_and_port), settings.webhook_secret
        await server.listen(secret, receiver.take)
        try:
            url = settings.webhook.rstrip("/") + path_of(secret)
            await self._until_available(api, SetWebhook(url=url, secret_token=secret, allowed_updates=ALLOWED))
            log.info("telegram.webhook", extra={"listen": settings.listen})
            await asyncio.Event().wait()
        finally:
            await server.leave(secret)

    async def _until_available(self, api: TelegramApi, method: TelegramMethod[T]) -> T:
        """Call a method until it succeeds, however long Telegram is unavailable."""
        for wait_s in pauses():
            try:
                return await api.call(method)
            except (TelegramUnauthorizedError, TelegramNotFound):
                raise
            except TelegramRetryAfter as error:
                wait_s = error.retry_after
            except (TelegramAPIError, TimeoutError, OSError) as error:
                extra = {"method": method.__api_method__, "error": type(error).__name__, "again_in_s": wait_s}
                log.warning("telegram.away", extra=extra)
            await asyncio.sleep(wait_s)
        raise AssertionError("never")
