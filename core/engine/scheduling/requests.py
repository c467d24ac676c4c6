"""Open requests of one engine and their event streams. Everything here runs on the event loop.

The type variable S is the engine's own state of a request.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from typing import Generic, TypeVar

from core.engine.protocol import EngineInfo, Event, Finished, Request, check_request
from core.engine.scheduling.stats import StatsCounter
from core.engine.scheduling.stream import EventStream
from core.errors import AppError, EngineError, Overloaded

log = logging.getLogger(__name__)

DRAIN_S = 10.0  # when the engine is left without an error

J = TypeVar("J")


class RunningGeneration(EventStream, Generic[J]):
    """The events of one request. Implements core.engine.protocol.Generation."""

    def __init__(self, cancel: Callable[[J], None]) -> None:
        super().__init__()
        self._cancel = cancel
        self.state: J | None = None  # None: refused at submit

    def cancel(self) -> None:
        if self.state is not None:
            self._cancel(self.state)


class OpenRequests(Generic[J]):
    """The open requests of one engine. `cancel` soon leads to the state's last event."""

    def __init__(self, counter: StatsCounter, cancel: Callable[[J], None]) -> None:
        self.counter = counter
        self._cancel = cancel
        self._info: EngineInfo | None = None
        self._draining = False
        self._open: dict[J, RunningGeneration[J]] = {}
        self._none_open = asyncio.Event()

    def unlock(self, info: EngineInfo) -> None:
        """The engine runs: requests may come."""
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
    def states(self) -> list[J]:
        return list(self._open)

    def is_open(self, state: J) -> bool:
        return state in self._open

    def begin(self, request: Request, make: Callable[[], J], enter: Callable[[J], None]) -> RunningGeneration[J]:
        """A stream at once. `enter` lets the state wait for its turn; an AppError of either is raised at the reader."""
        stream: RunningGeneration[J] = RunningGeneration(self._cancel)
        try:
            _ = self.info
            if self._draining:
                raise Overloaded(detail="the engine is shutting down", retry_after_s=DRAIN_S)
            check_request(request)
            state = make()
            self._open[state] = stream  # before another thread can end it
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

    def put(self, state: J, event: Event | AppError) -> None:
        """Tell an open request's reader; `Finished` or an error closes it, and what comes after that is not heard."""
        stream = self._open.get(state)
        if stream is None:
            return
        stream.put(event)
        if isinstance(event, Finished | AppError):
            self.counter.end(event.reason if isinstance(event, Finished) else event)
            self._close(state)

    async def drain(self, deadline_s: float, cancel_s: float) -> None:
        """Take no more; finish what runs within the deadline, then cancel the rest, which takes `cancel_s` at most."""
        self._draining = True
        if not await self._all_over(deadline_s):
            for state in self.states:
                self._cancel(state)
            if not await self._all_over(cancel_s):
                log.error("engine.drain_stuck", extra={"open": len(self._open)})

    async def _all_over(self, deadline_s: float) -> bool:
        """Whether no request is open any more, after at most that time."""
        if self._open:
            self._none_open.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._none_open.wait(), deadline_s)
        return not self._open

    def _close(self, state: J) -> None:
        del self._open[state]
        if not self._open:
            self._none_open.set()
