"""The check of a data set before anything is trained: its report becomes a question. Knows rows, files and no torch.

validating -> waiting -> queued, by somebody's yes (core.jobs.commands); or back to validating, to take personal data
out. A question that nobody answers ends its job. A check runs in a trainer process under limits, beside a job that is
trained.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from core.delivery.deliveries import keep_body, new_delivery
from core.errors import JobError
from core.i18n.messages import Lazy
from core.jobs import data_messages, datasets, event_log, jobs
from core.jobs.dataset_files import keep_file
from core.jobs.jobs import Job
from core.jobs.progress_message import ProgressMessage
from core.jobs.protocol import EXIT_FINISHED, PREVIEW, Checked, Estimated, JobEvent, Preview, Redacted
from core.jobs.worker import JobWorker, WorkerContext, with_line
from core.storage.database import Tx
from core.storage.home import Home

log = logging.getLogger(__name__)


class CheckWorker(JobWorker):
    """`training_is_busy` says whether steps taken now would hold up a job, and be held up by it."""

    action, state = "check", "validating"

    def __init__(self, shop: WorkerContext, training_is_busy: Callable[[], bool]) -> None:
        super().__init__(shop)
        self._training_is_busy = training_is_busy

    def due(self, tx: Tx) -> list[Job]:
        return jobs.due_checks(tx)

    async def between(self) -> None:
        age_ms = round(self._settings.ask_s * 1000)
        for job_id in await self._database.read(lambda tx: jobs.expired(tx, age_ms)):
            await self._database.write(lambda tx, old=job_id: jobs.cancel(tx, old, jobs.EXPIRED))  # type: ignore[misc]

    async def work(self, job: Job) -> None:
        """Run the check until there is a report or a reason."""
        if job.state != self.state:
            return
        folder = check_folder(self._home, job.id)
        spec = replace(self._spec(job), redact=job.redact, warm_up=not self._training_is_busy())
        try:
            await asyncio.to_thread(self._lay_out, job, folder, spec)
        except FileNotFoundError:
            await self._fail(job, "ours", Lazy("training.why_no_data"))
            return
        except OSError as error:
            await self._fail(job, "ours", Lazy("training.why_folder", error=error.strerror))
            return
        board = ProgressMessage(self._database, self._deliveries, job)
        while not self._stopping and await self._is_on(job):
            status, failed = await self._run_trainer(job, folder, board)
            if not await self._is_on(job):
                return  # cancelled
            if failed is not None:
                await self._fail(job, failed.fault, with_line(failed, job.language))
            elif status == EXIT_FINISHED:
                await self._ask(job, folder)
                await asyncio.to_thread((folder / spec.data).unlink, missing_ok=True)
                return
            else:
                await self._again(job, status)

    async def _ask(self, job: Job, folder: Path) -> None:
        """The report, and the question whether to start. What personal data was taken out of is another data set."""
        events = await self._database.read(lambda tx: event_log.events(tx, job.id))
        redacted = next((event for event in events if isinstance(event, Redacted)), None) if job.redact else None
        size = await asyncio.to_thread(self._keep_redacted, folder, redacted) if redacted else 0
        preview = Preview.load(await asyncio.to_thread(read_preview, self._home, job.id))

        def work(tx: Tx) -> None:
            if not jobs.ask(tx, job.id):
                return
            if redacted:
                datasets.keep_derived(tx, job.dataset_sha256, redacted.sha256, size_bytes=size)
                jobs.read_from(tx, job.id, redacted.sha256)
            estimated = data_messages.last(events, Estimated)
            jobs.pin_price(tx, job.id, estimated.tokens if estimated else None)
            asked = jobs.find(tx, job.id)
            assert asked is not None
            _count_rows(tx, asked, events)
            keep_body(tx, new_delivery(tx, job_id=job.id), data_messages.question(asked, events, preview))

        await self._database.write(work)
        if redacted:
            await self._clear_data(job)  # as it was before: what people said is erased
        log.info("job.asked", extra={"job": job.id})

    def _keep_redacted(self, folder: Path, redacted: Redacted) -> int:
        """Its bytes. Raises JobError where the file is not what the check said."""
        with (folder / redacted.name).open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if keep_file(self._home, file) != redacted.sha256:
                raise JobError("training.why_redacted")
        return size


def check_folder(home: Home, job_id: int) -> Path:
    return home.jobs / str(job_id) / "check"


def read_preview(home: Home, job_id: int) -> str:
    """The rows that the check chose to show; "" where they are gone, as with a job that has ended."""
    try:
        return (check_folder(home, job_id) / PREVIEW).read_text("utf-8")
    except (OSError, ValueError):
        return ""


def _count_rows(tx: Tx, job: Job, events: list[JobEvent]) -> None:
    checked = next((event for event in events if isinstance(event, Checked)), None)
    if checked is not None:
        datasets.count_rows(tx, job.dataset_sha256, checked.used)
