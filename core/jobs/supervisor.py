"""Fine-tunes, one at a time: trained, judged by their trainer, published. Knows no torch.

queued -> running -> publishing -> published | cancelled | failed. Every step is committed before the next, so a crash
leads back to a trainer that resumes its checkpoint, or to a folder that only has to be written down.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from core import charts
from core.adapters import folders, registry
from core.adapters.folders import Candidate
from core.channels import adapter_names
from core.delivery.deliveries import Deliveries, keep_body, new_delivery
from core.engine.protocol import EngineInfo
from core.errors import AdapterUnusable, StorageFull
from core.i18n.messages import Lazy
from core.jobs import event_log, job_messages, jobs
from core.jobs.checks import CheckWorker, check_folder
from core.jobs.jobs import Job
from core.jobs.process import COMMAND
from core.jobs.progress_message import ProgressMessage
from core.jobs.protocol import EXIT_FINISHED, SHOWN, Evaluated, JobEvent, Progress
from core.jobs.resumable import begun_with
from core.jobs.worker import JobWorker, TrainingSettings, WorkerContext, with_line
from core.storage.database import Database, Tx
from core.storage.home import Home
from core.types import AdapterRef
from core.usage import ledger

log = logging.getLogger(__name__)
CANDIDATE, OUT = "candidate", "out"

__all__ = ["JobSupervisor", "TrainingSettings"]


class JobSupervisor:
    """Both lines of jobs: what is to be checked, and what is to be trained."""

    def __init__(
        self,
        database: Database,
        home: Home,
        deliveries: Deliveries,
        info: EngineInfo,
        settings: TrainingSettings,
        *,
        command: Sequence[str] = COMMAND,
        asked: Callable[[], int] = lambda: 0,
    ) -> None:
        """`asked` counts who is answered on the same machine, or waits for it: meanwhile the trainer stands still."""
        shop = WorkerContext(database, home, deliveries, info, settings, command, asked)
        self._trains = TrainingWorker(shop)
        self._checks = CheckWorker(shop, lambda: self._trains.busy)

    def wake(self) -> None:
        """There may be a job, or one less."""
        self._checks.wake()
        self._trains.wake()

    async def run(self) -> None:
        """Until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._checks.run(), name="checks")
            tasks.create_task(self._trains.run(), name="trains")

    async def stop(self, deadline_s: float) -> None:
        """Begin no job; what is trained writes its checkpoint. It goes on at the next start."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._checks.stop(deadline_s))
            tasks.create_task(self._trains.stop(deadline_s))


class TrainingWorker(JobWorker):
    action, state = "train", "running"

    def due(self, tx: Tx) -> list[Job]:
        return jobs.due(tx)

    async def work(self, job: Job) -> None:
        if not await self._publish_placed(job):
            await self._train(job)

    async def _train(self, job: Job) -> None:
        """Run its trainer, or what is left for it to do, until there is a result or a reason."""
        if not await self._database.write(lambda tx: jobs.start(tx, job.id)):
            return
        folder = self._home.jobs / str(job.id)
        try:
            champion = await self._database.read(lambda tx: self._champion(tx, job))
            if await asyncio.to_thread(self._prepare, job, folder, champion):
                await self._database.write(lambda tx: event_log.begin_anew(tx, job.id))
        except FileNotFoundError:
            await self._fail(job, "ours", Lazy("training.why_no_data"))
            return
        except OSError as error:
            _wait_out(error)
            await self._fail(job, "ours", Lazy("training.why_folder", error=error.strerror))
            return
        board = ProgressMessage(self._database, self._deliveries, job)
        await board.open(await self._delivery(job))
        while not self._stopping and await self._is_on(job):
            status, failed = await self._run_trainer(job, folder, board)
            if not await self._is_on(job):
                return  # cancelled, or cancelled and to go on: in its turn, and with another message
            if failed is not None:
                await self._fail(job, failed.fault, with_line(failed, job.language), of_use=failed.of_use)
            elif status == EXIT_FINISHED:
                await self._publish(job, folder / OUT)
            else:
                await self._again(job, status)

    # --- its folder ---

    def _champion(self, tx: Tx, job: Job) -> AdapterRef | None:
        """What the channel answers from now, which the candidate has to beat; None is the base model."""
        sha256, label = adapter_names.champion(tx, job.adapter)
        if sha256 is None or registry.by_sha(tx, sha256).base_fingerprint != self.shop.info.fingerprint:
            return None
        return AdapterRef(sha256, self._home.adapters / sha256, label)

    def _prepare(self, job: Job, folder: Path, champion: AdapterRef | None) -> bool:
        """jobs/<id>/. What an earlier life laid out stays, but for where things lie; the check has had its turn.

        What had ended goes on as it was begun, whatever the channel and the configuration say by now. On another
        base model nothing of it is of use: whether it is that.
        """
        shutil.rmtree(check_folder(self._home, job.id), ignore_errors=True)
        begun = begun_with(folder)
        if job.imported and not (folder / CANDIDATE).exists():
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            (self._home.jobs / job.imported).rename(folder / CANDIDATE)
        spec = replace(
            self._spec(job),
            champion=str(champion.folder) if champion else "",
            champion_label=champion.label if champion else adapter_names.BASE,
            candidate=CANDIDATE if job.imported else "",
        )
        if begun is None or begun.fingerprint != spec.fingerprint:
            shutil.rmtree(folder / OUT, ignore_errors=True)
        elif (folder / begun.data).exists():
            before = str(self._home.adapters / Path(begun.champion).name) if begun.champion else ""
            here = {name: getattr(spec, name) for name in ("model", "cache", "device", "threads", "nice")}
            replace(begun, champion=before, **here).write(folder)
            return False
        else:
            spec = replace(spec, instructions=begun.instructions, hyper=begun.hyper)
        self._lay_out(job, folder, spec)
        return begun is not None and begun.fingerprint != spec.fingerprint

    # --- publishing ---

    async def _publish(self, job: Job, out: Path) -> None:
        try:
            candidate = await asyncio.to_thread(folders.inspect, out)
            if unfit := self._unfit(job, candidate):
                await self._fail(job, "ours", Lazy(unfit), of_use=False)
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
        await self._write_down(job, candidate)

    async def _publish_placed(self, job: Job) -> bool:
        """Whether a crash had left only the last transaction to do."""
        sha256 = await self._database.read(lambda tx: jobs.published_folder(tx, job.id))
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
        await self._write_down(job, candidate)
        return True

    async def _refuse(self, job: Job, error: AdapterUnusable) -> None:
        """Its result is no good; but a disk that cannot be read just now may be tried again. Raises AdapterUnusable."""
        cause = error.__cause__
        if isinstance(cause, OSError) and not isinstance(cause, FileNotFoundError | NotADirectoryError):
            raise error
        log.error("job.result_unusable", extra={"job": job.id, "error": error.detail})
        await self._fail(job, "ours", Lazy("training.why_result"))

    async def _write_down(self, job: Job, candidate: Candidate) -> None:
        """The version, the job's end, its charge and what is said of it, in one transaction."""
        events = await self._database.read(lambda tx: event_log.events(tx, job.id))
        curve = self._home.sent / f"{job.adapter}-{job.version}-loss-{job.id}.png"
        picture = await asyncio.to_thread(_draw_curve, events, curve)
        shown = await asyncio.to_thread(self._read_shown, job)

        def work(tx: Tx) -> None:
            if jobs.state_of(tx, job.id) not in jobs.OPEN:  # cancelled meanwhile: nobody will use the folder
                return
            registry.publish(tx, candidate, job.adapter, job.version)
            jobs.end(tx, job.id, "published", result=candidate.sha256)
            ledger.charge_job(tx, job.id, candidate.trained_tokens)
            jobs.keep_shown(tx, job.id, shown)
            published = jobs.find(tx, job.id)
            assert published is not None
            body = job_messages.report(published, event_log.events(tx, job.id))
            keep_body(tx, new_delivery(tx, job_id=job.id), replace(body, files=(picture,) if picture else ()))

        await self._database.write(work)
        log.info("job.published", extra={"job": job.id, "adapter": candidate.sha256[:12]})

    def _read_shown(self, job: Job) -> str:
        """What the trainer left to show; nothing where a crash has taken it, which costs a job nothing."""
        try:
            return (self._home.jobs / str(job.id) / SHOWN).read_text("utf-8")
        except (OSError, ValueError):
            return ""

    def _unfit(self, job: Job, candidate: Candidate) -> str:
        """Why it is not what the job was to make, or ""."""
        if candidate.base_fingerprint != self.shop.info.fingerprint:
            return "training.why_other_base"
        return "" if candidate.dataset_sha256 == job.dataset_sha256 else "training.why_other_data"


def _draw_curve(events: Sequence[JobEvent], path: Path) -> Path | None:
    """The loss curve of a job: training, validation, and the losses of the gate on the test rows."""
    evaluated = [event for event in events if isinstance(event, Evaluated)]
    return charts.loss_curve(
        [(event.step, event.loss) for event in events if isinstance(event, Progress)],
        [(event.step, event.loss) for event in evaluated if event.split == "validation"],
        {event.who: event.loss for event in evaluated if event.split == "test"},
        path,
    )


def _wait_out(error: OSError) -> None:
    """Raises StorageFull for a full disk: until there is room, nothing that was learned is lost for it."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        raise StorageFull(detail=str(error)) from error
