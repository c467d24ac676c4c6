"""HTTP for Prometheus: GET /metrics on the configured address.

One request a connection, no body read, anything but GET /metrics refused. Meant for the loopback interface or an inner
network: metrics name models and channels, never a person or a text.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from http import HTTPStatus

from prometheus_client.core import Metric

from core.errors import AppError, BadConfig
from core.observability.metrics import CONTENT_TYPE, render

Collect = Callable[[], Awaitable[Iterable[Metric]]]

log = logging.getLogger(__name__)
_SCRAPE_S = 10.0
_MAX_HEAD_BYTES = 8192


async def serve(listen: str, collect: Collect) -> None:
    """Answer scrapes of `listen` ("host:port") until cancelled. Raises BadConfig where it cannot be listened on."""
    host, _, port = listen.rpartition(":")

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            async with asyncio.timeout(_SCRAPE_S):
                head = await reader.readuntil(b"\r\n\r\n")
                writer.write(_response(*await _answer(collect, head)))
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


async def _answer(collect: Collect, head: bytes) -> tuple[int, bytes]:
    words = head.split(b"\r\n", 1)[0].split(b" ")
    if len(words) != 3:
        return 400, b""
    if words[1].partition(b"?")[0] != b"/metrics":
        return 404, b"The metrics are at /metrics.\n"
    if words[0] != b"GET":
        return 405, b""
    try:
        return 200, render(await collect())
    except AppError as error:
        log.error("metrics.failed", extra={"error": str(error)})
        return 503, f"{error}\n".encode()


def _response(status: int, body: bytes) -> bytes:
    head = (f"HTTP/1.1 {status} {HTTPStatus(status).phrase}", f"Content-Type: {CONTENT_TYPE}")
    return "\r\n".join([*head, f"Content-Length: {len(body)}", "Connection: close", "", ""]).encode() + body
