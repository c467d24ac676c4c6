"""Accepts updates and handles them, in order within a conversation, at most `max_replies` turns of an account at once.

The way of a message; each step is committed before the next:

    accept    core.chat.inbox       the update becomes a row; only then does the bot acknowledge it
    take      core.chat.inbox       control rows at once, turns in order of their conversation
    handle    core.chat.handler     a command is dispatched (core.chat.dispatch), a question becomes a generation
                                    (core.chat.replies); either way the final text is stored
    deliver   core.delivery         handle, parts, receipts, with one bounded retry
    settle    core.chat.replies     receipt, charge, turns and the closed row in one transaction
"""

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
_POLL_S = 0.1  # until all is settled; nothing signals the end of a job's message


@dataclass(frozen=True, slots=True)
class ServiceSettings:
    """`max_replies` bounds the turns of one account in work, and the replies of all accounts at the engine."""

    retention: Retention
    sampling: Sampling = field(default_factory=Sampling)
    max_replies: int = 256
    deadline_s: float = 120.0


class Service:
    """core.platform.BotService. `accept` works without `run`, which handles what was accepted."""

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

    # --- for bots ---

    def register(self, platform: str, account: str, sink: MessageSink) -> None:
        self._deliveries.register(platform, account, sink)
        self._accounts.add((platform, account))
        self._training.wake()
        self._work.set()

    async def accept(self, *incoming: Incoming) -> None:
        await self._database.write(lambda tx: [inbox.accept(tx, one) for one in incoming])
        self._work.set()

    async def accept_dead(self, platform: str, account: str, update_key: str, raw: str) -> None:
        await self._database.write(lambda tx: inbox.accept_dead(tx, platform, account, update_key, raw))
        log.error("inbox.unreadable", extra={"platform": platform, "account": account})

    async def grant(self, at: Address, user: str) -> Grant:
        def work(tx: Tx) -> Grant:
            who = tx.cipher.hash_user(at.platform, at.account, user)
            channel = bindings.channel_of_person(tx, at.platform, at.account, at.place, who)
            return operators.grant_of(tx, who, channel.id) if channel else Grant.ANYONE

        return await self._database.read(work)

    async def settled(self, platform: str, account: str) -> None:
        """Return when no message of this account, and no message of its jobs, is open."""
        async with self._ended:
            while await self._database.read(lambda tx: inbox.open_rows(tx, platform, account)):
                try:
                    async with asyncio.timeout(_POLL_S):
                        await self._ended.wait()
                except TimeoutError:
                    continue

    async def run(self) -> None:
        """Handle rows until cancelled; call `drain` before."""
        if suspects := await self._database.write(inbox.recover):
            log.warning("inbox.suspects", extra={"rows": suspects})
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
        """Take nothing new; wait for the rows in work, then stop them: the text so far becomes the reply."""
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
        await self._database.write(inbox.release)

    # --- taking rows ---

    async def _take(self) -> list[InboxRow]:
        if self._handler.draining:
            return []
        limit, accounts, active = self._settings.max_replies, frozenset(self._accounts), frozenset(self._active)
        try:
            taken = await self._database.write(lambda tx: inbox.take(tx, limit, accounts, active))
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
