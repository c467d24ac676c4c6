"""The progress message of a job: stores events as they arrive and shows the newest state about once a second.

Showing is best effort: a job continues while its platform is unreachable.
"""

import asyncio
import functools
import logging
import time

from core.delivery.deliveries import Deliveries
from core.delivery.live_view import show_once
from core.delivery.retry import deliver
from core.errors import StorageError
from core.jobs import event_log, jobs, messages
from core.jobs.jobs import Job
from core.jobs.protocol import JobEvent, Progress
from core.storage.database import Database
from core.types import Handle

log = logging.getLogger(__name__)
SHOW_S = 1.0
_OPEN_DEADLINE_S = 30.0


class ProgressMessage:
    """`open` it once, then `add` events while `show` runs."""

    def __init__(self, database: Database, deliveries: Deliveries, job: Job) -> None:
        self._database, self._deliveries, self._job = database, deliveries, job
        self._handle: Handle | None = None
        self._changed = asyncio.Event()
        self._changed.set()
        self._stored_at = 0.0

    async def open(self, delivery_id: int) -> None:
        """Post the message, or recover its handle. Raises StorageError."""
        try:
            open_ = functools.partial(self._deliveries.open, delivery_id, self._job.address)
            self._handle = await deliver(open_, bound_s=_OPEN_DEADLINE_S)
        except StorageError:
            raise
        except Exception as error:  # of the platform: the final message is sent in any case
            log.warning("job.not_opened", extra={"job": self._job.id, "error": type(error).__name__})

    async def show(self) -> None:
        """Edit the message whenever events were added, until cancelled."""
        while self._handle is not None:
            await self._changed.wait()
            self._changed.clear()
            await show_once(self._show_newest)
            await asyncio.sleep(SHOW_S)

    async def _show_newest(self) -> None:
        assert self._handle is not None
        events = await self._database.read(lambda tx: event_log.events(tx, self._job.id))
        await self._deliveries.show(self._handle, self._job.address, messages.progress_text(self._job, events))

    async def add(self, event: JobEvent) -> None:
        """Store an event; of progress at most one in SHOW_S, and the last step. Raises StorageError."""
        if isinstance(event, Progress):
            now = time.monotonic()
            if event.step != event.steps and now - self._stored_at < SHOW_S:
                return
            self._stored_at = now
        await self._database.write(lambda tx: jobs.add_event(tx, self._job.id, event))
        self._changed.set()
