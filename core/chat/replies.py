"""Generates a reply and settles it.

The order of the commits: adapter, price and seed are pinned; the handle; the generated text; receipt, charge and turns
in one transaction (core.delivery). After a crash the row is handled again with what was pinned.
"""

import asyncio
import hashlib
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from core.adapters import folders, registry
from core.channels import adapter_names
from core.chat import conversations, inbox
from core.chat.admission import AdmissionQueue, Isolation, PendingReply
from core.chat.inbox import InboxRow
from core.chat.stopping import stopped_since
from core.delivery.deliveries import Deliveries, keep_body, new_delivery
from core.delivery.live_view import LiveView
from core.delivery.retry import deliver
from core.engine.protocol import Delta, Engine, Finished, FinishReason, Generation, Request, Scope, Started
from core.errors import AdapterUnusable, AppError, EngineError, UserError
from core.i18n.messages import say
from core.storage import lifecycle
from core.storage.database import Database, Tx, Value
from core.storage.home import Home
from core.storage.lifecycle import HOUR_MS, Erasure, Periods, Prune, Stage
from core.types import AdapterRef, Address, Body, Button, Caller, Handle, Message, Role, Sampling
from core.usage import ledger, limits, prices

log = logging.getLogger(__name__)
_CUT = {FinishReason.LENGTH: "service.cut_length", FinishReason.DEADLINE: "service.cut_deadline"}
_RETRY_TEMPERATURE = 0.7  # at least: another reply to the same question has to differ


@dataclass(frozen=True, slots=True)
class PinnedReply:
    """The inputs of a reply, from its row in `generation`: the same after a crash. `messages` end with the question."""

    generation_id: str
    delivery_id: int
    adapter: AdapterRef | None
    seed: int
    messages: tuple[Message, ...]


@dataclass(frozen=True, slots=True)
class RunningReply:
    """A reply that a stop can cancel, and the person who asked for it."""

    user: str
    cancel: Callable[[], None]


