"""What a client may hold of the HTTP server is bounded: connections, and time without a request."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from bots.shared import http
from core.errors import BadConfig
from tests.support.waiting import DEADLINE_S


@pytest.fixture
async def port(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[int]:
    for name, value in {"MAX_CONNECTIONS": 20, "HEAD_S": 0.2, "REQUEST_S": 0.5}.items():
        monkeypatch.setattr(http, name, value)

    async def answer(request: web.Request) -> web.Response:
        return web.Response(text=str(len(await request.read())))

    app = web.Application()
    app.router.add_route("*", "/", answer)
    runner = await http.serve(app, "127.0.0.1", 0, "bots.test")
    yield int(runner.addresses[0][1])
    await runner.cleanup()


async def ended(reader: asyncio.StreamReader) -> bytes:
    """What came until the server closed the connection."""
    try:
        async with asyncio.timeout(DEADLINE_S):
            return await reader.read()
    except ConnectionError:
        return b""


async def test_half_open_connections_are_closed_and_others_are_answered(port: int) -> None:
    held: list[Any] = [await asyncio.open_connection("127.0.0.1", port) for _ in range(20)]
    for number, (_, writer) in enumerate(held):
        writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n"[: number + 1])  # never a complete head
    held.append(await asyncio.open_connection("127.0.0.1", port))  # one too many: closed at once
    for reader, writer in reversed(held):
        assert await ended(reader) == b""
        writer.close()
    async with aiohttp.ClientSession() as session, session.post(f"http://127.0.0.1:{port}/", data=b"four") as response:
        assert await response.text() == "4"


async def test_a_body_that_does_not_come_ends_the_request(port: int) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\nfour")
    async with asyncio.timeout(DEADLINE_S):
        assert (await reader.readline()).startswith(b"HTTP/1.1 408")
    writer.close()


async def test_an_address_that_is_taken_names_the_table(port: int) -> None:
    with pytest.raises(BadConfig, match=r"bots\.test\.listen = '127\.0\.0\.1:\d+' cannot be used"):
        await http.serve(web.Application(), "127.0.0.1", port, "bots.test")
