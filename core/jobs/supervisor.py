"""Worker for training: trains a job, evaluates the candidate, publishes it; and the supervisor of both workers.

queued -> running -> publishing -> published | cancelled | failed. Each step is committed before the next one: after a
crash the trainer resumes its checkpoint, or a finished folder is registered.
"""

import asyncio
import errno
import logging
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from core import charts
from core.adapters import folders, registry
from core.adapters.folders import Candidate
from core.channels import adapter_names
from core.delivery.deliveries import keep_body, new_delivery
from core.errors import AdapterUnusable, StorageFull
from core.i18n.messages import Lazy
from core.jobs import event_log, jobs, messages
from core.jobs.checks import CheckWorker, check_folder, read_text
from core.jobs.jobs import Job
from core.jobs.progress import ProgressMessage
from core.jobs.protocol import EXIT_FINISHED, SHOWN, Evaluated, JobEvent, Progress, Spec
from core.jobs.worker import JobWorker, WorkerContext
from core.storage.database import Tx
from core.types import AdapterRef
from core.usage import ledger

log = logging.getLogger(__name__)
CANDIDATE, OUT = "candidate", "out"


class JobSupervisor:
    """Runs the check worker and the training worker."""

    def __init__(self, context: WorkerContext) -> None:
        self._training = TrainingWorker(context)
        self._checks = CheckWorker(context, lambda: self._training.busy)

    def wake(self) -> None:
        self._checks.wake()
        self._training.wake()

    async def run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._checks.run(), name="check worker")
            tasks.create_task(self._training.run(), name="training worker")

    async def stop(self, deadline_s: float) -> None:
        """Start no job; the running trainers write their checkpoints. The jobs continue at the next start."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._checks.stop(deadline_s))
            tasks.create_task(self._training.stop(deadline_s))


class TrainingWorker(JobWorker):
    action, state = "train", "running"

    def due(self, tx: Tx) -> list[Job]:
        return jobs.due(tx)

    async def work(self, job: Job) -> None:
        if not await self._register_placed(job):
            await self._train(job)

    async def _train(self, job: Job) -> None:
        """Run trainer processes until the job is published, failed or cancelled."""
        if not await self._database.write(lambda tx: jobs.start(tx, job.id)):
            return
        folder = self._home.jobs / str(job.id)
        try:
            champion = await self._database.read(lambda tx: self._champion(tx, job))
            if await asyncio.to_thread(self._prepare, job, folder, champion):
                await self._database.write(lambda tx: event_log.clear(tx, job.id))
        except OSError as error:
            _wait_out(error)
            await self._fail_folder(job, error)
            return
        progress = ProgressMessage(self._database, self._deliveries, job)
        await progress.open(await self._delivery(job))
        while not self._stopping and await self._is_active(job):
            status, failed = await self._run_trainer(job, folder, progress)
            if not await self._is_active(job):
                return  # cancelled, and perhaps queued again by a resume
            if failed is not None:
                reason = messages.failure_reason(failed, job.language)
                await self._fail(job, failed.fault, reason, resumable=failed.of_use)
            elif status == EXIT_FINISHED:
                await self._publish(job, folder / OUT)
            else:
                await self._retry_trainer(job, status)

    # --- job folder ---

    def _champion(self, tx: Tx, job: Job) -> AdapterRef | None:
        """The version that answers in the channel now; None for the base model."""
        sha256, label = adapter_names.champion(tx, job.adapter)
        if sha256 is None or registry.by_sha(tx, sha256).base_fingerprint != self.context.info.fingerprint:
            return None
        return AdapterRef(sha256, self._home.adapters / sha256, label)

    def _prepare(self, job: Job, folder: Path, champion: AdapterRef | None) -> bool:
        """Lay out the job folder, or update the paths in the spec of an earlier start.

        A resumed job keeps its instructions and hyper-parameters. On another base model it starts again from nothing;
        True in this case. Raises OSError.
        """
        shutil.rmtree(check_folder(self._home, job.id), ignore_errors=True)
        earlier = Spec.find(folder)
        if job.imported and not (folder / CANDIDATE).exists():
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            (self._home.jobs / job.imported).rename(folder / CANDIDATE)
        spec = replace(
            self._spec(job),
            champion=str(champion.folder) if champion else "",
            champion_label=champion.label if champion else adapter_names.BASE,
            candidate=CANDIDATE if job.imported else "",
        )
        if earlier is None or earlier.fingerprint != spec.fingerprint:
            shutil.rmtree(folder / OUT, ignore_errors=True)
        elif (folder / earlier.data).exists():
            earlier_champion = str(self._home.adapters / Path(earlier.champion).name) if earlier.champion else ""
            current = {name: getattr(spec, name) for name in ("model", "cache", "device", "threads", "nice")}
            replace(earlier, champion=earlier_champion, **current).write(folder)
            return False
        else:
            spec = replace(spec, instructions=earlier.instructions, hyper=earlier.hyper)
        self._lay_out(job, folder, spec)
        return earlier is not None and earlier.fingerprint != spec.fingerprint

    # --- publishing ---

    async def _publish(self, job: Job, out: Path) -> None:
        try:
            candidate = await asyncio.to_thread(folders.inspect, out)
            of_base = candidate.base_fingerprint == self.context.info.fingerprint
            if not of_base or candidate.dataset_sha256 != job.dataset_sha256:
                unfit = "training.why_other_data" if of_base else "training.why_other_base"
                await self._fail(job, "ours", Lazy(unfit), resumable=False)
                return
            if not await self._database.write(lambda tx: jobs.publishing(tx, job.id, candidate.sha256)):
                return
            await asyncio.to_thread(folders.place, self._home, candidate)
        except AdapterUnusable as error:
            await self._refuse(job, error)
            return
        except OSError as error:
            _wait_out(error)
            raise
        await self._register(job, candidate)

    async def _register_placed(self, job: Job) -> bool:
        """Register a folder that was placed before a crash; whether there was one."""
        sha256 = await self._database.read(lambda tx: event_log.published_folder(tx, job.id))
        folder = self._home.adapters / sha256
        if not sha256 or not await asyncio.to_thread(folder.is_dir):
            return False
        try:
            candidate = await asyncio.to_thread(folders.inspect, folder)
        except AdapterUnusable as error:
            await self._refuse(job, error)
            return True
        if candidate.sha256 != sha256:
            await self._fail(job, "ours", Lazy("training.why_damaged"))
            return True
        await self._register(job, candidate)
        return True

    async def _refuse(self, job: Job, error: AdapterUnusable) -> None:
        """Fail the job for an unusable result. Raises AdapterUnusable where the disk could not be read: try again."""
        cause = error.__cause__
        if isinstance(cause, OSError) and not isinstance(cause, FileNotFoundError | NotADirectoryError):
            raise error
        log.error("job.result_unusable", extra={"job": job.id, "error": error.detail})
        await self._fail(job, "ours", Lazy("training.why_result"))

    async def _register(self, job: Job, candidate: Candidate) -> None:
        """Commit the version, the end of the job, its charge and its report in one transaction."""
        events = await self._database.read(lambda tx: event_log.events(tx, job.id))
        curve = self._home.sent / f"{job.adapter}-{job.version}-loss-{job.id}.png"
        picture = await asyncio.to_thread(_draw_curve, events, curve)
        shown = await asyncio.to_thread(read_text, self._home.jobs / str(job.id) / SHOWN)

        def work(tx: Tx) -> None:
            if jobs.state_of(tx, job.id) not in jobs.OPEN:  # cancelled meanwhile
                return
            registry.publish(tx, candidate, job.adapter, job.version)
            jobs.end(tx, job.id, "published", result=candidate.sha256)
            ledger.charge_job(tx, job.id, candidate.trained_tokens)
            jobs.keep_test_rows(tx, job.id, shown)
            published = jobs.get(tx, job.id)
            body = messages.report(published, event_log.events(tx, job.id))
            keep_body(tx, new_delivery(tx, job_id=job.id), replace(body, files=(picture,) if picture else ()))

        await self._database.write(work)
        log.info("job.published", extra={"job": job.id, "adapter": candidate.sha256[:12]})


def _draw_curve(events: Sequence[JobEvent], path: Path) -> Path | None:
    """The loss curve of a job: training, validation, and the losses of the gate on the test rows."""
    evaluated = [event for event in events if isinstance(event, Evaluated)]
    steps = [(event.step, event.loss) for event in events if isinstance(event, Progress)]
    validation = [(event.step, event.loss) for event in evaluated if event.split == "validation"]
    test: dict[str, float] = {event.who: event.loss for event in evaluated if event.split == "test"}
    return charts.loss_curve(steps, validation, test, path)


def _wait_out(error: OSError) -> None:
    """Raises StorageFull for a full disk: the worker retries until there is room."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        raise StorageFull(detail=str(error)) from error
