"""The numbers for Prometheus: GET /metrics on the address that the configuration names. Knows no number's meaning.

As little of HTTP as a scrape needs: one request a connection, no body read, anything but GET /metrics refused. Meant
for the loopback interface or an inner network; what it tells names models and channels, never a person or a text.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import version
from typing import TYPE_CHECKING

from core.errors import AppError, BadConfig
from core.observability.gauges import census
from core.observability.metrics import CONTENT_TYPE, Family, counter, engine_families, gauge, render

if TYPE_CHECKING:
    from bots.app import Parts

log = logging.getLogger(__name__)
_SCRAPE_S = 10.0
_MAX_HEAD_BYTES = 8192
_STATUS = {200: "OK", 400: "Bad Request", 404: "Not Found", 405: "Method Not Allowed", 503: "Service Unavailable"}


async def serve(parts: Parts, listen: str) -> None:
    """Answer scrapes until cancelled. Raises BadConfig where the address cannot be listened on."""
    host, _, port = listen.rpartition(":")

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            async with asyncio.timeout(_SCRAPE_S):
                head = await reader.readuntil(b"\r\n\r\n")
                writer.write(_response(*await _answer(parts, head)))
                await writer.drain()
        writer.close()

    try:
        server = await asyncio.start_server(answer, host.strip("[]"), int(port), limit=_MAX_HEAD_BYTES)
    except (OSError, OverflowError) as error:
        detail = f"metrics.listen = {listen!r} cannot be used: {getattr(error, 'strerror', None) or error}"
        raise BadConfig(detail=detail) from error
    log.info("metrics.listening", extra={"listen": listen})
    async with server:
        await server.serve_forever()


async def _answer(parts: Parts, head: bytes) -> tuple[int, str]:
    words = head.split(b"\r\n", 1)[0].split(b" ")
    if len(words) != 3:
        return 400, ""
    if words[1].partition(b"?")[0] != b"/metrics":
        return 404, "The numbers are at /metrics.\n"
    if words[0] != b"GET":
        return 405, ""
    try:
        return 200, render(await _families(parts))
    except AppError as error:
        log.error("metrics.failed", extra={"error": str(error)})
        return 503, f"{error}\n"


def _response(status: int, text: str) -> bytes:
    body = text.encode()
    head = (
        f"HTTP/1.1 {status} {_STATUS[status]}",
        f"Content-Type: {CONTENT_TYPE}",
        f"Content-Length: {len(body)}",
        "Connection: close",
    )
    return "\r\n".join([*head, "", ""]).encode() + body


async def _families(parts: Parts) -> list[Family]:
    stored = await parts.database.read(census)
    return [*_program(parts), *engine_families(parts.engine.info, parts.engine.stats()), *stored]


def _program(parts: Parts) -> Iterator[Family]:
    yield gauge("build_info", "This program.", ({"version": version("distributary")}, 1))
    yield gauge("engine_rows_limit", "Replies that may be generated at once.", ({}, parts.config.engine.max_rows))
    yield gauge("engine_waiting_limit", "Replies that may wait for a row.", ({}, parts.config.engine.max_waiting))
    yield counter(
        "replies_total",
        "Replies of the model that ended, and refusals, since the start.",
        *parts.service.replies.samples(),
    )
    yield counter(
        "orphans_total",
        "First messages that a crash may have left on a platform, where nobody can write them again.",
        ({}, parts.deliveries.orphans),
    )
