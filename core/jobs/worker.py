"""Worker for one job queue: runs jobs one at a time, retries with backoff, sends the final message of each.

Two workers run side by side: core.jobs.checks for data sets, core.jobs.supervisor for training. A job that fails for
a reason outside of it is retried later, and the jobs behind it come first.
"""

import asyncio
import logging
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from core.config.sections import HyperParameters
from core.delivery.deliveries import Deliveries, keep_body, kept_body, new_delivery
from core.delivery.retry import is_storage_unavailable
from core.engine.protocol import EngineInfo
from core.errors import AppError, JobError, StorageError
from core.i18n.messages import Lazy
from core.jobs import datasets, event_log, jobs, messages
from core.jobs.jobs import Job
from core.jobs.process import COMMAND, TrainerProcess, pause_under_load
from core.jobs.progress import ProgressMessage
from core.jobs.protocol import Failed, JobEvent, Spec
from core.platform import Unreachable
from core.storage import lifecycle
from core.storage.database import Database, Tx
from core.storage.home import Home
from core.types import Body

log = logging.getLogger(__name__)
POLL_S = 30.0
_LONGEST_BACKOFF_S = 600.0
_CANCEL_S = 15.0
_ATTEMPTS = 3  # trainer processes that end without progress
_TRIES = 8  # of anything else, a platform's message included: about ten minutes
_DATA = "data"
_CHECKPOINT = "checkpoint"
_RESUMABLE_FILES = {"spec.json", _CHECKPOINT, "own-answers.json"}


@dataclass(frozen=True, slots=True)
class TrainingSettings:
    """`silence_s`: a trainer without output for so long is killed. `retry_s`: the first wait of the backoff."""

    hyper: HyperParameters = field(default_factory=HyperParameters)
    presets: Mapping[str, HyperParameters] = field(default_factory=dict)  # replace `hyper` for a job that names one
    threads: int = 1
    nice: int = 10
    silence_s: float = 600.0
    retry_s: float = 5.0
    ask_s: float = 86_400.0  # a checked job that nobody starts expires after so long


@dataclass(frozen=True, slots=True)
class WorkerContext:
    """`load` counts replies that are generated on the same machine or wait for it; the trainer is paused meanwhile."""

    database: Database
    home: Home
    deliveries: Deliveries
    info: EngineInfo
    settings: TrainingSettings
    command: Sequence[str] = COMMAND
    load: Callable[[], int] = lambda: 0


