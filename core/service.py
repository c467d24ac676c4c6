"""The one door: accept(incoming), the reply loop, settle(delivery). Knows every room of core and no platform.

A message flows like this; each step is committed before the next one begins:

    accept    the update becomes an inbox row; only then may the bot tell its platform
    take      control rows at once, turns in order per conversation
    answer    a command runs in one transaction that also stores its text (core.operators.run_command);
              a question becomes a generation (core.reply)
    deliver   handle, parts, receipts (core.delivery)
    settle    receipt, charge, turns and the closed row in one transaction
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field

from core import comparing, feedback, gestures, importing, operators, privacy, tuning, users, versions
from core.callers import caller_of, lane_of
from core.checking import prepare_preview
from core.commands import Call, Grant, parse
from core.comparing import Comparisons
from core.datasets import prepare_finetune
from core.delivery import Deliveries, keep_body, kept_body, new_delivery
from core.engine.protocol import Engine
from core.errors import AppError, EngineError, LimitReached, Overloaded, StorageError, UserError
from core.importing import prepare_import
from core.lookups import Lookups
from core.metrics import Counts
from core.outlet import Outlet, Unreachable
from core.reply import Replies
from core.reply import fail as fail_reply
from core.reply import settle as settle_reply
from core.settings import Retention
from core.store import directory, inbox
from core.store.database import Database, Tx
from core.store.home import Home
from core.store.inbox import Taken
from core.store.installations import Installations
from core.texts import duration, resolve, say
from core.training import Training
from core.tuning import answer_to_question
from core.types import (
    Address,
    After,
    AnswerAgain,
    Body,
    Caller,
    CompareBlind,
    EraseFiles,
    ForgetMemory,
    Incoming,
    Kind,
    Lane,
    Outcome,
    Sampling,
    StopReply,
    WakeTraining,
)
from core.usagefiles import prepare_usage

log = logging.getLogger(__name__)

HANDLERS: Mapping[tuple[str, str], operators.Handler] = {
    **users.HANDLERS,
    **privacy.HANDLERS,
    **operators.HANDLERS,
    **tuning.HANDLERS,
    **versions.HANDLERS,
    **comparing.HANDLERS,
    **importing.HANDLERS,
    **feedback.HANDLERS,
}
_LOOK_AGAIN_S = 30.0
_STORAGE_RETRY_S = 2.0
_DELIVERY_RETRIES_S = (0.5, 1.0, 2.0, 4.0, 8.0, 15.0)
_NOTICE_WINDOW_MS = 60_000


@dataclass(frozen=True, slots=True)
class ServiceSettings:
    """`max_replies` bounds the turns that are handled at once; more wait in the inbox."""

    retention: Retention
    sampling: Sampling = field(default_factory=Sampling)
    max_replies: int = 256
    deadline_s: float = 120.0
    allow_slack_training: bool = False


class Service:
    """Built once. `run` must be running for anything to be answered; `accept` commits without it."""

    def __init__(
        self,
        database: Database,
        home: Home,
        engine: Engine,
        deliveries: Deliveries,
        training: Training,
        settings: ServiceSettings,
    ) -> None:
        self.installations = Installations(database)
        self.lookups = Lookups(database)
        self._database = database
        self._home = home
        self._engine = engine
        self._deliveries = deliveries
        self._training = training
        self._settings = settings
        self._replies = Replies(database, home, engine, deliveries, settings.sampling, settings.deadline_s)
        self._accounts: set[tuple[str, str]] = set()
        self._active: dict[int, Lane] = {}
        self._work = asyncio.Event()
        self._ended = asyncio.Condition()
        self._draining = False
        self.replies = Counts("channel", "outcome")  # delivered, refused, failed or unconfirmed

    # --- the door ---

    def register(self, platform: str, account: str, outlet: Outlet) -> None:
        """From now on what waits for this account is answered through `outlet`."""
        self._deliveries.register(platform, account, outlet)
        self._accounts.add((platform, account))
        self._training.wake()
        self._work.set()

    async def accept(self, *incoming: Incoming) -> None:
        """Commit what a platform sent. When this returns, the platform may be told; a repeat is a no-op.

        Raises StorageError (StorageFull) or Overloaded; then nothing is kept and nothing may be acknowledged.
        """
        await self._database.write(lambda tx: [inbox.accept(tx, one, lane_of(one)) for one in incoming])
        self._work.set()

    async def accept_dead(self, platform: str, account: str, update_key: str, raw: str) -> None:
        """Commit an update that could not be read, so that it can be acknowledged and never stops a bot."""
        await self._database.write(lambda tx: inbox.accept_dead(tx, platform, account, update_key, raw))
        log.error("inbox.unreadable", extra={"platform": platform, "account": account})

    async def grant(self, at: Address, user: str) -> Grant:
        """What this person may do in the channel of that place: what a bot's menu shows."""

        def work(tx: Tx) -> Grant:
            who = tx.cipher.hash_user(at.platform, at.account, user)
            channel = directory.channel_of_person(tx, at.platform, at.account, at.place, who)
            return directory.grant_of(tx, who, channel.id) if channel else Grant.ANYONE

        return await self._database.read(work)

    async def settled(self, platform: str, account: str) -> None:
        """Wait until all that was accepted from this account is ended, the messages of its jobs included."""
        async with self._ended:
            while await self._database.read(lambda tx: inbox.open_rows(tx, platform, account)):
                try:
                    async with asyncio.timeout(1.0):
                        await self._ended.wait()
                except TimeoutError:
                    continue

    async def run(self) -> None:
        """Answer until cancelled; `drain` first for a clean end."""
        await self._database.write(inbox.recover)
        await privacy.reapply(self._database, self._home)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._training.run(), name="training")
            tasks.create_task(
                privacy.keep_clean(self._database, self._home, self._settings.retention), name="retention"
            )
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
        self._draining = True
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

    async def _take(self) -> list[Taken]:
        if self._draining:
            return []
        room = self._settings.max_replies - sum(lane is Lane.TURN for lane in self._active.values())
        try:
            taken = await self._database.write(
                lambda tx: inbox.take(tx, room, frozenset(self._accounts), frozenset(self._active))
            )
        except (StorageError, Overloaded) as error:
            log.error("inbox.take_failed", extra={"error": str(error)})
            await asyncio.sleep(_STORAGE_RETRY_S)
            self._work.set()
            return []
        self._active |= {row.id: row.lane for row in taken}
        return taken

    async def _handle(self, row: Taken) -> None:
        try:
            await self._until_stored(lambda: self._answer(row))
        finally:
            self._active.pop(row.id, None)
            self._work.set()
            async with self._ended:
                self._ended.notify_all()

    async def _until_stored(self, step: Callable[[], Awaitable[None]]) -> None:
        """A full disk is waited out: what was accepted is answered when there is room again."""
        while True:
            try:
                await step()
                return
            except StorageError as error:
                log.error("store.refused", extra={"error": str(error)})
                await asyncio.sleep(_STORAGE_RETRY_S)

    # --- answering one row ---

    async def _answer(self, row: Taken) -> None:
        """Bring one row to its end, whatever happens: an answer, or one visible refusal."""
        caller: Caller | None = None
        try:
            if row.attempts >= inbox.MAX_ATTEMPTS:
                raise AppError("error.gave_up")
            if row.kind is Kind.STOP or row.action == "blocked":
                self._replies.stop(row.address)
            if not await self._database.read(lambda tx: inbox.is_generated(tx, row.id)):
                if row.kind in gestures.QUIET or row.action == "feedback":
                    slack = self._settings.allow_slack_training
                    if not await self._database.write(lambda tx: gestures.close(tx, row, slack=slack)):
                        return
                else:
                    caller = await self._database.write(lambda tx: caller_of(tx, row))
                    await self._act(row, caller)
            await self._deliver(row)
        except StorageError:
            raise
        except LimitReached as error:
            await self._refuse_limit(row, caller, error)
        except AppError as error:
            if error.key == "service.stopped" and await self._cut_by_drain(row):
                return
            if not isinstance(error, UserError):
                log.error("reply.failed", extra={"row": row.id, "error": str(error)})
            await self._refuse(row, caller, error)
        except Exception as error:
            log.exception("reply.crashed", extra={"row": row.id})
            await self._refuse(row, caller, AppError(detail=type(error).__name__))

    async def _cut_by_drain(self, row: Taken) -> bool:
        """Whether the end of this program, and not the person, stopped a reply before its first word.

        Such a row stays as it is: the next start answers it.
        """
        return self._draining and not await self._database.read(lambda tx: inbox.stopped_since(tx, row))

    async def _act(self, row: Taken, caller: Caller) -> None:
        """Do what the row asks, up to its stored text."""
        text = row.value if row.kind is Kind.PRESS and row.action == "command" else row.text.strip()
        if row.action == "notice":
            await self._database.write(lambda tx: gestures.keep_notice(tx, row, caller))
            return
        if row.oversize:
            raise UserError("service.message_too_large", size=row.oversize, limit=inbox.MAX_TEXT)
        if not text:
            raise UserError("service.text_only" if row.attachments else "service.empty_message")
        command = text[0] in "/／"
        call = parse(text) if command else await self._database.read(lambda tx: answer_to_question(tx, caller, text))
        if call is None:
            await self._replies.generate(row, caller, text, again=False)
        else:
            await self._command(row, caller, call)

    async def _command(self, row: Taken, caller: Caller, call: Call) -> None:
        """Run a command and store what it says in one transaction; then do what follows from it."""
        slack = self._settings.allow_slack_training
        call = await prepare_finetune(self._home, self._database, self._deliveries.fetch, caller, call, slack=slack)
        call = await prepare_preview(self._home, self._database, caller, call)
        call = feedback.prepare_correct(call, slack=slack)
        call = await prepare_usage(self._home, self._database, caller, call)
        call = await prepare_import(self._home, self._database, self._deliveries.fetch, caller, call)

        def work(tx: Tx) -> Outcome:
            outcome = operators.run_command(tx, caller, call, HANDLERS)
            later = any(isinstance(after, AnswerAgain | CompareBlind) for after in outcome.after)
            if not later:
                keep_body(tx, new_delivery(tx, inbox_id=row.id), outcome.body)
                inbox.mark_generated(tx, row.id)
            return outcome

        outcome = await self._database.write(work)
        for after in outcome.after:
            await self._follow(row, caller, after)

    async def _follow(self, row: Taken, caller: Caller, after: After) -> None:
        match after:
            case StopReply():
                self._replies.stop(caller.address)
            case ForgetMemory(channel, conversation):
                await self._engine.forget(channel, conversation)
            case WakeTraining():
                self._training.wake()
            case EraseFiles():
                await privacy.sweep(self._database, self._home)
            case AnswerAgain():
                await self._replies.generate(row, caller, "", again=True)
            case CompareBlind():
                await Comparisons(self._replies).answer(row, caller)

    async def _deliver(self, row: Taken) -> None:
        """Write the stored text and settle it, again and again within bounds: `finish` may be repeated."""
        delivery_id, body, charged = await self._database.read(lambda tx: _stored(tx, row))
        settle: Callable[[Tx], None] = (
            (lambda tx: settle_reply(tx, row, body)) if charged else (lambda tx: inbox.close(tx, row.id, "command"))
        )

        async def write() -> None:
            await self._deliveries.open(delivery_id, row.address)
            await self._deliveries.finish(delivery_id, row.address, body, settle)

        written = await self._persist(row, write)
        if charged:
            self.replies.add(charged, "delivered" if written else "unconfirmed")

    async def _refuse(self, row: Taken, caller: Caller | None, error: AppError) -> None:
        """One sentence that says what, why and what to do next; nothing is charged."""
        language = caller.language if caller else resolve(row.language) or "en"
        fields = dict(error.fields)
        if isinstance(error, Overloaded | LimitReached):
            fields["wait"] = duration(language, error.retry_after_s)
        body = Body(say(language, error.key, **fields))
        outcome = "refused" if isinstance(error, UserError) else "failed"

        def settle(tx: Tx) -> None:
            fail_reply(tx, row)
            inbox.close(tx, row.id, outcome, dead=error.key == "error.gave_up")

        async def write() -> None:
            delivery_id = await self._database.write(lambda tx: new_delivery(tx, inbox_id=row.id))
            await self._deliveries.fail(delivery_id, row.address, body, settle)

        self.replies.add(caller.channel.name if caller else "", outcome)
        await self._persist(row, write)

    async def _refuse_limit(self, row: Taken, caller: Caller | None, error: LimitReached) -> None:
        """Say it once per window, not for each further message."""

        def told(tx: Tx) -> bool:
            told_lately = bool(
                tx.value(
                    "SELECT 1 FROM inbox WHERE user_hash = ? AND outcome = 'refused' AND closed_ms > ? AND id <> ?",
                    [row.user_hash, tx.now_ms - _NOTICE_WINDOW_MS, row.id],
                )
            )
            if told_lately:
                inbox.close(tx, row.id, "refused_quietly")
            return told_lately

        if await self._database.write(told):
            self.replies.add(caller.channel.name if caller else "", "refused")
        else:
            await self._refuse(row, caller, error)

    async def _persist(self, row: Taken, write: Callable[[], Awaitable[None]]) -> bool:
        """Whether it could be written; if not, the row is given up."""
        for delay_s in (*_DELIVERY_RETRIES_S, None):
            try:
                await self._until_stored(write)
                return True
            except Unreachable:
                log.info("delivery.unreachable", extra={"row": row.id})
                break
            except Exception as error:  # a bot's or platform's failure: outcome unknown, so the same again
                log.warning("delivery.failed", extra={"row": row.id, "error": type(error).__name__}, exc_info=True)
                if delay_s is not None:
                    await asyncio.sleep(delay_s)

        def give_up(tx: Tx) -> None:
            fail_reply(tx, row)
            tx.run("UPDATE delivery SET state = 'failed', body = NULL WHERE inbox_id = ?", [row.id])
            inbox.close(tx, row.id, "unconfirmed", dead=True)

        await self._database.write(give_up)
        return False


# --- rows: run inside a transaction ---


def _stored(tx: Tx, row: Taken) -> tuple[int, Body, str]:
    """The delivery of a generated row, its text, and the channel whose reply it is ("" for a command's)."""
    delivery_id = new_delivery(tx, inbox_id=row.id)
    body = kept_body(tx, delivery_id)
    if body is None:
        raise EngineError(detail=f"row {row.id} is generated but has no text")
    charged = tx.value(
        "SELECT name FROM channel JOIN generation ON channel.id = channel_id"
        " WHERE inbox_id = ? AND state = 'generated'",
        [row.id],
    )
    return delivery_id, body, charged or ""
