"""How many replies are at the engine at once, and in which order the others follow: fairly, as the engine schedules."""

import asyncio
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
