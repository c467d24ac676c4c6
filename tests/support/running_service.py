"""A whole core on a temporary home: real store, real service, scripted engine, and a fake bot that records."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from core.channels import bindings, directory, terminal
from core.chat.service import Service, ServiceSettings
from core.config.schema import Retention
from core.delivery.deliveries import Deliveries
from core.engine.protocol import Request
from core.engine.scripted import ScriptedEngine
from core.errors import AppError
from core.jobs.supervisor import JobSupervisor
from core.jobs.worker import TrainingSettings, WorkerContext
from core.storage.cipher import Cipher
from core.storage.database import Database, Tx, now_ms
from core.storage.home import Home
from core.types import Address, Attachment, Body, Handle, Incoming, Kind, Lane, Receipt
from tests.support.waiting import DEADLINE_S

OWNER, STRANGER = "owner-id", "stranger-id"


class FakeBot:
    """An sink that keeps what it was told, and fails as often as it is asked to."""

    def __init__(self) -> None:
        self.shown: dict[Handle, list[str]] = defaultdict(list)
        self.final: dict[Handle, Body] = {}
        self.failed: dict[Handle, Body] = {}
        self.opened: dict[Handle, Address] = {}
        self.faults = 0
        self.showing = asyncio.Event()

    def split(self, body: Body) -> tuple[Body, ...]:
        return (body,)

    async def open(self, to: Address) -> Handle:
        handle = Handle(f"h{len(self.opened)}")
        self.opened[handle] = to
        return handle

    async def show(self, handle: Handle, text: str) -> None:
        self.shown[handle].append(text)
        self.showing.set()

    async def finish(self, handle: Handle, body: Body) -> Receipt:
        if self.faults:
            self.faults -= 1
            raise ConnectionError("the platform is away")
        self.final[handle] = body
        return Receipt(f"r-{handle}")

    async def recover(self, handle: Handle) -> Handle:
        return handle

    async def fail(self, handle: Handle, body: Body) -> None:
        self.failed[handle] = body

    def said(self) -> list[str]:
        """Every final text, in the order in which its message was opened."""
        return [(self.final.get(handle) or self.failed[handle]).text for handle in self.opened if self._ended(handle)]

    def _ended(self, handle: Handle) -> bool:
        return handle in self.final or handle in self.failed


@dataclass
class RunningService:
    database: Database
    home: Home
    engine: ScriptedEngine
    service: Service
    bot: FakeBot
    training: JobSupervisor
    deliveries: Deliveries
    _count: int = field(default=0)

    async def send(
        self,
        text: str,
        *,
        user: str = STRANGER,
        conversation: str = "c",
        kind: Kind = Kind.MESSAGE,
        language: str = "en",
        key: str = "",
        command: str = "",
        action: str = "",
        value: str = "",
        place: str = "p",
        attachments: tuple[Attachment, ...] = (),
        public: bool = False,
        second_hand: bool = False,
    ) -> str:
        """Accept one update and go on."""
        self._count += 1
        key = key or f"k{self._count}"
        await self.service.accept(
            Incoming(
                lane=Lane.CONTROL if kind in (Kind.STOP, Kind.PRESS) else Lane.TURN,
                kind=kind,
                address=Address("fake", "bot", place, conversation),
                user=user,
                update_key=key,
                message_key=key,
                text=text,
                language=language,
                command=command,
                action=action,
                value=value,
                attachments=attachments,
                public=public,
                second_hand=second_hand,
            )
        )
        return key

    async def settled(self) -> None:
        async with asyncio.timeout(DEADLINE_S):
            await self.service.settled("fake", "bot")

    async def ask(self, text: str, **given: object) -> str:
        """Send one message and wait for all answers; the last one."""
        await self.send(text, **given)  # type: ignore[arg-type]
        await self.settled()
        return self.bot.said()[-1]

    async def count(self, table: str, where: str = "1") -> int:
        return int(await self.database.read(lambda tx: tx.value(f"SELECT count(*) FROM {table} WHERE {where}")))


def prepare(tx: Tx) -> None:
    terminal.ensure_terminal(tx, "home")
    channel = directory.create_channel(tx, "acme", title="Acme")
    tx.run("UPDATE price SET in_nano = 150, out_nano = 600, share_bps = 3000 WHERE channel_id = ?", [channel.id])
    bindings.bind(tx, "fake", "bot", "p", channel.id)
    tx.insert(
        "operator",
        user_hash=tx.cipher.hash_user("fake", "bot", OWNER),
        label="owner",
        granted_by="test",
        granted_ms=tx.now_ms,
    )


@asynccontextmanager
async def running_service(
    folder: Path,
    answers: Callable[[Request], str | AppError] | None = None,
    *,
    delay_s: float = 0.0,
    clock: Callable[[], int] = now_ms,
    running: bool = True,
    trainer: tuple[str, ...] = (),
    max_replies: int = 256,
) -> AsyncIterator[RunningService]:
    """The core on `folder`; opening it twice one after another is a restart of the program."""
    home = Home(folder)
    home.create()
    async with (
        Database(home.database, Cipher.open(home.key_file, create=True), clock=clock) as database,
        ScriptedEngine(answers or (lambda request: f"you said {request.messages[-1].text}"), delay_s=delay_s) as engine,
    ):
        if await database.read(lambda tx: tx.value("SELECT count(*) FROM channel")) == 0:
            await database.write(prepare)
        deliveries = Deliveries(database)
        command = {"command": trainer} if trainer else {}
        training = JobSupervisor(WorkerContext(database, home, deliveries, engine.info, TrainingSettings(), **command))
        settings = ServiceSettings(Retention(), max_replies=max_replies)
        service = Service(database, home, engine, deliveries, training, settings)
        bot = FakeBot()
        service.register("fake", "bot", bot)
        async with asyncio.TaskGroup() as tasks:
            loop = tasks.create_task(service.run()) if running else None
            yield RunningService(database, home, engine, service, bot, training, deliveries)
            if loop:
                await service.drain(5)
                loop.cancel()
