"""A home with two channels, a fake bot and the supervisor of its jobs, over real processes of fake_trainer."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from core.channels import bindings, directory
from core.chat import conversations, dispatch
from core.commands.parser import parse
from core.delivery.deliveries import Deliveries
from core.engine.protocol import EngineInfo
from core.jobs import commands, datasets
from core.jobs.commands import PreparedData
from core.jobs.supervisor import JobSupervisor
from core.jobs.worker import TrainingSettings, WorkerContext
from core.storage.cipher import Cipher
from core.storage.database import Database, Row, Tx
from core.storage.home import Home
from core.types import Address, Body, Caller, Handle, Receipt
from tests.support.fake_trainer import COMMAND
from tests.support.roles import prepared_for
from tests.support.running_service import FakeBot, prepare

INFO = EngineInfo("fake", "f" * 64, "fake", 1000)
WAIT_S = 20


class WatchedBot(FakeBot):
    """Tells when something was written."""

    def __init__(self) -> None:
        super().__init__()
        self.changed = asyncio.Condition()

    async def show(self, handle: Handle, text: str) -> None:
        await super().show(handle, text)
        async with self.changed:
            self.changed.notify_all()

    async def finish(self, handle: Handle, body: Body) -> Receipt:
        receipt = await super().finish(handle, body)
        async with self.changed:
            self.changed.notify_all()
        return receipt

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(WAIT_S), self.changed:
            await self.changed.wait_for(condition)

    @property
    def newest(self) -> str:
        """What the message that was opened last shows now."""
        return (self.shown[list(self.opened)[-1]] or [""])[-1] if self.opened else ""


@dataclass
class RunningJobs:
    database: Database
    home: Home
    deliveries: Deliveries
    training: JobSupervisor
    bot: WatchedBot
    tasks: list[asyncio.Task[None]] = field(default_factory=list)

    def caller(self, tx: Tx, place: str = "p", language: str = "en") -> Caller:
        at = Address("fake", "bot", place, "c")
        channel = bindings.channel_for(tx, "fake", "bot", place)
        assert channel is not None
        conversation = conversations.conversation_id(tx, at, channel.id)
        return Caller(tx.cipher.hash_user("fake", "bot", "owner-id"), at, channel, language, 0, conversation)

    async def order(self, word: str = "", *, place: str = "p", language: str = "en", agreed: bool = True) -> int:
        """Bring a data set and begin a job on it, with a yes or without; its number."""
        data = (json.dumps({"word": word, "q": "a question", "a": "an answer"}) + "\n").encode()
        sha256 = hashlib.sha256(data).hexdigest()
        await asyncio.to_thread((self.home.datasets / sha256).write_bytes, data)
        brought = PreparedData(sha256, "faq.jsonl", agreed)

        def work(tx: Tx) -> int:
            datasets.keep_dataset(tx, sha256, "faq.jsonl", source="file", size_bytes=len(data), brought_by="someone")
            commands.begin(tx, self.caller(tx, place, language), parse("/finetune"), brought)
            return int(tx.value("SELECT max(id) FROM job"))

        job_id = await self.database.write(work)
        self.training.wake()
        return job_id

    async def say(self, text: str, *, place: str = "p") -> str:
        """Say it as the operator; its answer."""

        def work(tx: Tx) -> str:
            call = parse(text)
            return dispatch.run(tx, self.caller(tx, place), call, prepared_for(call)).body.text

        answer = await self.database.write(work)
        self.training.wake()
        return answer

    async def ended(self, messages: int = 1) -> str:
        """Wait until so many messages have their last form; what the newest says."""
        await self.bot.until(lambda: len(self.bot.final) == messages)
        return self.bot.said()[-1]

    async def job(self, job_id: int) -> Row:
        row = await self.database.read(lambda tx: tx.one("SELECT * FROM job WHERE id = ?", [job_id]))
        assert row is not None
        return row

    async def versions(self) -> list[Row]:
        return await self.database.read(lambda tx: tx.all("SELECT name, version, sha256 FROM adapter"))

    async def warned(self, job_id: int) -> list[str]:
        rows = await self.database.read(
            lambda tx: tx.all("SELECT data FROM job_event WHERE job_id = ? AND kind = 'warned' ORDER BY seq", [job_id])
        )
        return [json.loads(row["data"])["text"] for row in rows]

    def folder(self, job_id: int) -> Path:
        return self.home.jobs / str(job_id)

    async def run(self) -> None:
        """Begin to supervise."""
        self.tasks.append(asyncio.create_task(self.training.run()))

    async def stop(self, deadline_s: float = 10.0) -> None:
        await self.training.stop(deadline_s)
        await self.kill()

    async def kill(self) -> None:
        """As if the program were gone, but for the tasks' ends, which the kernel would see to."""
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        self.tasks.clear()


def _settle(tx: Tx) -> None:
    prepare(tx)
    second = directory.create_channel(tx, "delta", title="Delta")
    bindings.bind(tx, "fake", "bot", "q", second.id)


@asynccontextmanager
async def running_jobs(
    folder: Path,
    *,
    settings: TrainingSettings | None = None,
    command: tuple[str, ...] = COMMAND,
    info: EngineInfo = INFO,
    bot: WatchedBot | None = None,
    running: bool = True,
) -> AsyncIterator[RunningJobs]:
    """Opening it twice one after another is a restart of the program; the same `bot` is the same platform."""
    home = Home(folder)
    home.create()
    async with Database(home.database, Cipher(b"k" * 32)) as database:
        if await database.read(lambda tx: tx.value("SELECT count(*) FROM channel")) == 0:
            await database.write(_settle)
        deliveries = Deliveries(database)
        chosen = settings or TrainingSettings(retry_s=0.01)
        training = JobSupervisor(WorkerContext(database, home, deliveries, info, chosen, command))
        made = RunningJobs(database, home, deliveries, training, bot or WatchedBot())
        deliveries.register("fake", "bot", made.bot)
        if running:
            await made.run()
        try:
            yield made
        finally:
            await made.stop()
