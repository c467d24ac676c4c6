"""Event stream of one request."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from core.engine.protocol import Event, Finished


class EventStream:
    """Half of core.engine.protocol.Generation; an engine adds `cancel`. One reader, once."""

    def __init__(self) -> None:
        self._events: asyncio.Queue[Event | Exception] = asyncio.Queue()
        self._over = False

    def put(self, event: Event | Exception) -> None:
        """Append an event, on the event loop. `Finished` or an exception is the last; an exception is raised to the
        reader.
        """
        self._events.put_nowait(event)

    def __aiter__(self) -> AsyncIterator[Event]:
        return self

    async def __anext__(self) -> Event:
        if self._over:
            raise StopAsyncIteration
        event = await self._events.get()
        self._over = isinstance(event, Finished | Exception)
        if isinstance(event, Exception):
            raise event
        return event
