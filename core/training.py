"""The jobs' supervisor: one trainer at a time, its events kept and shown, its result published. Knows no torch.

queued -> running -> publishing -> published | cancelled | failed. Every step is committed before the next, so a crash
leads back to a trainer that resumes its checkpoint, or to a folder that only has to be written down.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from core import adapters, jobtexts
from core.adapters import Candidate
from core.datasets import CONVERSATIONS, stored
from core.delivery import Deliveries, keep_body, kept_body, new_delivery
from core.engine.protocol import EngineInfo
from core.errors import AdapterUnusable, AppError, JobError, StorageError
from core.job import EXIT_FINISHED, EXIT_INTERRUPTED, Failed, HyperParameters, JobEvent, Progress, Spec
from core.store import jobs
from core.store.database import Database, Tx
from core.store.home import Home
from core.store.jobs import Job
from core.trainer import COMMAND, Trainer
from core.types import Body, Handle

log = logging.getLogger(__name__)
_LOOK_AGAIN_S = 30.0
_TROUBLE_S = 5.0
_CANCEL_S = 15.0
_SHOW_S = 1.0
_SHOW_DEADLINE_S = 10.0
_ATTEMPTS = 3
_DATA = "data"


@dataclass(frozen=True, slots=True)
class TrainingSettings:
    """`silence_s`: a trainer that says nothing for so long is taken for dead."""

    hyper: HyperParameters = field(default_factory=HyperParameters)
    threads: int = 1
    nice: int = 10
    silence_s: float = 600.0


class Training:
    """`run` must be running for jobs to be done; `wake` says that there may be one, or one less."""

    def __init__(
        self,
        database: Database,
        home: Home,
        deliveries: Deliveries,
        info: EngineInfo,
        settings: TrainingSettings,
        *,
        command: Sequence[str] = COMMAND,
    ) -> None:
        self._database = database
        self._home = home
        self._deliveries = deliveries
        self._info = info
        self._settings = settings
        self._command = command
        self._changed = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._trainer: Trainer | None = None
        self._stopping = False

    def wake(self) -> None:
        self._changed.set()

    async def run(self) -> None:
        """Do jobs one after another until cancelled. No job's trouble ends it."""
        while True:
            self._changed.clear()
            job = None if self._stopping else await self._next()
            if job is None:
                with suppress(TimeoutError):
                    async with asyncio.timeout(_LOOK_AGAIN_S):
                        await self._changed.wait()
                continue
            self._idle.clear()
            try:
                await self._do(job)
            except Exception as error:  # the job stays as it is and is taken up again
                log.exception("job.trouble", extra={"job": job.id})
                await self._count(job, error)
                await asyncio.sleep(_TROUBLE_S)
            finally:
                self._idle.set()

    async def stop(self, deadline_s: float) -> None:
        """Begin no job; let the trainer write its checkpoint. The job goes on at the next start."""
        self._stopping = True
        if self._trainer is not None:
            await self._trainer.stop(deadline_s)
        with suppress(TimeoutError):
            async with asyncio.timeout(deadline_s):
                await self._idle.wait()

    # --- one job ---

    async def _next(self) -> Job | None:
        """The oldest one whose bot is there to show it."""
        try:
            due = await self._database.read(jobs.due)
        except StorageError as error:
            log.error("job.look_failed", extra={"error": str(error)})
            return None
        return next((job for job in due if self._deliveries.reaches(job.address)), None)

    async def _do(self, job: Job) -> None:
        if job.open:
            handle = await self._deliveries.open(await self._delivery(job), job.address)
            if not await self._publish_placed(job):
                await self._train(job, handle)
        if self._stopping and await self._is_open(job):
            return
        await self._tell_end(job)
        await asyncio.to_thread(self._clear, job)

    async def _train(self, job: Job, handle: Handle) -> None:
        """Run its trainer, or what is left for it to do, until there is a result or a reason."""
        if not await self._database.write(lambda tx: jobs.start(tx, job.id)):
            return
        if self._info.folder is None and self._command == COMMAND:
            await self._fail(job, "ours", f"the engine {self._info.model!r} has no base model to train on")
            return
        try:
            folder = await asyncio.to_thread(self._lay_out, job)
        except OSError as error:
            await self._fail(job, "ours", f"the job folder cannot be written: {error.strerror}")
            return
        while not self._stopping and await self._is_open(job):
            status, failed = await self._run_trainer(job, folder, handle)
            if not await self._is_open(job):
                return  # cancelled
            if failed is not None:
                await self._fail(job, failed.fault, _with_line(failed))
            elif status == EXIT_FINISHED:
                await self._publish(job, folder / "out")
            else:
                await self._again(job, status)

    async def _run_trainer(self, job: Job, folder: Path, handle: Handle) -> tuple[int, Failed | None]:
        """(exit status, what it said of its failure)."""
        failed: list[Failed] = []
        board = _Board(self._database, self._deliveries, job, handle)
        self._trainer = trainer = Trainer(
            folder,
            self._home.logs / f"job-{job.id}.log",
            command=self._command,
            silence_s=self._settings.silence_s,
        )

        async def hear(event: JobEvent) -> None:
            if isinstance(event, Failed):
                failed.append(event)
            await board.post(event)

        async with asyncio.TaskGroup() as tasks:
            watcher = tasks.create_task(self._watch(job, trainer), name=f"job {job.id} watcher")
            painter = tasks.create_task(board.paint(), name=f"job {job.id} painter")
            try:
                status = await trainer.run(hear)
            finally:
                self._trainer = None
                watcher.cancel()
                painter.cancel()
        log.info("trainer.ended", extra={"job": job.id, "status": status})
        return status, failed[-1] if failed else None

    async def _watch(self, job: Job, trainer: Trainer) -> None:
        """Stop the trainer of a job that is cancelled."""
        while await self._is_open(job):
            await self._changed.wait()
            self._changed.clear()
        await trainer.stop(_CANCEL_S)

    async def _again(self, job: Job, status: int) -> None:
        """It was killed, or gave up, without a word: once more from its checkpoint, but not for ever."""
        if self._stopping:
            return
        attempts = await self._database.write(lambda tx: jobs.count_attempt(tx, job.id))
        log.warning("trainer.died", extra={"job": job.id, "status": status, "attempts": attempts})
        if attempts >= _ATTEMPTS:
            how = f"signal {-status}" if status < 0 else f"exit status {status}"
            await self._fail(job, "ours", f"the trainer ended {attempts} times without progress ({how})")
        elif status == EXIT_INTERRUPTED:
            await asyncio.sleep(_TROUBLE_S)

    # --- its folder ---

    def _lay_out(self, job: Job) -> Path:
        """jobs/<id>/ with spec.json and the data. What an earlier life laid out stays."""
        folder = self._home.jobs / str(job.id)
        folder.mkdir(mode=0o700, exist_ok=True)
        if (folder / "spec.json").exists():
            return folder
        name = _DATA + "".join(Path(job.dataset).suffixes[-2:])[:20]
        shutil.copyfile(stored(self._home, job.dataset_sha256), folder / name)
        self._spec(job, name).write(folder)
        return folder

    def _spec(self, job: Job, data: str) -> Spec:
        settings, info = self._settings, self._info
        return Spec(
            job=str(job.id),
            model=str(info.folder or ""),
            fingerprint=info.fingerprint,
            data=data,
            data_sha256=job.dataset_sha256,
            label=job.label,
            instructions=job.instructions,
            device=info.device,
            threads=settings.threads,
            nice=settings.nice,
            hyper=settings.hyper,
            model_name=info.model,
        )

    def _clear(self, job: Job) -> None:
        """Nothing of people's text outlives its job."""
        shutil.rmtree(self._home.jobs / str(job.id), ignore_errors=True)
        if job.source == CONVERSATIONS:
            stored(self._home, job.dataset_sha256).unlink(missing_ok=True)

    # --- publishing ---

    async def _publish(self, job: Job, out: Path) -> None:
        try:
            candidate = await asyncio.to_thread(adapters.inspect, out)
            self._check_fits(job, candidate)
            if not await self._database.write(lambda tx: jobs.publishing(tx, job.id, candidate.sha256)):
                return
            await asyncio.to_thread(adapters.place, self._home, candidate)
        except AdapterUnusable as error:
            await self._fail(job, "ours", f"its result cannot be used: {error.detail}")
            return
        await self._write_down(job, candidate)

    async def _publish_placed(self, job: Job) -> bool:
        """Whether a crash had left only the last transaction to do."""
        sha256 = await self._database.read(lambda tx: jobs.published_folder(tx, job.id))
        folder = self._home.adapters / sha256
        if not sha256 or not await asyncio.to_thread(folder.is_dir):
            return False
        await self._write_down(job, await asyncio.to_thread(adapters.inspect, folder))
        return True

    async def _write_down(self, job: Job, candidate: Candidate) -> None:
        """The version, the job's end and what is said of it, in one transaction."""

        def work(tx: Tx) -> None:
            if jobs.state_of(tx, job.id) not in jobs.OPEN:  # cancelled meanwhile: nobody will use the folder
                return
            adapters.publish(tx, candidate, job.adapter, job.version)
            jobs.end(tx, job.id, "published", result=candidate.sha256)
            self._forget_conversations(tx, job)
            body = jobtexts.report(replace(job, state="published"), jobs.events(tx, job.id))
            keep_body(tx, new_delivery(tx, job_id=job.id), body)

        await self._database.write(work)
        log.info("job.published", extra={"job": job.id, "adapter": candidate.sha256[:12]})

    def _check_fits(self, job: Job, candidate: Candidate) -> None:
        if candidate.base_fingerprint != self._info.fingerprint:
            raise AdapterUnusable(detail="it was made for another base model than the one that is loaded")
        if candidate.dataset_sha256 != job.dataset_sha256:
            raise AdapterUnusable(detail="it was made from another data set than the job's")

    # --- ends ---

    async def _fail(self, job: Job, fault: str, reason: str) -> None:
        def work(tx: Tx) -> None:
            if jobs.end(tx, job.id, "failed", f"{fault}: {reason}"[:500]):
                self._forget_conversations(tx, job)

        await self._database.write(work)
        log.warning("job.failed", extra={"job": job.id, "fault": fault})

    def _forget_conversations(self, tx: Tx, job: Job) -> None:
        """What people said is needed by this job alone; whose it was stays written down, for /forget."""
        if job.source == CONVERSATIONS:
            tx.run("UPDATE dataset SET erased_ms = ? WHERE sha256 = ?", [tx.now_ms, job.dataset_sha256])

    async def _tell_end(self, job: Job) -> None:
        delivery_id = await self._delivery(job)

        def body(tx: Tx) -> Body | None:
            kept = kept_body(tx, delivery_id)
            ended = jobs.find(tx, job.id)
            assert ended is not None
            return kept or jobtexts.ended_body(ended, jobs.events(tx, job.id))

        said = await self._database.write(body)
        assert said is not None
        await self._deliveries.open(delivery_id, job.address)
        await self._deliveries.finish(delivery_id, job.address, said, lambda tx: None)

    async def _count(self, job: Job, error: Exception) -> None:
        """Trouble of our own, or a platform's: after a few times the job has failed, so that it holds up no other."""
        try:
            attempts = await self._database.write(lambda tx: jobs.count_attempt(tx, job.id))
            if attempts >= _ATTEMPTS and await self._is_open(job):
                reason = error.detail if isinstance(error, JobError) else type(error).__name__
                await self._fail(job, "ours", reason)
            elif attempts >= 2 * _ATTEMPTS:
                await self._database.write(lambda tx: jobs.give_up_message(tx, job.id))
        except AppError as second:
            log.error("job.not_counted", extra={"job": job.id, "error": str(second)})

    async def _delivery(self, job: Job) -> int:
        return await self._database.write(lambda tx: new_delivery(tx, job_id=job.id))

    async def _is_open(self, job: Job) -> bool:
        return await self._database.read(lambda tx: jobs.state_of(tx, job.id)) in jobs.OPEN


