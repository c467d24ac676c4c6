"""Brings one inbox row to its end: its reply or command is stored and delivered, or one refusal is.

Every failure becomes one visible sentence, and every step is stored before the next, so a row that a crash or a full
disk has cut is handled again from its start.
"""

import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from core.channels import bindings
from core.chat import comparisons, conversations, feedback, inbox
from core.chat.caller import caller_of
from core.chat.dispatch import dispatch
from core.chat.inbox import InboxRow
from core.chat.replies import Replies
from core.chat.replies import fail as fail_reply
from core.chat.replies import settle as settle_reply
from core.chat.stopping import stopped_since, stopped_user
from core.commands.registry import CommandContext
from core.commands.table import Call
from core.delivery.deliveries import Deliveries, keep_body, kept_body, new_delivery
from core.delivery.deliveries import give_up as give_up_delivery
from core.delivery.retry import DeliveryFailed, deliver, is_storage_unavailable, wait_for_storage
from core.engine.protocol import Engine
from core.errors import (
    AppError,
    BadCommand,
    EngineError,
    LimitReached,
    RetryLater,
    StorageError,
    StoredUnreadable,
    UserError,
)
from core.i18n.messages import duration, resolve, say
from core.jobs import jobs
from core.jobs.commands import answer_to_question
from core.jobs.supervisor import JobSupervisor
from core.observability.metrics import Counts
from core.privacy.retention import retention_of, try_sweep
from core.storage.database import Database, Tx
from core.storage.home import Home
from core.types import After, Body, Caller, Effect, ForgetMemory, Kind, Lane, Outcome, StopReply

log = logging.getLogger(__name__)
QUIET = (Kind.STOP, Kind.EDIT, Kind.MEMBERSHIP)  # answered by no message
_NOTICE_WINDOW_MS = 60_000
_COMMANDS = 10  # for each message a minute that the channel allows