@dataclass(slots=True)
class Replies:
    """`running` holds the reply in progress of each conversation. `isolation` keeps suspects of a crash apart."""

    database: Database
    home: Home
    engine: Engine
    deliveries: Deliveries
    admission: AdmissionQueue
    sampling: Sampling = field(default_factory=Sampling)  # defaults of the channels
    deadline_s: float = 120.0
    isolation: Isolation = field(default_factory=Isolation)
    running: dict[Address, RunningReply] = field(default_factory=dict)

    async def generate(self, row: InboxRow, caller: Caller, text: str, *, again: bool) -> None:
        """Generate a reply to `text`, or with `again` another one to the last question, and store its final text.

        Raises an AppError for the person.
        """
        key = replace(caller.address, reply_to="")
        pending = PendingReply()
        self.running[key] = RunningReply(caller.user, pending.cancel)
        try:
            # a stop that was accepted before this is in the inbox; a later one cancels `pending`
            if await self.database.read(lambda tx: stopped_since(tx, row, caller.channel.id)):
                raise UserError("service.stopped")
            pinned = await self.database.write(lambda tx: self._pin(tx, row, caller, text, again=again))
            if pinned.adapter is not None:
                await asyncio.to_thread(folders.verify, pinned.adapter)
            handle = await deliver(lambda: self.deliveries.open(pinned.delivery_id, caller.address))
            warmth = max(caller.channel.sampling.temperature, _RETRY_TEMPERATURE if again else 0.0)
            conversation = str(caller.conversation_id)
            request = self.request(
                caller, pinned.generation_id, pinned.messages, pinned.adapter, pinned.seed, conversation, warmth
            )
            alone = self.isolation.section(alone=row.suspect)
            async with alone, self.admission.slot(request.scope, pending):
                began = time.monotonic()
                generation = self.engine.submit(request)
                self.running[key] = RunningReply(caller.user, generation.cancel)
                answer, finished = await self._read(generation, handle, row)
        finally:
            del self.running[key]
        if not answer.strip():
            await self.database.write(lambda tx: _count(tx, pinned, finished))
            stopped = finished.reason is FinishReason.CANCELLED
            raise UserError("service.stopped") if stopped else EngineError("service.empty")
        body = self._body(caller.language, pinned, answer, finished, time.monotonic() - began)
        await self.database.write(lambda tx: _keep(tx, row, pinned, body, finished))

    def stop(self, at: Address, user: str) -> None:
        """Stop the reply in progress there, if `user` asked for it ("": anybody). The text so far becomes the reply."""
        running = self.running.get(replace(at, reply_to=""))
        if running is not None and user in ("", running.user):
            running.cancel()

    def stop_all(self) -> None:
        for running in list(self.running.values()):
            running.cancel()

    def _pin(self, tx: Tx, row: InboxRow, caller: Caller, text: str, *, again: bool) -> PinnedReply:
        channel = caller.channel
        update = f"{row.address.platform}|{row.address.account}|{row.update_key}"
        generation_id = hashlib.sha256(update.encode()).hexdigest()[:32]
        found = tx.one("SELECT adapter, seed FROM generation WHERE id = ?", [generation_id])
        if found is None:
            limits.check(tx, caller)
            sha256, _ = adapter_names.champion(tx, channel.adapter)
            seed = int(generation_id[:8], 16)
            price = prices.price_now(tx, channel.id).id
            pinned: dict[str, Value] = {"adapter": sha256, "price_id": price, "seed": seed, "retry": int(again)}
            asked: dict[str, Value] = {"inbox_id": row.id, "channel_id": channel.id, "user_hash": caller.user}
            tx.insert("generation", id=generation_id, **asked, **pinned, state="running", started_ms=tx.now_ms)
        else:
            sha256, seed = found["adapter"], found["seed"]
        past = conversations.history(tx, caller.conversation_id)
        if again:
            last = max((i for i, turn in enumerate(past) if turn.role is Role.USER), default=-1)
            if last < 0:
                raise UserError("service.nothing_to_retry")
        messages = past[: last + 1] if again else (*past, Message(Role.USER, text))
        delivery_id = new_delivery(tx, inbox_id=row.id)
        return PinnedReply(generation_id, delivery_id, self.adapter_ref(tx, sha256), seed, messages)

    def adapter_ref(self, tx: Tx, sha256: str | None) -> AdapterRef | None:
        """The version's folder; None is the base model. Raises AdapterUnusable, rather than use another version."""
        if sha256 is None:
            return None
        version = registry.by_sha(tx, sha256)
        if version.base_fingerprint != self.engine.info.fingerprint:
            trained_on, loaded = version.base_fingerprint[:12], self.engine.info.model
            told = f"{version.label} was trained on base model {trained_on}, loaded is {loaded}"
            raise AdapterUnusable("error.adapter_other_base", told, label=version.label)
        if version.unpublished:
            raise AdapterUnusable(detail=f"{version.label} is unpublished", label=version.label)
        return AdapterRef(sha256, self.home.adapters / sha256, version.label)

    def request(
        self,
        caller: Caller,
        request_id: str,
        messages: Sequence[Message],
        adapter: AdapterRef | None,
        seed: int,
        conversation: str,
        temperature: float | None = None,
    ) -> Request:
        """A request under the instructions, sampling and limits of the caller's channel."""
        channel = caller.channel
        system = (Message(Role.SYSTEM, channel.instructions),) if channel.instructions else ()
        own, limit = channel.sampling, channel.limits.tokens_out
        warmth = own.temperature if temperature is None else temperature
        return Request(
            id=request_id,
            messages=(*system, *messages),
            sampling=replace(self.sampling, temperature=warmth, top_p=own.top_p, seed=seed, max_tokens=limit),
            adapter=adapter,
            scope=Scope(channel.partner, channel.name, caller.user, conversation, channel.weight),
            max_prompt_tokens=channel.limits.tokens_in,
            deadline_s=self.deadline_s,
        )

    async def _read(self, generation: Generation, handle: Handle, row: InboxRow) -> tuple[str, Finished]:
        """Show the text while it grows; the whole text, and why it ended."""
        view = LiveView(lambda text: self.deliveries.show(handle, row.address, text))
        finished: Finished | None = None
        failure: AppError | None = None
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(view.run())
            try:
                async for event in generation:
                    if isinstance(event, Started):
                        await self.database.write(lambda tx: inbox.mark_started(tx, row))
                    elif isinstance(event, Delta):
                        view.add(event.text)
                    elif isinstance(event, Finished):
                        finished = event
            except AppError as error:
                failure = error
            finally:
                generation.cancel()
                view.end()
        if failure is not None:
            raise failure
        if finished is None:
            raise EngineError(detail="the engine ended a generation without saying so")
        return view.text, finished

    def _body(self, language: str, pinned: PinnedReply, answer: str, finished: Finished, seconds: float) -> Body:
        cut = _CUT.get(finished.reason)
        note = say(language, "service.note", tokens=finished.usage.completion_tokens, seconds=f"{seconds:.1f}")
        go_on = (Button(say(language, "service.continue"), "say", say(language, "service.continue_asked")),)
        return Body(
            answer.strip(),
            (
                *(go_on if cut else ()),
                Button(say(language, "service.again"), "command", "/retry"),
                Button("👍", "feedback", f"{pinned.generation_id}:1"),
                Button("👎", "feedback", f"{pinned.generation_id}:-1"),
            ),
            note=f"{note} · {say(language, cut)}" if cut else note,
        )


