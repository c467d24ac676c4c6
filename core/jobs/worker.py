"""A line of jobs and the loop that works it off: one at a time, trouble put off, its end told. Knows no kind of work.

There are two: what is to be checked (core.jobs.checks) and what is to be trained (core.jobs.supervisor). Neither waits
for the other, and no job's trouble holds up those behind it.
"""

from __future__ import annotations

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
from core.engine.protocol import EngineInfo
from core.errors import AppError, JobError, StorageError
from core.i18n.messages import Lazy, say
from core.jobs import datasets, event_log, job_messages, jobs
from core.jobs.dataset_files import stored
from core.jobs.jobs import Job
from core.jobs.process import COMMAND, TrainerProcess, usher
from core.jobs.progress_message import ProgressMessage
from core.jobs.protocol import Failed, JobEvent, Spec
from core.jobs.resumable import empty, has_learned
from core.storage.database import Database, Tx
from core.storage.home import Home
from core.types import Body

log = logging.getLogger(__name__)
LOOK_AGAIN_S = 30.0
_LONGEST_WAIT_S = 600.0
_CANCEL_S = 15.0
_ATTEMPTS = 3  # trainers that end without progress
_TRIES = 8  # at all else, a platform that is away included: about ten minutes
_DATA = "data"


@dataclass(frozen=True, slots=True)
class TrainingSettings:
    """A trainer that says nothing for `silence_s` is taken for dead. After trouble `retry_s` pass, then ever more."""

    hyper: HyperParameters = field(default_factory=HyperParameters)
    presets: Mapping[str, HyperParameters] = field(default_factory=dict)  # instead of `hyper`, for a job that names one
    threads: int = 1
    nice: int = 10
    silence_s: float = 600.0
    retry_s: float = 5.0
    ask_s: float = 86_400.0  # so long a checked job waits for a yes


@dataclass(frozen=True, slots=True)
class WorkerContext:
    """What every lane works with."""

    database: Database
    home: Home
    deliveries: Deliveries
    info: EngineInfo
    settings: TrainingSettings
    command: Sequence[str] = COMMAND
    asked: Callable[[], int] = lambda: 0  # how many are answered on the same machine, or wait for it


@dataclass(frozen=True, slots=True)
class _Postponed:
    """How often a job could not be done for a reason that is not the job's, and until when it is put off."""

    tries: int
    until: float  # of time.monotonic


