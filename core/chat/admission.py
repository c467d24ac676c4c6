"""Which replies are at the engine at once: a bounded number, in the engine's fair order; a suspect of a crash alone."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from core.chat import inbox
from core.engine.protocol import Scope
from core.engine.scheduling.scheduler import Scheduler
from core.errors import UserError


@dataclass(eq=False, slots=True)
class PendingReply:
    """A reply that the engine does not have yet. `cancel` is remembered, and ends its wait for a slot."""

    turn: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    stopped: bool = False

    def cancel(self) -> None:
        self.stopped = True
        self.admit()

    def admit(self) -> None:
        if not self.turn.done():
            self.turn.set_result(None)


class AdmissionQueue:
    """Slots at the engine, `free` in all."""

    def __init__(self, free: int) -> None:
        self._free = free
        self._waiting: Scheduler[tuple[PendingReply, Scope]] = Scheduler(inbox.MAX_OPEN)

    @asynccontextmanager
    async def slot(self, scope: Scope, pending: PendingReply) -> AsyncIterator[None]:
        """Wait for a slot and hold it. Raises UserError where the reply is stopped first."""
        entry = pending, scope
        self._waiting.add(entry, scope)
        self._fill()
        try:
            await pending.turn
            if pending.stopped:
                raise UserError("service.stopped")
            yield
        finally:
            if not self._waiting.remove(entry):
                self._waiting.done(scope)
                self._free += 1
                self._fill()

    def _fill(self) -> None:
        while self._free and (entry := self._waiting.take()):
            self._free -= 1
            pending, scope = entry
            self._waiting.charge(scope, 1)
            pending.admit()  # a cancelled one gives its slot back at once


class Isolation:
    """A lock that is shared or exclusive, in the order of arrival."""

    def __init__(self) -> None:
        self._running = 0  # sections inside; -1 is one that is alone
        self._waiting: deque[tuple[bool, asyncio.Future[None]]] = deque()

    @asynccontextmanager
    async def section(self, *, alone: bool) -> AsyncIterator[None]:
        """Wait until this may run, beside other shared sections or `alone`, and run it."""
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((alone, turn))
        self._admit()
        try:
            await turn
        except asyncio.CancelledError:
            if turn.cancelled():
                self._admit()  # it may have held up those behind it
            else:
                self._leave(alone)  # its turn had come already
            raise
        try:
            yield
        finally:
            self._leave(alone)

    def _leave(self, alone: bool) -> None:
        self._running = 0 if alone else self._running - 1
        self._admit()

    def _admit(self) -> None:
        while self._waiting:
            alone, turn = self._waiting[0]
            if not turn.cancelled():
                if self._running and (alone or self._running < 0):
                    return
                self._running = -1 if alone else self._running + 1
                turn.set_result(None)
            self._waiting.popleft()