class JobWorker(ABC):
    """Runs jobs while `run` runs; `wake` makes it look at the queue, and at the state of the running job."""

    action = ""  # argument of `python -m finetune`
    state = ""  # of a job while the worker runs it

    def __init__(self, context: WorkerContext) -> None:
        self.context = context
        self._database, self._home, self._deliveries = context.database, context.home, context.deliveries
        self._settings = context.settings
        self._changed = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._trainer: TrainerProcess | None = None
        self._stopping = False
        self._retries: dict[int, tuple[int, float]] = {}  # job -> (failed tries, next one by time.monotonic)

    @abstractmethod
    def due(self, tx: Tx) -> list[Job]:
        """The queue, oldest job first."""

    @abstractmethod
    async def work(self, job: Job) -> None:
        """Bring the job to its end, or leave it open while this program stops."""

    async def before_next(self) -> None:  # noqa: B027  # optional
        """Called before each look at the queue."""

    # --- loop ---

    @property
    def busy(self) -> bool:
        return not self._idle.is_set()

    def wake(self) -> None:
        self._changed.set()

    async def run(self) -> None:
        """Run jobs one after another until cancelled."""
        while True:
            self._changed.clear()
            job = None if self._stopping else await self._next()
            if job is None:
                await self._wait(self._settings.retry_s if self._retries else POLL_S)
                continue
            self._idle.clear()
            try:
                await self._run_job(job)
                self._retries.pop(job.id, None)
            except Exception as error:  # the job stays open
                log.exception("job.error", extra={"job": job.id})
                while isinstance(error, ExceptionGroup):
                    error = error.exceptions[0]
                await self._retry_later(job, error)
            finally:
                self._idle.set()

    async def stop(self, deadline_s: float) -> None:
        """Start no job, and let the trainer write its checkpoint. The job continues at the next start."""
        self._stopping = True
        self._changed.set()
        if self._trainer is not None:
            await self._trainer.stop(deadline_s)
        with suppress(TimeoutError):
            async with asyncio.timeout(deadline_s):
                await self._idle.wait()

    async def _wait(self, seconds: float) -> None:
        """Wait for `wake`, at most so long."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._changed.wait()

    async def _next(self) -> Job | None:
        """The oldest due job whose bot is running and whose backoff is over."""
        try:
            await self.before_next()
            due = await self._database.read(self.due)
        except StorageError as error:
            log.error("job.queue_unreadable", extra={"error": str(error)})
            return None
        self._retries = {job.id: self._retries[job.id] for job in due if job.id in self._retries}
        now = time.monotonic()
        ready = (job for job in due if job.id not in self._retries or self._retries[job.id][1] <= now)
        return next((job for job in ready if self._deliveries.reaches(job.address)), None)

    async def _run_job(self, job: Job) -> None:
        if job.open and self.context.info.folder is None and self.context.command == COMMAND:
            await self._fail(job, "ours", Lazy("training.why_no_base", model=self.context.info.model))
        elif job.open:
            await self.work(job)
        ended = await self._database.read(lambda tx: jobs.get(tx, job.id))
        if ended.state in jobs.OPEN and ended.state != "waiting":
            return  # this program stops, or the other worker has the job
        if ended.state != "waiting":
            await self._clear(job)
        await self._send_final(job)

    async def _retry_later(self, job: Job, error: Exception) -> None:
        """Back off after an error of this program or a platform; after _TRIES, fail the job or drop its message.

        The policy of core.delivery.retry: no bound while the storage cannot write, one try of an unreachable place.
        """
        tries = self._retries.get(job.id, (0, 0))[0] + 1
        wait_s = min(self._settings.retry_s * 2 ** (tries - 1), _LONGEST_BACKOFF_S)
        self._retries[job.id] = tries, time.monotonic() + wait_s
        if is_storage_unavailable(error) or (tries < _TRIES and not isinstance(error, Unreachable)):
            return
        try:
            state = await self._database.read(lambda tx: jobs.state_of(tx, job.id))
            if state in jobs.OPEN and state != "waiting":
                unexpected = Lazy("training.why_unexpected", error=type(error).__name__)
                reason = Lazy(error.key, **error.fields) if isinstance(error, JobError) else unexpected
                await self._fail(job, "ours", reason)
                self._retries[job.id] = 0, 0
            else:
                await self._database.write(lambda tx: jobs.drop_message(tx, job.id))
                del self._retries[job.id]
        except AppError as second:
            log.error("job.not_failed", extra={"job": job.id, "error": str(second)})

    # --- trainer ---

    async def _run_trainer(
        self, job: Job, folder: Path, progress: ProgressMessage | None = None
    ) -> tuple[int, Failed | None]:
        """Run one trainer process, store its events and show them; (exit status, its `failed` event)."""
        failed: list[Failed] = []
        log_file = self._home.logs / f"job-{job.id}.log"
        command, silence_s = self.context.command, self._settings.silence_s
        trainer = TrainerProcess(folder, log_file, action=self.action, command=command, silence_s=silence_s)
        self._trainer = trainer

        async def on_event(event: JobEvent) -> None:
            if isinstance(event, Failed):
                failed.append(event)
            if progress is not None:
                await progress.add(event)
            else:
                await self._database.write(lambda tx: jobs.add_event(tx, job.id, event))

        beside = [self._stop_when_cancelled(job, trainer), pause_under_load(trainer, self.context.load)]
        beside += [progress.show()] if progress is not None else []
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one, name=f"job {job.id}") for one in beside]
            try:
                status = await trainer.run(on_event)
            finally:
                self._trainer = None
                for task in tasks:
                    task.cancel()
        log.info("trainer.ended", extra={"job": job.id, "status": status})
        return status, failed[-1] if failed else None

    async def _stop_when_cancelled(self, job: Job, trainer: TrainerProcess) -> None:
        """Stop the trainer once the job has left `state`; a job resumed meanwhile is queued again."""
        while await self._is_active(job):
            await self._wait(POLL_S)
            self._changed.clear()
        await trainer.stop(_CANCEL_S)

    async def _retry_trainer(self, job: Job, status: int) -> None:
        """Wait before the next process after one that ended without a result; fail the job after _ATTEMPTS."""
        if self._stopping:
            return
        attempts = await self._database.write(lambda tx: jobs.count_attempt(tx, job.id))
        log.warning("trainer.died", extra={"job": job.id, "status": status, "attempts": attempts})
        if attempts >= _ATTEMPTS:
            how = Lazy("training.by_signal" if status < 0 else "training.by_status", n=abs(status))
            await self._fail(job, "ours", Lazy("training.why_died", n=attempts, how=how))
        else:
            await self._wait(self._settings.retry_s)

    # --- job folder ---

    def _lay_out(self, job: Job, folder: Path, spec: Spec) -> None:
        """Write the data and spec.json. Raises OSError; FileNotFoundError where the data set is erased."""
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        new = folder / f"{spec.data}.new"  # renamed when complete
        shutil.copyfile(datasets.path_of(self._home, job.dataset_sha256), new)
        new.replace(folder / spec.data)
        spec.write(folder)

    def _spec(self, job: Job) -> Spec:
        """The keys that both actions share."""
        settings, info = self._settings, self.context.info
        return Spec(
            job=str(job.id),
            model=str(info.folder or ""),
            fingerprint=info.fingerprint,
            data=_DATA + "".join(Path(job.dataset).suffixes[-2:])[:20],
            data_sha256=job.dataset_sha256,
            label=job.label,
            instructions=job.instructions,
            language=job.language,
            device=info.device,
            threads=settings.threads,
            nice=settings.nice,
            cache=str(self._home.models / "answers"),
            hyper=settings.presets.get(job.preset, settings.hyper),
            model_name=info.model,
            columns=dict(job.columns),
        )

    async def _clear(self, job: Job) -> None:
        """Remove the data, and a result that no version uses; a resumable job keeps its resumable state."""
        keep = await self._database.read(lambda tx: jobs.resumable(tx, job.id) or _is_resumed(tx, job))
        kept = _RESUMABLE_FILES if keep else set()
        await asyncio.to_thread(_empty, self._home.jobs / str(job.id), kept)
        if unused := await self._database.read(lambda tx: event_log.unpublished_folder(tx, job.id)):
            await asyncio.to_thread(shutil.rmtree, self._home.adapters / unused, ignore_errors=True)
        await self._remove_erased(job)

    async def _remove_erased(self, job: Job) -> None:
        if await self._database.read(lambda tx: datasets.is_erased(tx, job.dataset_sha256)):
            await asyncio.to_thread(datasets.path_of(self._home, job.dataset_sha256).unlink, missing_ok=True)

    # --- end ---

    async def _fail(self, job: Job, fault: str, reason: Lazy | str, *, resumable: bool = True) -> None:
        """Fail the job. `resumable`: its checkpoint, if any, may be continued from."""
        text = reason.render(job.language) if isinstance(reason, Lazy) else reason
        kept = resumable and await asyncio.to_thread(_has_checkpoint, self._home.jobs / str(job.id))
        await self._database.write(lambda tx: jobs.fail(tx, job.id, fault, text, resumable=kept))
        log.warning("job.failed", extra={"job": job.id, "fault": fault})

    async def _fail_folder(self, job: Job, error: OSError) -> None:
        """Fail a job whose folder cannot be laid out."""
        lost = isinstance(error, FileNotFoundError)
        why = Lazy("training.why_no_data") if lost else Lazy("training.why_folder", error=error.strerror)
        await self._fail(job, "ours", why)

    async def _send_final(self, job: Job) -> None:
        """Send the question or the end of the job, unless it is sent, dropped, or the job was resumed."""
        delivery_id = await self._delivery(job)

        def stored_body(tx: Tx) -> Body | None:
            if jobs.is_delivered(tx, job.id) or _is_resumed(tx, job):
                return None
            body = kept_body(tx, delivery_id)
            if body is None:
                body = end_body(tx)
                keep_body(tx, delivery_id, body)
            return body

        def end_body(tx: Tx) -> Body:
            ended = jobs.get(tx, job.id)
            return messages.ended_body(ended, event_log.events(tx, job.id), resumable=jobs.resumable(tx, job.id))

        if await self._database.write(stored_body) is None:
            return
        await self._deliveries.open(delivery_id, job.address)
        # The job may have been cancelled or resumed while the message was opened.
        body = await self._database.write(lambda tx: None if _is_resumed(tx, job) else stored_body(tx) or end_body(tx))
        if body is not None:
            await self._deliveries.finish(delivery_id, job.address, body, lambda tx: None)

    async def _delivery(self, job: Job) -> int:
        return await self._database.write(lambda tx: new_delivery(tx, job_id=job.id))

    async def _is_active(self, job: Job) -> bool:
        return await self._database.read(lambda tx: jobs.state_of(tx, job.id)) == self.state


def _is_resumed(tx: Tx, job: Job) -> bool:
    """Whether a job that had ended was resumed: its next message is a new one."""
    return jobs.state_of(tx, job.id) in jobs.AT_WORK


def _has_checkpoint(folder: Path) -> bool:
    """Whether a checkpoint exists; True where the file system cannot tell."""
    try:
        return bool((folder / _CHECKPOINT).stat())
    except OSError as error:
        return not isinstance(error, FileNotFoundError | NotADirectoryError)


def _empty(folder: Path, keep: set[str]) -> None:
    """Remove what is in the folder but `keep`, and the folder where nothing is kept; errors are ignored."""
    try:
        paths = lifecycle.entries(folder)
    except OSError:
        return
    for path in paths if any(path.name in keep for path in paths) else [folder]:
        if path.name not in keep:
            shutil.rmtree(path, ignore_errors=True)  # ignores a file
            with suppress(OSError):
                path.unlink()
