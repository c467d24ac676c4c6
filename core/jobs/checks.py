"""Worker for data checks: the report of a check becomes the question whether to start the job.

validating -> waiting -> queued, when somebody confirms (core.jobs.commands), or back to validating to redact personal
data. A job that nobody confirms expires. A check runs in a trainer process beside a job in training.
"""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from core.delivery.deliveries import keep_body, new_delivery
from core.errors import JobError
from core.jobs import datasets, event_log, jobs, messages
from core.jobs.jobs import Job
from core.jobs.protocol import EXIT_FINISHED, PREVIEW, Checked, Estimated, Preview, Redacted
from core.jobs.worker import JobWorker, WorkerContext
from core.storage.database import Tx
from core.storage.home import Home

log = logging.getLogger(__name__)
_CHUNK = 2**20


class CheckWorker(JobWorker):
    """`training_is_busy`: a check takes no test steps then; they would slow down each other."""

    action, state = "check", "validating"

    def __init__(self, context: WorkerContext, training_is_busy: Callable[[], bool]) -> None:
        super().__init__(context)
        self._training_is_busy = training_is_busy

    def due(self, tx: Tx) -> list[Job]:
        return jobs.due_checks(tx)

    async def before_next(self) -> None:
        """Cancel expired jobs."""
        age_ms = round(self._settings.ask_s * 1000)
        for job_id in await self._database.read(lambda tx: jobs.expired(tx, age_ms)):
            await self._database.write(lambda tx, old=job_id: jobs.cancel(tx, old, jobs.EXPIRED))  # type: ignore[misc]

    async def work(self, job: Job) -> None:
        if job.state != self.state:
            return
        folder = check_folder(self._home, job.id)
        spec = replace(self._spec(job), redact=job.redact, warm_up=not self._training_is_busy())
        try:
            await asyncio.to_thread(self._lay_out, job, folder, spec)
        except OSError as error:
            await self._fail_folder(job, error)
            return
        while not self._stopping and await self._is_active(job):
            status, failed = await self._run_trainer(job, folder)
            if not await self._is_active(job):
                return  # cancelled
            if failed is not None:
                await self._fail(job, failed.fault, messages.failure_reason(failed, job.language))
            elif status == EXIT_FINISHED:
                await self._ask(job, folder)
                await asyncio.to_thread((folder / spec.data).unlink, missing_ok=True)
                return
            else:
                await self._retry_trainer(job, status)

    async def _ask(self, job: Job, folder: Path) -> None:
        """Store the report with its question. A redacted data set replaces the one that was checked."""
        events = await self._database.read(lambda tx: event_log.events(tx, job.id))
        redacted = messages.last(events, Redacted) if job.redact else None
        size = await asyncio.to_thread(self._store_redacted, folder, redacted) if redacted else 0
        preview = await asyncio.to_thread(read_preview, self._home, job.id)

        def work(tx: Tx) -> None:
            if not jobs.await_confirmation(tx, job.id):
                return
            if redacted:
                datasets.keep_derived(tx, job.dataset_sha256, redacted.sha256, size_bytes=size)
                jobs.replace_dataset(tx, job.id, redacted.sha256)
            estimated = messages.last(events, Estimated)
            jobs.pin_price(tx, job.id, estimated.tokens if estimated else None)
            waiting = jobs.get(tx, job.id)
            if (checked := messages.last(events, Checked)) is not None:
                datasets.count_rows(tx, waiting.dataset_sha256, checked.used)
            keep_body(tx, new_delivery(tx, job_id=job.id), messages.question(waiting, events, preview))

        await self._database.write(work)
        if redacted:
            await self._remove_erased(job)
        log.info("job.waiting", extra={"job": job.id})

    def _store_redacted(self, folder: Path, redacted: Redacted) -> int:
        """Store the redacted data set; its size in bytes. Raises JobError where its hash is not that of the event."""
        with (folder / redacted.name).open("rb") as file:
            sha256, size = datasets.store(self._home, iter(lambda: file.read(_CHUNK), b""))
        if sha256 != redacted.sha256:
            raise JobError("training.why_redacted")
        return size


def check_folder(home: Home, job_id: int) -> Path:
    return home.jobs / str(job_id) / "check"


def read_preview(home: Home, job_id: int) -> tuple[Preview, ...]:
    """The sample rows of a check; none where they are removed: the job has started or ended."""
    return Preview.load(read_text(check_folder(home, job_id) / PREVIEW))


def read_text(path: Path) -> str:
    """The text of a file of a trainer, or ""."""
    try:
        return path.read_text("utf-8")
    except (OSError, ValueError):
        return ""
