"""Open requests of one engine and their event streams. Everything here runs on the event loop.

The type variable S is the engine's own state of a request.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from typing import Generic, TypeVar

from core.engine.protocol import EngineInfo, Event, Finished, Request, check_request
from core.engine.scheduling.stats import StatsCounter
from core.errors import AppError, EngineError, Overloaded

log = logging.getLogger(__name__)

DRAIN_S = 10.0  # when the engine is left without an error

S = TypeVar("S")


class RunningGeneration(Generic[S]):
    """Events of one request, for one reader, once. Implements core.engine.protocol.Generation."""

    def __init__(self, cancel: Callable[[S], None]) -> None:
        self._cancel = cancel
        self._events: asyncio.Queue[Event | Exception] = asyncio.Queue()
        self._over = False
        self.state: S | None = None  # None: refused at submit

    def cancel(self) -> None:
        if self.state is not None:
            self._cancel(self.state)

    def put(self, event: Event | Exception) -> None:
        """Append an event. `Finished` or an exception is the last; an exception is raised to the reader."""
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


class OpenRequests(Generic[S]):
    """The open requests of one engine. `cancel` must lead to the request's last event."""

    def __init__(self, counter: StatsCounter, cancel: Callable[[S], None]) -> None:
        self.counter = counter
        self._cancel = cancel
        self._info: EngineInfo | None = None
        self._draining = False
        self._open: dict[S, RunningGeneration[S]] = {}
        self._none_open = asyncio.Event()

    def unlock(self, info: EngineInfo) -> None:
        """Accept requests from now on."""
        self._info, self._draining = info, False

    def lock(self) -> None:
        self._info = None

    @property
    def running(self) -> bool:
        return self._info is not None

    @property
    def info(self) -> EngineInfo:
        if self._info is None:
            raise EngineError(detail="the engine is not running: enter it first")
        return self._info

    @property
    def states(self) -> list[S]:
        return list(self._open)

    def is_open(self, state: S) -> bool:
        return state in self._open

    def begin(self, request: Request, make: Callable[[], S], enter: Callable[[S], None]) -> RunningGeneration[S]:
        """Return a stream at once. `enter` queues the request; an AppError of `make` or `enter` is raised to the
        reader.
        """
        stream: RunningGeneration[S] = RunningGeneration(self._cancel)
        try:
            _ = self.info
            if self._draining:
                raise Overloaded(detail="the engine is shutting down", retry_after_s=DRAIN_S)
            check_request(request)
            state = make()
            self._open[state] = stream  # first: another thread may end it at once
            try:
                enter(state)
            except AppError:
                self._close(state)
                raise
            stream.state = state
        except AppError as error:
            self.counter.end(error)
            stream.put(error)
        return stream

    def put(self, state: S, event: Event | Exception) -> None:
        """Emit an event. `Finished` or an error closes the request; later events are dropped."""
        stream = self._open.get(state)
        if stream is None:
            return
        stream.put(event)
        if isinstance(event, Finished | Exception):
            self.counter.end(event.reason if isinstance(event, Finished) else event)
            self._close(state)

    async def drain(self, deadline_s: float, cancel_s: float) -> None:
        """Accept no more; finish running requests within the deadline, then cancel the rest, waiting `cancel_s` at
        most.
        """
        self._draining = True
        if not await self._all_over(deadline_s):
            for state in self.states:
                self._cancel(state)
            if not await self._all_over(cancel_s):
                log.error("engine.drain_stuck", extra={"open": len(self._open)})

    async def _all_over(self, deadline_s: float) -> bool:
        """Whether all requests have ended after at most that time."""
        if self._open:
            self._none_open.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(deadline_s):
                    await self._none_open.wait()
        return not self._open

    def _close(self, state: S) -> None:
        del self._open[state]
        if not self._open:
            self._none_open.set()