class JobWorker(ABC):
    """`run` must be running for jobs to be done; `wake` says that there may be one, or one less."""

    action = ""  # what `python -m finetune` is asked to do
    state = ""  # of a job while it does it

    def __init__(self, shop: WorkerContext) -> None:
        self.shop = shop
        self._database, self._home, self._deliveries = shop.database, shop.home, shop.deliveries
        self._settings = shop.settings
        self._changed = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._trainer: TrainerProcess | None = None
        self._stopping = False
        self._troubles: dict[int, _Postponed] = {}

    # --- what a kind of work is ---

    @abstractmethod
    def due(self, tx: Tx) -> list[Job]:
        """What there is to do, oldest first."""

    @abstractmethod
    async def work(self, job: Job) -> None:
        """Bring it to its end, or leave it open because this program ends."""

    async def between(self) -> None:  # noqa: B027  # a lane may have nothing to look at
        """What is to be looked at from time to time."""

    # --- the loop ---

    @property
    def busy(self) -> bool:
        return not self._idle.is_set()

    def wake(self) -> None:
        self._changed.set()

    async def run(self) -> None:
        """Do jobs one after another until cancelled. No job's trouble ends it, or holds up the others."""
        while True:
            self._changed.clear()
            job = None if self._stopping else await self._next()
            if job is None:
                await self._wait(self._settings.retry_s if self._troubles else LOOK_AGAIN_S)
                continue
            self._idle.clear()
            try:
                await self._do(job)
                self._troubles.pop(job.id, None)
            except Exception as error:  # the job stays as it is and is taken up again
                log.exception("job.trouble", extra={"job": job.id})
                await self._postpone(job, _cause(error))
            finally:
                self._idle.set()

    async def stop(self, deadline_s: float) -> None:
        """Begin no job; let the trainer write its checkpoint. The job goes on at the next start."""
        self._stopping = True
        self._changed.set()
        if self._trainer is not None:
            await self._trainer.stop(deadline_s)
        with suppress(TimeoutError):
            async with asyncio.timeout(deadline_s):
                await self._idle.wait()

    async def _wait(self, seconds: float) -> None:
        """Until something has changed, or so long."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._changed.wait()

    async def _next(self) -> Job | None:
        """The oldest one whose bot is there to show it, and that is not put off."""
        try:
            await self.between()
            due = await self._database.read(self.due)
        except StorageError as error:
            log.error("job.look_failed", extra={"error": str(error)})
            return None
        self._troubles = {job.id: self._troubles[job.id] for job in due if job.id in self._troubles}
        now = time.monotonic()
        ready = (job for job in due if job.id not in self._troubles or self._troubles[job.id].until <= now)
        return next((job for job in ready if self._deliveries.reaches(job.address)), None)

    async def _do(self, job: Job) -> None:
        if job.open and self.shop.info.folder is None and self.shop.command == COMMAND:
            await self._fail(job, "ours", Lazy("training.why_no_base", model=self.shop.info.model))
        elif job.open:
            await self.work(job)
        ended = await self._database.read(lambda tx: jobs.find(tx, job.id))
        assert ended is not None
        if ended.state in jobs.OPEN and ended.state != "waiting":
            return  # this program ends: the job goes on at the next start; or it is another lane's now
        if ended.state != "waiting":
            await self._clear(job)
        await self._tell(job)

    async def _postpone(self, job: Job, error: Exception) -> None:
        """Trouble of our own, or of a platform: the others first. After some tries the job, or its message, is over."""
        tries = self._troubles[job.id].tries + 1 if job.id in self._troubles else 1
        wait_s = min(self._settings.retry_s * 2 ** (tries - 1), _LONGEST_WAIT_S)
        self._troubles[job.id] = _Postponed(tries, time.monotonic() + wait_s)
        if tries < _TRIES or isinstance(error, StorageError):  # a full disk is waited out
            return
        try:
            if await self._is_open(job) and not await self._database.read(lambda tx: jobs.is_asking(tx, job.id)):
                await self._fail(job, "ours", _reason(error))
                self._troubles[job.id] = _Postponed(0, 0)
            else:
                await self._database.write(lambda tx: jobs.give_up_message(tx, job.id))
                del self._troubles[job.id]
        except AppError as second:
            log.error("job.not_given_up", extra={"job": job.id, "error": str(second)})

    # --- its trainer ---

    async def _run_trainer(self, job: Job, folder: Path, board: ProgressMessage) -> tuple[int, Failed | None]:
        """(exit status, what it said of its failure)."""
        failed: list[Failed] = []
        self._trainer = trainer = TrainerProcess(
            folder,
            self._home.logs / f"job-{job.id}.log",
            action=self.action,
            command=self.shop.command,
            silence_s=self._settings.silence_s,
        )

        async def hear(event: JobEvent) -> None:
            if isinstance(event, Failed):
                failed.append(event)
            await board.post(event)

        async with asyncio.TaskGroup() as tasks:
            watcher = tasks.create_task(self._watch(job, trainer), name=f"job {job.id} watcher")
            painter = tasks.create_task(board.paint(), name=f"job {job.id} painter")
            ushering = tasks.create_task(usher(trainer, self.shop.asked), name=f"job {job.id} usher")
            try:
                status = await trainer.run(hear)
            finally:
                self._trainer = None
                watcher.cancel()
                painter.cancel()
                ushering.cancel()
        log.info("trainer.ended", extra={"job": job.id, "status": status})
        return status, failed[-1] if failed else None

    async def _watch(self, job: Job, trainer: TrainerProcess) -> None:
        """Stop the trainer of a job that is cancelled, also where it is to go on already: that is another turn."""
        while await self._is_on(job):
            await self._wait(LOOK_AGAIN_S)
            self._changed.clear()
        await trainer.stop(_CANCEL_S)

    async def _again(self, job: Job, status: int) -> None:
        """It was killed, or gave up, without a word: once more from its checkpoint, but not for ever."""
        if self._stopping:
            return
        attempts = await self._database.write(lambda tx: jobs.count_attempt(tx, job.id))
        log.warning("trainer.died", extra={"job": job.id, "status": status, "attempts": attempts})
        if attempts >= _ATTEMPTS:
            how = Lazy("training.by_signal" if status < 0 else "training.by_status", n=abs(status))
            await self._fail(job, "ours", Lazy("training.why_died", n=attempts, how=how))
        else:
            await self._wait(self._settings.retry_s)

    # --- its folder ---

    def _lay_out(self, job: Job, folder: Path, spec: Spec) -> None:
        """A job folder with spec.json and the data. Raises OSError; FileNotFoundError where the data set is gone."""
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        aside = folder / f"{spec.data}.new"  # what has the right name is whole, also after a cut
        shutil.copyfile(stored(self._home, job.dataset_sha256), aside)
        aside.replace(folder / spec.data)
        spec.write(folder)

    def _spec(self, job: Job) -> Spec:
        """What both kinds of work need to know."""
        settings, info = self._settings, self.shop.info
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
        """Nothing that holds people's text outlives its job: data, and a result that nobody will use.

        What one that may go on has learned stays, for as long as its data set does (core.privacy.retention).
        """
        lasting = await self._database.read(lambda tx: jobs.resumable(tx, job.id) or _goes_on(tx, job))
        unused = await self._database.read(lambda tx: jobs.unpublished_folder(tx, job.id))

        def remove() -> None:
            empty(self._home.jobs / str(job.id), keep_learned=lasting)
            if unused:
                shutil.rmtree(self._home.adapters / unused, ignore_errors=True)

        await asyncio.to_thread(remove)
        await self._clear_data(job)

    async def _clear_data(self, job: Job) -> None:
        """The file of its data set, where that is erased."""
        if await self._database.read(lambda tx: datasets.is_erased(tx, job.dataset_sha256)):
            await asyncio.to_thread(stored(self._home, job.dataset_sha256).unlink, missing_ok=True)

    # --- ends ---

    async def _fail(self, job: Job, fault: str, reason: str, *, of_use: bool = True) -> None:
        """`reason` is a sentence of ours, or what the trainer has said in the job's language.

        `of_use`: whether it may go on from what it has learned, where it has.
        """
        told = reason.render(job.language) if isinstance(reason, Lazy) else reason
        learned = of_use and await asyncio.to_thread(has_learned, self._home.jobs / str(job.id))
        await self._database.write(lambda tx: jobs.fail(tx, job.id, fault, told, learned=learned))
        log.warning("job.failed", extra={"job": job.id, "fault": fault})

    async def _tell(self, job: Job) -> None:
        """The last form of the job's message, unless nobody waits for one. A question was stored when it was asked."""
        delivery_id = await self._delivery(job)

        def body(tx: Tx) -> Body | None:
            if jobs.is_told(tx, job.id) or _goes_on(tx, job):
                return None
            kept = kept_body(tx, delivery_id)
            if kept is None:
                kept = end(tx)
                keep_body(tx, delivery_id, kept)
            return kept

        def end(tx: Tx) -> Body:
            ended = jobs.find(tx, job.id)
            assert ended is not None
            return job_messages.ended_body(ended, event_log.events(tx, job.id), resumable=jobs.resumable(tx, job.id))

        if await self._database.write(body) is None:
            return
        await self._deliveries.open(delivery_id, job.address)
        # Cancelled meanwhile it asks no more; resumed meanwhile, its end is not told any more.
        said = await self._database.write(lambda tx: None if _goes_on(tx, job) else body(tx) or end(tx))
        if said is None:
            return
        await self._deliveries.finish(delivery_id, job.address, said, lambda tx: None)

    async def _delivery(self, job: Job) -> int:
        return await self._database.write(lambda tx: new_delivery(tx, job_id=job.id))

    async def _is_open(self, job: Job) -> bool:
        return await self._database.read(lambda tx: jobs.state_of(tx, job.id)) in jobs.OPEN

    async def _is_on(self, job: Job) -> bool:
        return await self._database.read(lambda tx: jobs.state_of(tx, job.id)) == self.state


def _goes_on(tx: Tx, job: Job) -> bool:
    """Whether it has ended and was resumed since: what it says next is another message."""
    return jobs.state_of(tx, job.id) in jobs.AT_WORK


def with_line(failed: Failed, language: str) -> str:
    """What it said of its failure, after the line, unless the reason itself says which."""
    before = say(language, "data.line", line=failed.line, reason="").strip()
    known = not failed.line or before in failed.reason
    return failed.reason if known else say(language, "data.line", line=failed.line, reason=failed.reason)


def _reason(error: Exception) -> Lazy:
    """What is told of it: its own sentence, or its name."""
    if isinstance(error, JobError):
        return Lazy(error.key, **error.fields)
    return Lazy("training.why_unexpected", error=type(error).__name__)


def _cause(error: Exception) -> Exception:
    """What really went wrong, where a task group has wrapped it."""
    while isinstance(error, ExceptionGroup):
        error = error.exceptions[0]
    return error