class _Board:
    """The job's one message: events are kept as they come, and the newest state is shown at a calm pace."""

    def __init__(self, database: Database, deliveries: Deliveries, job: Job, handle: Handle) -> None:
        self._database = database
        self._deliveries = deliveries
        self._job = job
        self._handle = handle
        self._news = asyncio.Event()
        self._news.set()
        self._kept = 0.0

    async def post(self, event: JobEvent) -> None:
        last = isinstance(event, Progress) and event.step == event.steps
        if isinstance(event, Progress) and not last and time.monotonic() - self._kept < _SHOW_S:
            return
        self._kept = time.monotonic()
        await self._database.write(lambda tx: jobs.add_event(tx, self._job.id, event))
        self._news.set()

    async def paint(self) -> None:
        while True:
            await self._news.wait()
            self._news.clear()
            events = await self._database.read(lambda tx: jobs.events(tx, self._job.id))
            try:
                async with asyncio.timeout(_SHOW_DEADLINE_S):
                    text = jobtexts.progress_text(self._job, events)
                    await self._deliveries.show(self._handle, self._job.address, text)
            except Exception as error:  # showing is best effort; the end of the job is not
                log.warning("job.show_failed", extra={"job": self._job.id, "error": type(error).__name__})
            await asyncio.sleep(_SHOW_S)


def _with_line(failed: Failed) -> str:
    return f"line {failed.line}: {failed.reason}" if failed.line else failed.reason