@dataclass(slots=True)
class MessageHandler:
    """`draining`: the process is about to end, and begins nothing new."""

    database: Database
    home: Home
    engine: Engine
    deliveries: Deliveries
    training: JobSupervisor
    replies: Replies
    draining: bool = False
    # by outcome: delivered, refused, failed or unconfirmed
    counts: Counts = field(default_factory=lambda: Counts("channel", "outcome"))

    async def handle(self, row: InboxRow) -> None:
        await wait_for_storage(lambda: self._handle(row))

    async def _handle(self, row: InboxRow) -> None:
        """Raises only what `wait_for_storage` waits for."""
        caller: Caller | None = None
        try:
            if not row.readable and row.kind not in QUIET:
                raise StoredUnreadable("error.unreadable_message")
            if row.strikes >= inbox.MAX_STRIKES:
                raise AppError("error.gave_up")
            await self._stop(row)
            chosen = False
            if not await self.database.read(lambda tx: inbox.is_generated(tx, row.id)):
                if row.kind in QUIET or row.action == "feedback":
                    if not await self.database.write(lambda tx: _close_quiet(tx, row)):
                        return
                else:
                    caller = await self.database.write(lambda tx: caller_of(tx, row))
                    chosen = await self._act(row, caller)
            await self._deliver(row)
            if chosen:
                await self.deliveries.choose(row.address, row.text)
        except Exception as error:
            if isinstance(error, StorageError) and is_storage_unavailable(error):
                raise
            if not await self._ends_quietly(row, caller, error):
                await self._refuse(row, caller, error)

    async def _stop(self, row: InboxRow) -> None:
        """Stop the running reply that a stop, or a chat that was blocked, is about."""
        if row.action == "blocked":
            self.replies.stop(row.address, "")
        elif row.kind is Kind.STOP:
            self.replies.stop(row.address, await self.database.read(lambda tx: stopped_user(tx, row)))

    async def _act(self, row: InboxRow, caller: Caller) -> bool:
        """Store the row's reply or outcome; True where it pressed a button that answers a question."""
        if row.action == "notice":
            await self.database.write(lambda tx: _keep_notice(tx, row, caller))
            return False
        if row.shed:
            raise LimitReached("error.limit_open", retry_after_s=_NOTICE_WINDOW_MS / 1000, limit=inbox.MAX_OPEN_PERSON)
        if row.oversize:
            raise UserError("service.message_too_large", size=row.oversize, limit=inbox.MAX_TEXT)
        if isinstance(row.command, BadCommand):
            raise row.command
        if isinstance(row.command, Call) and row.command.command.lane is Lane.TURN:
            await self.database.read(lambda tx: _check_commands(tx, caller))
        text = row.text.strip()
        if row.command is None and not text:
            raise UserError("service.text_only" if row.attachments else "service.empty_message")
        call = row.command
        if call is None and not row.second_hand:
            call = await self.database.read(lambda tx: answer_to_question(tx, caller, text))
        if call is not None:
            return await self._command(row, caller, call)
        await self.replies.generate(row, caller, text, again=False)
        return False

    async def _command(self, row: InboxRow, caller: Caller, call: Call) -> bool:
        """Run a command, store its text in the same transaction, then apply its effects but for `Choose`."""

        def keep(tx: Tx, outcome: Outcome) -> None:
            if not {Effect.ANSWER_AGAIN, Effect.ANSWER_UNANSWERED, Effect.COMPARE_BLIND} & set(outcome.after):
                keep_body(tx, new_delivery(tx, inbox_id=row.id), outcome.body)
                inbox.mark_generated(tx, row.id)

        context = CommandContext(self.home, self.database, self.deliveries.fetch)
        async with self.replies.isolation.section(alone=row.suspect):
            outcome = await dispatch(context, caller, call, keep)
        for after in outcome.after:
            await self._apply(row, caller, after)
        return row.kind is Kind.PRESS and Effect.CHOOSE in outcome.after

    async def _apply(self, row: InboxRow, caller: Caller, after: After) -> None:
        match after:
            case StopReply(user):
                self.replies.stop(caller.address, user)
            case ForgetMemory(channel, conversation):
                await self.engine.forget(channel, conversation)
            case Effect.WAKE_TRAINING:
                self.training.wake()
            case Effect.ERASE_FILES:
                await try_sweep(self.database, self.home)
            case Effect.ANSWER_AGAIN:
                await self.replies.generate(row, caller, "", again=True)
            case Effect.ANSWER_UNANSWERED:
                question = await self.database.read(lambda tx: inbox.get(tx, row.id))
                await self.replies.generate(question, caller, question.text.strip(), again=False)
            case Effect.COMPARE_BLIND:
                await comparisons.answer(self.replies, row, caller)

    # --- the way out ---

    async def _deliver(self, row: InboxRow) -> None:
        """Write the stored text and settle it."""
        delivery_id, body, channel = await self.database.read(lambda tx: _stored(tx, row))
        settle: Callable[[Tx], None] = (
            (lambda tx: settle_reply(tx, row, body)) if channel else (lambda tx: inbox.close(tx, row.id, "command"))
        )

        async def write() -> None:
            await self.deliveries.open(delivery_id, row.address)
            await self.deliveries.finish(delivery_id, row.address, body, settle)

        written = await self._write(row, write)
        if channel:
            self.counts.add(channel, "delivered" if written else "unconfirmed")

    async def _refuse(self, row: InboxRow, caller: Caller | None, error: Exception) -> None:
        """Deliver one sentence with the reason and the next step; nothing is charged."""
        known = error if isinstance(error, AppError) else AppError(detail=type(error).__name__)
        language = caller.language if caller else resolve(row.language) or "en"
        fields = dict(known.fields)
        if isinstance(known, RetryLater):
            fields["wait"] = duration(language, known.retry_after_s)
        body = Body(say(language, known.key, **fields))
        outcome = "refused" if isinstance(known, UserError) else "failed"

        def settle(tx: Tx) -> None:
            fail_reply(tx, row)
            ended = {LimitReached: "limited", StoredUnreadable: "unreadable"}.get(type(known), outcome)
            inbox.close(tx, row.id, ended, dead=known.key == "error.gave_up" or not row.readable)

        async def write() -> None:
            delivery_id = await self.database.write(lambda tx: new_delivery(tx, inbox_id=row.id))
            await self.deliveries.fail(delivery_id, row.address, body, settle)

        await self._write(row, write)
        self.counts.add(caller.channel.name if caller else "", outcome)

    async def _ends_quietly(self, row: InboxRow, caller: Caller | None, error: Exception) -> bool:
        """Log an error; True where its row needs no refusal.

        A limit is reported once per window and place. A reply that the end of the process, and not a person, stopped
        before its first word stays open: the next start answers it.
        """
        if isinstance(error, LimitReached):
            if not await self.database.write(lambda tx: _close_limited(tx, row)):
                return False
            self.counts.add(caller.channel.name if caller else "", "refused")
            return True
        if isinstance(error, AppError) and error.key == "service.stopped" and caller and self.draining:
            return not await self.database.read(lambda tx: stopped_since(tx, row, caller.channel.id))
        if not isinstance(error, UserError):
            log.error("message.failed", extra={"row": row.id, "error": str(error)}, exc_info=error)
        return False

    async def _write(self, row: InboxRow, write: Callable[[], Awaitable[None]]) -> bool:
        """Whether it was delivered; if not, the row is given up."""
        try:
            await wait_for_storage(lambda: deliver(write))
        except DeliveryFailed as error:
            log.warning("delivery.given_up", extra={"row": row.id, "error": str(error)})
            await wait_for_storage(lambda: self.database.write(lambda tx: _give_up(tx, row)))
            return False
        return True


