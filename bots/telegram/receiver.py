"""Receives the updates of one account: parse, commit, then confirm.

aiogram's own polling moves the offset before an update is handled; here it moves after the commit. A confirmed offset
is not sent again, since update ids may restart at a lower number after a quiet week.
"""

import asyncio
import json
import logging
from collections.abc import Sequence
from typing import Any

from aiogram.exceptions import TelegramConflictError, TelegramNotFound, TelegramRetryAfter, TelegramUnauthorizedError
from cachetools import LRUCache

from bots.shared.backoff import pauses
from bots.shared.incoming import digest
from bots.telegram.addresses import PLATFORM
from bots.telegram.housekeeping import TelegramHousekeeping
from bots.telegram.sending.api import TelegramApi
from bots.telegram.updates import ALLOWED, ReadUpdate, UnreadableUpdate, UpdateReader
from core.errors import Overloaded, StorageError
from core.platform import BotService

log = logging.getLogger(__name__)
POLL_S = 50
_CONFLICT_S = 15.0
_STORAGE_S = 2.0
_ALBUMS = 200


class TelegramReceiver:
    """The receiver of one account; the webhook uses `take`."""

    def __init__(
        self,
        account: str,
        api: TelegramApi,
        reader: UpdateReader,
        housekeeping: TelegramHousekeeping,
        service: BotService,
    ) -> None:
        self._account, self._api, self._reader = account, api, reader
        self._housekeeping, self._service = housekeeping, service
        self._albums: LRUCache[str, bool] = LRUCache(_ALBUMS)  # albums whose caption was accepted

    async def poll(self) -> None:
        """Poll until cancelled. Raises TelegramUnauthorizedError when the token was revoked."""
        confirm: int | None = None
        waits = pauses()
        while True:
            try:
                raws = await self._api.updates(confirm, POLL_S, ALLOWED)
            except (TelegramUnauthorizedError, TelegramNotFound):
                raise
            except TelegramConflictError:
                hint = "another program polls with this token: stop it, or use a webhook (deploy/telegram.md)"
                log.error(
                    "telegram.two_pollers", extra={"account": self._account, "again_in_s": _CONFLICT_S, "hint": hint}
                )
                await asyncio.sleep(_CONFLICT_S)
                continue
            except TelegramRetryAfter as error:
                await asyncio.sleep(error.retry_after)
                continue
            except Exception as error:  # network, proxy, truncated response: unconfirmed updates come again
                wait_s = next(waits)
                log.warning("telegram.no_updates", extra={"error": type(error).__name__, "again_in_s": wait_s})
                await asyncio.sleep(wait_s)
                continue
            waits = pauses()
            await self._take_with_retries(raws)
            confirm = max((id for raw in raws if (id := _id(raw)) is not None), default=-1) + 1 or None

    async def take(self, raws: Sequence[Any]) -> None:
        """Commit updates; afterwards they may be confirmed.

        Raises Overloaded or StorageError: nothing was committed, and Telegram must send them again.
        """
        reads: list[ReadUpdate] = []
        for raw in raws:
            try:
                reads.append(await self._reader.read(raw))
            except UnreadableUpdate as error:
                key = _id(raw)
                log.error("telegram.unreadable", extra={"account": self._account, "update": key, "error": str(error)})
                update_key = digest(raw) if key is None else str(key)
                await self._service.accept_dead(PLATFORM, self._account, update_key, json.dumps(raw))
        reads = self._albums_once(reads)
        if incoming := [read.incoming for read in reads if read.incoming is not None]:
            await self._service.accept(*incoming)
        self._housekeeping.offer(reads)

    async def _take_with_retries(self, raws: Sequence[Any]) -> None:
        while True:
            try:
                return await self.take(raws)
            except Overloaded as busy:
                log.warning("telegram.overloaded", extra={"account": self._account, "again_in_s": busy.retry_after_s})
                await asyncio.sleep(min(busy.retry_after_s, _CONFLICT_S))
            except StorageError as error:
                log.error("telegram.not_stored", extra={"account": self._account, "error": str(error)})
                await asyncio.sleep(_STORAGE_S)

    def _albums_once(self, reads: list[ReadUpdate]) -> list[ReadUpdate]:
        """One update for each album: the picture with the caption, else the one that is committed first."""
        for read in reads:
            if read.album and read.incoming is not None and ":album:" not in read.incoming.message_key:
                self._albums[read.album] = True
        return [
            read
            for read in reads
            if not (read.album in self._albums and read.incoming and ":album:" in read.incoming.message_key)
        ]


def _id(raw: object) -> int | None:
    found = raw.get("update_id") if isinstance(raw, dict) else None
    return found if isinstance(found, int) else None
