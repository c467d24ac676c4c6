"""One inbox row, from taken to closed: what it asks for is done, its answer stored and delivered; or one refusal.

Whatever happens, a row comes to its end: each failure becomes one visible sentence. Knows every room of core that a row
may lead to, and no platform; which rows are taken, and when, is the service's.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from core.chat import inbox, quiet_updates
from core.chat.caller import caller_of
from core.chat.comparisons import Comparisons
from core.chat.dispatch import dispatch
from core.chat.inbox import InboxRow
from core.chat.replies import Replies
from core.chat.replies import fail as fail_reply
from core.chat.replies import settle as settle_reply
from core.chat.stopping import stopped_since, stopped_user
from core.commands.parser import parse
from core.commands.registry import CommandContext
from core.commands.table import Call
from core.delivery.deliveries import Deliveries, keep_body, kept_body, new_delivery
from core.delivery.deliveries import give_up as give_up_delivery
from core.engine.protocol import Engine
from core.errors import (
    AppError,
    EngineError,
    LimitReached,
    Overloaded,
    StorageError,
    StorageRefused,
    StoredUnreadable,
    UserError,
)
from core.i18n.messages import duration, resolve, say
from core.jobs.commands import answer_to_question
from core.jobs.supervisor import JobSupervisor
from core.observability.metrics import Counts
from core.platform import Unreachable
from core.privacy.retention import try_sweep
from core.storage.database import Database, Tx
from core.storage.home import Home
from core.types import (
    After,
    AnswerAgain,
    Body,
    Caller,
    Choose,
    CompareBlind,
    EraseFiles,
    ForgetMemory,
    Kind,
    Outcome,
    StopReply,
    WakeTraining,
)

log = logging.getLogger(__name__)

STORAGE_RETRY_S = 2.0
_DELIVERY_RETRIES_S = (0.5, 1.0, 2.0, 4.0, 8.0, 15.0)
_NOTICE_WINDOW_MS = 60_000


class MessageHandler:
    """Brings rows to their end. `draining` says that this program is about to end."""

    def __init__(
        self,
        database: Database,
        home: Home,
        engine: Engine,
        deliveries: Deliveries,
        training: JobSupervisor,
        replies: Replies,
    ) -> None:
        self.draining = False
        self.counts = Counts("channel", "outcome")  # delivered, refused, failed or unconfirmed
        self._database = database
        self._home = home
        self._engine = engine
        self._deliveries = deliveries
        self._training = training
        self._replies = replies
        self._commands = CommandContext(home, database, deliveries.fetch)

    async def handle(self, row: InboxRow) -> None:
        """A store that cannot write now is waited for; any other failure is told to the person."""
        await self._until_stored(lambda: self._answer(row))

    async def _until_stored(self, step: Callable[[], Awaitable[None]]) -> None:
        """A disk that is full, or too slow, is waited out: what was accepted is answered when there is room again."""
        while True:
            try:
                await step()
                return
            except StorageRefused:
                raise
            except (StorageError, Overloaded) as error:
                log.error("store.refused", extra={"error": str(error)})
                await asyncio.sleep(STORAGE_RETRY_S)

    async def _answer(self, row: InboxRow) -> None:
        """Bring one row to its end, whatever happens: an answer, or one visible refusal."""
        caller: Caller | None = None
        chosen = False
        try:
            if not row.readable and row.kind not in quiet_updates.QUIET:
                raise StoredUnreadable("error.unreadable_message")
            if row.attempts >= inbox.MAX_ATTEMPTS:
                raise AppError("error.gave_up")
            if row.action == "blocked":
                self._replies.stop(row.address, "")
            elif row.kind is Kind.STOP:
                self._replies.stop(row.address, await self._database.read(lambda tx: stopped_user(tx, row)))
            if not await self._database.read(lambda tx: inbox.is_generated(tx, row.id)):
                if row.kind in quiet_updates.QUIET or row.action == "feedback":
                    if not await self._database.write(lambda tx: quiet_updates.close(tx, row)):
                        return
                else:
                    caller = await self._database.write(lambda tx: caller_of(tx, row))
                    chosen = await self._act(row, caller)
            await self._deliver(row)
            if chosen:
                await self._deliveries.choose(row.address, row.text)
        except StoredUnreadable as error:
            log.error("store.unreadable", extra={"row": row.id})
            await self._refuse(row, caller, error)
        except StorageRefused as error:
            log.exception("reply.crashed", extra={"row": row.id})
            await self._refuse(row, caller, error)
        except StorageError:
            raise
        except LimitReached as error:
            await self._refuse_limit(row, caller, error)
        except AppError as error:
            if error.key == "service.stopped" and caller and await self._cut_by_drain(row, caller):
                return
            if not isinstance(error, UserError):
                log.error("reply.failed", extra={"row": row.id, "error": str(error)})
            await self._refuse(row, caller, error)
        except Exception as error:
            log.exception("reply.crashed", extra={"row": row.id})
            await self._refuse(row, caller, AppError(detail=type(error).__name__))

    async def _cut_by_drain(self, row: InboxRow, caller: Caller) -> bool:
        """Whether the end of this program, and not the person, stopped a reply before its first word.

        Such a row stays as it is: the next start answers it.
        """
        if not self.draining:
            return False
        return not await self._database.read(lambda tx: stopped_since(tx, row, caller.channel.id))

    async def _act(self, row: InboxRow, caller: Caller) -> bool:
        """Do what the row asks, up to its stored text; whether it was a press that has answered a question."""
        text = row.value if row.kind is Kind.PRESS and row.action == "command" else row.text.strip()
        if row.action == "notice":
            await self._database.write(lambda tx: quiet_updates.keep_notice(tx, row, caller))
            return False
        if row.oversize:
            raise UserError("service.message_too_large", size=row.oversize, limit=inbox.MAX_TEXT)
        if not text:
            raise UserError("service.text_only" if row.attachments else "service.empty_message")
        command = text[0] in "/／"
        call = parse(text) if command else await self._database.read(lambda tx: answer_to_question(tx, caller, text))
        if call is None:
            await self._replies.generate(row, caller, text, again=False)
            return False
        return await self._command(row, caller, call)

    async def _command(self, row: InboxRow, caller: Caller, call: Call) -> bool:
        """Run a command and store what it says in one transaction; then do what follows from it, but for `Choose`."""

        def keep(tx: Tx, outcome: Outcome) -> None:
            if not any(isinstance(after, AnswerAgain | CompareBlind) for after in outcome.after):
                keep_body(tx, new_delivery(tx, inbox_id=row.id), outcome.body)
                inbox.mark_generated(tx, row.id)

        outcome = await dispatch(self._commands, caller, call, keep)
        for after in outcome.after:
            await self._follow(row, caller, after)
        return row.kind is Kind.PRESS and Choose() in outcome.after

    async def _follow(self, row: InboxRow, caller: Caller, after: After) -> None:
        match after:
            case StopReply(user):
                self._replies.stop(caller.address, user)
            case ForgetMemory(channel, conversation):
                await self._engine.forget(channel, conversation)
            case WakeTraining():
                self._training.wake()
            case EraseFiles():
                await try_sweep(self._database, self._home)
            case AnswerAgain():
                await self._replies.generate(row, caller, "", again=True)
            case CompareBlind():
                await Comparisons(self._replies).answer(row, caller)

    async def _deliver(self, row: InboxRow) -> None:
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
            self.counts.add(charged, "delivered" if written else "unconfirmed")

    async def _refuse(self, row: InboxRow, caller: Caller | None, error: AppError) -> None:
        """One sentence that says what, why and what to do next; nothing is charged."""
        language = caller.language if caller else resolve(row.language) or "en"
        fields = dict(error.fields)
        if isinstance(error, Overloaded | LimitReached):
            fields["wait"] = duration(language, error.retry_after_s)
        body = Body(say(language, error.key, **fields))
        outcome = "refused" if isinstance(error, UserError) else "failed"

        def settle(tx: Tx) -> None:
            fail_reply(tx, row)
            ended = {LimitReached: "limited", StoredUnreadable: "unreadable"}.get(type(error), outcome)
            inbox.close(tx, row.id, ended, dead=error.key == "error.gave_up" or not row.readable)

        async def write() -> None:
            delivery_id = await self._database.write(lambda tx: new_delivery(tx, inbox_id=row.id))
            await self._deliveries.fail(delivery_id, row.address, body, settle)

        self.counts.add(caller.channel.name if caller else "", outcome)
        await self._persist(row, write)

    async def _refuse_limit(self, row: InboxRow, caller: Caller | None, error: LimitReached) -> None:
        """Say it once per window and place, not for each further message."""

        def told(tx: Tx) -> bool:
            told_lately = bool(
                tx.value(
                    "SELECT 1 FROM inbox WHERE user_hash = ? AND place = ? AND outcome = 'limited' AND closed_ms > ?",
                    [row.user_hash, row.address.place, tx.now_ms - _NOTICE_WINDOW_MS],
                )
            )
            if told_lately:
                inbox.close(tx, row.id, "refused_quietly")
            return told_lately

        if await self._database.write(told):
            self.counts.add(caller.channel.name if caller else "", "refused")
        else:
            await self._refuse(row, caller, error)

    async def _persist(self, row: InboxRow, write: Callable[[], Awaitable[None]]) -> bool:
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
            give_up_delivery(tx, new_delivery(tx, inbox_id=row.id))
            inbox.close(tx, row.id, "unconfirmed", dead=True)

        await self._until_stored(lambda: self._database.write(give_up))
        return False


# --- rows: run inside a transaction ---


def _stored(tx: Tx, row: InboxRow) -> tuple[int, Body, str]:
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
