"""The webhook: one aiohttp server for all accounts that listen on the same address.

Each account has its own path and secret. The status is 200 once the update is committed, 503 when it cannot be (so that
Telegram sends it again), and an empty 401 for every other request.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from aiohttp import web

from bots.shared.http import serve
from core.errors import BadConfig, Overloaded, StorageError

log = logging.getLogger(__name__)
HEADER = "X-Telegram-Bot-Api-Secret-Token"
MAX_BYTES = 1_000_000
Take = Callable[[Sequence[Any]], Awaitable[None]]

_servers: dict[tuple[str, int], Webhooks] = {}


def path_of(secret: str) -> str:
    """The path of an account, which cannot be guessed without the secret."""
    return "/telegram/" + hashlib.sha256(b"path of " + secret.encode()).hexdigest()[:32]


class Webhooks:
    """The server of one address, open while an account uses it."""

    def __init__(self, host: str, port: int) -> None:
        self._at = host, port
        self._takes: dict[str, tuple[bytes, Take]] = {}
        self._runner: web.AppRunner | None = None

    @classmethod
    def at(cls, host: str, port: int) -> Webhooks:
        return _servers.setdefault((host, port), cls(host, port))

    async def listen(self, secret: str, take: Take) -> None:
        """Raises BadConfig when the address cannot be bound or another account has the same secret."""
        path = path_of(secret)
        if path in self._takes:
            raise BadConfig(detail="two Telegram bots have the same webhook_secret: give each its own")
        self._takes[path] = secret.encode(), take
        if self._runner is not None:
            return
        app = web.Application(client_max_size=MAX_BYTES)
        app.router.add_route("*", "/{path:.*}", self._handle)
        try:
            self._runner = await serve(app, *self._at, "bots.telegram")
        except BadConfig:
            await self.leave(secret)
            raise

    async def leave(self, secret: str) -> None:
        self._takes.pop(path_of(secret), None)
        if not self._takes and self._runner is not None:
            runner, self._runner = self._runner, None
            _servers.pop(self._at, None)
            await runner.cleanup()

    async def _handle(self, request: web.Request) -> web.Response:
        secret, take = self._takes.get(request.path, (b"", None))
        given = request.headers.getall(HEADER, [])
        right = len(given) == 1 and hmac.compare_digest(given[0].encode("utf-8", "surrogateescape"), secret)
        if take is None or not right or request.method != "POST":
            return web.Response(status=401)
        try:
            raw = json.loads(await request.read())
        except (ValueError, RecursionError, web.HTTPRequestEntityTooLarge):
            return web.Response(status=401)
        if not isinstance(raw, dict) or not isinstance(raw.get("update_id"), int):
            return web.Response(status=401)
        try:
            await take([raw])
        except (Overloaded, StorageError) as error:
            log.error("telegram.not_stored", extra={"error": str(error)})
            return web.Response(status=503, headers={"Retry-After": "5"})
        return web.Response()
