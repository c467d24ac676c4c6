"""The one message of a running job: events are kept as they come, the newest state is shown at a calm pace.

Showing is best effort: a platform that is away costs the job nothing. Knows no process, and not how a job ends.
"""

from __future__ import annotations

import asyncio
import logging
import time

from core.delivery.deliveries import Deliveries
from core.errors import StorageError
from core.jobs import event_log, job_messages, jobs
from core.jobs.jobs import Job
from core.jobs.protocol import JobEvent, Progress
from core.storage.database import Database
from core.types import Handle

log = logging.getLogger(__name__)
SHOW_S = 1.0
_OPEN_DEADLINE_S = 30.0
_SHOW_DEADLINE_S = 10.0


class ProgressMessage:
    """Open it once, then `post` events while `paint` runs."""

    def __init__(self, database: Database, deliveries: Deliveries, job: Job) -> None:
        self._database = database
        self._deliveries = deliveries
        self._job = job
        self._handle: Handle | None = None
        self._news = asyncio.Event()
        self._news.set()
        self._kept = 0.0

    async def open(self, delivery_id: int) -> None:
        """Post the message, or find it again."""
        try:
            async with asyncio.timeout(_OPEN_DEADLINE_S):
                self._handle = await self._deliveries.open(delivery_id, self._job.address)
        except StorageError:
            raise
        except Exception as error:  # a platform's failure: its end is told all the same
            log.warning("job.not_opened", extra={"job": self._job.id, "error": type(error).__name__})

    async def post(self, event: JobEvent) -> None:
        """Keep an event; of progress not more than one in SHOW_S, and the last. Raises StorageError."""
        last = isinstance(event, Progress) and event.step == event.steps
        if isinstance(event, Progress) and not last and time.monotonic() - self._kept < SHOW_S:
            return
        if isinstance(event, Progress):
            self._kept = time.monotonic()
        await self._database.write(lambda tx: jobs.add_event(tx, self._job.id, event))
        self._news.set()

    async def paint(self) -> None:
        """Until cancelled."""
        while self._handle is not None:
            await self._news.wait()
            self._news.clear()
            try:
                async with asyncio.timeout(_SHOW_DEADLINE_S):
                    events = await self._database.read(lambda tx: event_log.events(tx, self._job.id))
                    text = job_messages.progress_text(self._job, events)
                    await self._deliveries.show(self._handle, self._job.address, text)
            except Exception as error:
                log.warning("job.show_failed", extra={"job": self._job.id, "error": type(error).__name__})
            await asyncio.sleep(SHOW_S)