def settle(tx: Tx, row: InboxRow, body: Body) -> None:
    """In the transaction of the last receipt: charge, store both turns, close the row."""
    if not inbox.is_generated(tx, row.id):  # erased meanwhile
        return
    sql = "SELECT id, channel_id, retry FROM generation WHERE inbox_id = ? AND state = 'generated'"
    generation = tx.one(sql, [row.id])
    assert generation is not None, row.id
    tx.run("UPDATE generation SET state = 'delivered', ended_ms = ? WHERE id = ?", [tx.now_ms, generation["id"]])
    ledger.charge(tx, generation["id"])
    conversation = conversations.conversation_id(tx, row.address, generation["channel_id"])
    if generation["retry"]:
        conversations.drop_last_answer(tx, conversation)
    else:
        question = inbox.get(tx, row.id).text  # a /retry has taken over another row's
        conversations.append(tx, conversation, row.id, Role.USER, question, row.user_hash)
    conversations.append(tx, conversation, row.id, Role.ASSISTANT, body.text, row.user_hash)
    inbox.close(tx, row.id, "replied")


def fail(tx: Tx, row: InboxRow) -> None:
    """End its generation without a charge; the tokens stay recorded."""
    sql = "UPDATE generation SET state = 'failed', ended_ms = ? WHERE inbox_id = ? AND state <> 'delivered'"
    tx.run(sql, [tx.now_ms, row.id])


def _keep(tx: Tx, row: InboxRow, pinned: PinnedReply, body: Body, finished: Finished) -> None:
    """Raises UserError, and stores nothing, where the person was erased meanwhile."""
    if inbox.is_forgotten(tx, row.id):
        raise UserError("service.stopped")
    _count(tx, pinned, finished)
    tx.run("UPDATE generation SET state = 'generated' WHERE id = ?", [pinned.generation_id])
    keep_body(tx, pinned.delivery_id, body)
    inbox.mark_generated(tx, row.id)


def _count(tx: Tx, pinned: PinnedReply, finished: Finished) -> None:
    """Record the tokens, delivered or not."""
    usage = finished.usage
    tx.run(
        "UPDATE generation SET finish = ?, tokens_in = ?, tokens_reused = ?, tokens_out = ? WHERE id = ?",
        [finished.reason, usage.prompt_tokens, usage.reused_tokens, usage.completion_tokens, pinned.generation_id],
    )


@lifecycle.erases(Stage.REPLIES)
def _erase(tx: Tx, erasure: Erasure) -> None:
    tx.run(
        "UPDATE generation SET state = 'failed', ended_ms = ? WHERE state <> 'delivered' AND inbox_id IN (SELECT id"
        " FROM inbox WHERE user_hash = ? AND received_ms <= ? AND id <> ?"
        " AND state IN ('new', 'running', 'generated'))",
        [tx.now_ms, erasure.user_hash, erasure.until_ms, erasure.keep_row],
    )


@lifecycle.prunes
def _prunes(kept: Periods) -> list[Prune]:
    """A forgotten person's hash stays for an hour, the longest limit: /forget must not reset a limit."""
    forgotten = (
        "user_hash <> '' AND started_ms <= ? AND EXISTS (SELECT 1 FROM erasure"
        " WHERE erasure.user_hash = generation.user_hash AND at_ms >= started_ms)"
    )
    return [lifecycle.batch("UPDATE generation SET user_hash = ''", forgotten, HOUR_MS)]