# --- rows: run inside a transaction ---


def _close_quiet(tx: Tx, row: InboxRow) -> bool:
    """Apply a vote, an edit, a stop or a group's new id, and close the row; True where a text was stored instead."""
    if row.action == "feedback" and feedback.vote(tx, row):
        return True
    if row.action == "moved":
        at = row.address
        for owner in (bindings, conversations, inbox, jobs):
            owner.move_place(tx, at.platform, at.account, at.place, row.value)
    inbox.close(tx, row.id, {Kind.STOP: "stop", Kind.EDIT: "ignored"}.get(row.kind, "control"))
    return False


def _keep_notice(tx: Tx, row: InboxRow, caller: Caller) -> None:
    """Store a message of the bot itself; the row's `value` is the key of its sentence."""
    kept = duration(caller.language, retention_of(tx).conversation_hours * 3600)
    text = say(caller.language, row.value, title=caller.channel.title, kept=kept)
    keep_body(tx, new_delivery(tx, inbox_id=row.id), Body(text))
    inbox.mark_generated(tx, row.id)


def _check_commands(tx: Tx, caller: Caller) -> None:
    """Raises LimitReached beyond ten times the channel's messages a minute; where those are unlimited, so are these."""
    most = caller.channel.limits.per_minute * _COMMANDS
    if most and inbox.rows_since(tx, caller.user, tx.now_ms - _NOTICE_WINDOW_MS) > most:
        raise LimitReached("error.limit_commands", retry_after_s=_NOTICE_WINDOW_MS / 1000, limit=most)


def _close_limited(tx: Tx, row: InboxRow) -> bool:
    if limited := inbox.limited_lately(tx, row, _NOTICE_WINDOW_MS):
        inbox.close(tx, row.id, "refused_quietly")
    return limited


def _give_up(tx: Tx, row: InboxRow) -> None:
    fail_reply(tx, row)
    give_up_delivery(tx, new_delivery(tx, inbox_id=row.id))
    inbox.close(tx, row.id, "unconfirmed", dead=True)


def _stored(tx: Tx, row: InboxRow) -> tuple[int, Body, str]:
    """The delivery of a generated row, its text, and the channel whose reply it is ("" for a command's)."""
    delivery_id = new_delivery(tx, inbox_id=row.id)
    body = kept_body(tx, delivery_id)
    if body is None:
        raise EngineError(detail=f"row {row.id} is generated but has no text")
    replied = "channel JOIN generation ON channel.id = channel_id WHERE inbox_id = ? AND state = 'generated'"
    return delivery_id, body, tx.value(f"SELECT name FROM {replied}", [row.id]) or ""
