"""HTTP for Prometheus and for supervisors: GET /metrics and /readyz on the configured address.

Meant for the loopback interface or an inner network: metrics name models and channels, never a person or a text.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable

from aiohttp import web
from prometheus_client.core import Metric

from bots.shared import http
from core.config.keys import host_and_port
from core.errors import AppError
from core.observability.metrics import CONTENT_TYPE, render

Collect = Callable[[], Awaitable[Iterable[Metric]]]
Probe = Callable[[], Awaitable[None]]  # returns once the store has committed a write; raises AppError

log = logging.getLogger(__name__)
_PROBE_S = 5.0


async def serve(listen: str, collect: Collect, probe: Probe) -> None:
    """Answer requests at `listen` ("host:port") until cancelled. Raises BadConfig where it cannot be listened on."""

    async def metrics(request: web.Request) -> web.Response:
        try:
            return web.Response(body=render(await collect()), headers={"Content-Type": CONTENT_TYPE})
        except AppError as error:
            return _unavailable(error)

    async def readyz(request: web.Request) -> web.Response:
        try:
            async with asyncio.timeout(_PROBE_S):
                await probe()
            return web.Response(text="ready\n")
        except (AppError, TimeoutError) as error:
            return _unavailable(error)

    app = web.Application(client_max_size=0)
    app.router.add_get("/metrics", metrics)
    app.router.add_get("/readyz", readyz)
    runner = await http.serve(app, *host_and_port(listen), "metrics")
    log.info("metrics.listening", extra={"listen": listen})
    try:
        await asyncio.Event().wait()
    finally:
        await runner.cleanup()


def _unavailable(error: Exception) -> web.Response:
    reason = str(error) or "the store does not commit"
    log.error("metrics.failed", extra={"error": reason})
    return web.Response(status=503, text=f"{reason}\n")
