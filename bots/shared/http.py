"""The one HTTP server: of webhooks, of Slack's pages, of metrics. Everything that a client may hold is bounded."""

import asyncio
from collections.abc import Awaitable, Callable

from aiohttp import web
from aiohttp.web_protocol import RequestHandler

from core.errors import BadConfig

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
MAX_CONNECTIONS = 200
HEAD_S = 10.0  # until the first request's head is complete
IDLE_S = 30.0  # between two requests
REQUEST_S = 60.0  # for body and answer


async def serve(app: web.Application, host: str, port: int, table: str) -> web.AppRunner:
    """Serve an app. `table` of the configuration has the address. Raises BadConfig when it cannot be bound."""
    fresh: set[RequestHandler] = set()  # connections without a request so far

    @web.middleware
    async def bounded(request: web.Request, handler: Handler) -> web.StreamResponse:
        fresh.discard(request.protocol)
        try:
            async with asyncio.timeout(REQUEST_S):
                return await handler(request)
        except TimeoutError:
            return web.Response(status=408)

    app.middlewares.append(bounded)
    runner = web.AppRunner(app, access_log=None, handle_signals=False, keepalive_timeout=IDLE_S)
    await runner.setup()
    server = runner.server
    assert server is not None
    made = server.connection_made

    def connection_made(connection: RequestHandler, transport: asyncio.Transport) -> None:
        made(connection, transport)
        if len(server.connections) > MAX_CONNECTIONS:
            transport.abort()
            return

        def check() -> None:
            if connection in fresh:
                fresh.discard(connection)
                transport.abort()

        fresh.add(connection)
        asyncio.get_running_loop().call_later(HEAD_S, check)

    setattr(server, "connection_made", connection_made)  # noqa: B010  # called by each connection
    try:
        await web.TCPSite(runner, host, port).start()
    except (OSError, OverflowError) as error:
        await runner.cleanup()
        reason = getattr(error, "strerror", None) or error
        detail = f"{table}.listen = '{host}:{port}' cannot be used: {reason}"
        raise BadConfig(detail=detail, file=f"[{table}]", problems=detail) from error
    return runner
