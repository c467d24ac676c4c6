"""The one door: accept(incoming), and the loop that takes what was accepted. Knows no platform.

A message flows like this; each step is committed before the next one begins:

    accept    the update becomes an inbox row; only then may the bot tell its platform
    take      control rows at once, turns in order per conversation
    answer    (core.chat.handler) a command runs in one transaction that also stores its text
    (core.channels.commands.run_command);
              a question becomes a generation (core.chat.replies)
    deliver   handle, parts, receipts (core.delivery.deliveries)
    settle    receipt, charge, turns and the closed row in one transaction
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, field

from core.channels import bindings, operators
from core.channels.installations import Installations
from core.chat import inbox
from core.chat.admission import AdmissionQueue
from core.chat.handler import MessageHandler
from core.chat.inbox import InboxRow
from core.chat.overview import Overviews
from core.chat.replies import Replies
from core.chat.stopping import reaches_all_at
from core.config.schema import Retention
from core.delivery.deliveries import Deliveries
from core.delivery.retry import STORAGE_S
from core.engine.protocol import Engine
from core.errors import Overloaded, StorageError
from core.jobs.supervisor import JobSupervisor
from core.platform import MessageSink
from core.privacy import erasure
from core.privacy.retention import keep_clean
from core.storage.database import Database, Tx
from core.storage.home import Home
from core.types import Address, Grant, Incoming, Sampling

log = logging.getLogger(__name__)
_LOOK_AGAIN_S = 30.0
_ASK_AGAIN_S = 0.1  # whether all is settled: the end of a job is told to nobody


@dataclass(frozen=True, slots=True)
class ServiceSettings:
    """`max_replies` bounds the turns of one account that are handled at once; more wait in the inbox.

    No more replies are with the engine at once, of all accounts together.
    """

    retention: Retention
    sampling: Sampling = field(default_factory=Sampling)
    max_replies: int = 256
    deadline_s: float = 120.0


class Service:
    """Built once. `run` must be running for anything to be answered; `accept` commits without it."""

    def __init__(
        self,
        database: Database,
        home: Home,
        engine: Engine,
        deliveries: Deliveries,
        training: JobSupervisor,
        settings: ServiceSettings,
    ) -> None:
        self.installations = Installations(database)
        self.places = Overviews(database)
        self._database = database
        self._home = home
        self._engine = engine
        self._deliveries = deliveries
        self._training = training
        self._settings = settings
        admission = AdmissionQueue(settings.max_replies)
        self._replies = Replies(database, home, engine, deliveries, admission, settings.sampling, settings.deadline_s)
        self._handler = MessageHandler(database, home, engine, deliveries, training, self._replies)
        self.replies = self._handler.counts
        self._accounts: set[tuple[str, str]] = set()
        self._active: set[int] = set()
        self._work = asyncio.Event()
        self._ended = asyncio.Condition()

    # --- the door ---

    def register(self, platform: str, account: str, sink: MessageSink) -> None:
        """From now on what waits for this account is answered through `sink`."""
        self._deliveries.register(platform, account, sink)
        self._accounts.add((platform, account))
        self._training.wake()
        self._work.set()

    async def accept(self, *incoming: Incoming) -> None:
        """Commit what a platform sent. When this returns, the platform may be told; a repeat is a no-op.

        Raises StorageError (StorageFull) or Overloaded; then nothing is kept and nothing may be acknowledged.
        """
        await self._database.write(lambda tx: [inbox.accept(tx, one) for one in incoming])
        self._work.set()

    async def accept_dead(self, platform: str, account: str, update_key: str, raw: str) -> None:
        """Commit an update that could not be read, so that it can be acknowledged and never stops a bot."""
        await self._database.write(lambda tx: inbox.accept_dead(tx, platform, account, update_key, raw))
        log.error("inbox.unreadable", extra={"platform": platform, "account": account})

    async def grant(self, at: Address, user: str) -> Grant:
        """What this person may do in the channel of that place: what a bot's menu shows."""

        def work(tx: Tx) -> Grant:
            who = tx.cipher.hash_user(at.platform, at.account, user)
            channel = bindings.channel_of_person(tx, at.platform, at.account, at.place, who)
            return operators.grant_of(tx, who, channel.id) if channel else Grant.ANYONE

        return await self._database.read(work)

    async def stops_all(self, at: Address, user: str) -> bool:
        """Whether this person may stop what others asked for in that place, whatever a platform knows of them."""

        def work(tx: Tx) -> bool:
            who = tx.cipher.hash_user(at.platform, at.account, user)
            return reaches_all_at(tx, at, who, moderates=False)

        return await self._database.read(work)

    async def settled(self, platform: str, account: str) -> None:
        """Wait until all that was accepted from this account is ended, the messages of its jobs included."""
        async with self._ended:
            while await self._database.read(lambda tx: inbox.open_rows(tx, platform, account)):
                try:
                    async with asyncio.timeout(_ASK_AGAIN_S):
                        await self._ended.wait()
                except TimeoutError:
                    continue

    async def run(self) -> None:
        """Answer until cancelled; `drain` first for a clean end."""
        await self._database.write(inbox.recover)
        await erasure.reapply(self._database, self._home)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._training.run(), name="training")
            tasks.create_task(keep_clean(self._database, self._home, self._settings.retention), name="retention")
            while True:
                self._work.clear()
                for row in await self._take():
                    tasks.create_task(self._handle(row), name=f"row {row.id}")
                try:
                    async with asyncio.timeout(_LOOK_AGAIN_S):
                        await self._work.wait()
                except TimeoutError:
                    continue

    async def drain(self, deadline_s: float) -> None:
        """Begin nothing new; let what runs end within the deadline, then cut it: its text so far is the answer."""
        self._handler.draining = True
        try:
            async with asyncio.timeout(deadline_s * 0.8), self._ended:
                await self._ended.wait_for(lambda: not self._active)
        except TimeoutError:
            self._replies.stop_all()
            try:
                async with asyncio.timeout(deadline_s * 0.2), self._ended:
                    await self._ended.wait_for(lambda: not self._active)
            except TimeoutError:
                log.warning("service.drain_incomplete", extra={"rows": len(self._active)})
        await self._training.stop(deadline_s)

    # --- taking rows ---

    async def _take(self) -> list[InboxRow]:
        if self._handler.draining:
            return []
        room, accounts, active = self._settings.max_replies, frozenset(self._accounts), frozenset(self._active)
        try:
            taken = await self._database.write(lambda tx: inbox.take(tx, room, accounts, active))
        except (StorageError, Overloaded) as error:
            log.error("inbox.take_failed", extra={"error": str(error)})
            await asyncio.sleep(STORAGE_S)
            self._work.set()
            return []
        self._active |= {row.id for row in taken}
        return taken

    async def _handle(self, row: InboxRow) -> None:
        try:
            await self._handler.handle(row)
        finally:
            self._active.discard(row.id)
            self._work.set()
            async with self._ended:
                self._ended.notify_all()
