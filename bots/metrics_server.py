"""HTTP for Prometheus and for supervisors: GET /metrics and /readyz on the configured address.

One request a connection, no body read, anything else refused. Meant for the loopback interface or an inner
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
Probe = Callable[[], Awaitable[None]]  # returns once the store has committed a write; raises AppError

log = logging.getLogger(__name__)
_SCRAPE_S = 10.0
_PROBE_S = 5.0
_MAX_HEAD_BYTES = 8192


async def serve(listen: str, collect: Collect, probe: Probe) -> None:
    """Answer requests at `listen` ("host:port") until cancelled. Raises BadConfig where it cannot be listened on."""
    host, _, port = listen.rpartition(":")

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            async with asyncio.timeout(_SCRAPE_S):
                head = await reader.readuntil(b"\r\n\r\n")
                writer.write(_response(*await _answer(collect, probe, head)))
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


async def _answer(collect: Collect, probe: Probe, head: bytes) -> tuple[int, bytes]:
    words = head.split(b"\r\n", 1)[0].split(b" ")
    if len(words) != 3:
        return 400, b""
    path = words[1].partition(b"?")[0]
    if path not in (b"/metrics", b"/readyz"):
        return 404, b"There are /metrics and /readyz.\n"
    if words[0] != b"GET":
        return 405, b""
    try:
        if path == b"/metrics":
            return 200, render(await collect())
        async with asyncio.timeout(_PROBE_S):
            await probe()
        return 200, b"ready\n"
    except (AppError, TimeoutError) as error:
        log.error("metrics.failed", extra={"error": str(error) or "no commit in time"})
        return 503, f"{error or 'the store does not commit'}\n".encode()


def _response(status: int, body: bytes) -> bytes:
    head = (f"HTTP/1.1 {status} {HTTPStatus(status).phrase}", f"Content-Type: {CONTENT_TYPE}")
    return "\r\n".join([*head, f"Content-Length: {len(body)}", "Connection: close", "", ""]).encode() + body
