"""/adapter compare and choose: one question, answered blind by a candidate and by the champion, and a person's choice.

The order of the answers is drawn at random, stored, and shown only after the choice. Nothing is charged or becomes part
of the conversation.
"""

import asyncio
import logging
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from core.adapters import folders, registry
from core.adapters.commands import check_usable, find_version, promote_button
from core.adapters.registry import Version
from core.channels import adapter_names, audit
from core.channels.adapter_names import BASE
from core.chat import inbox
from core.chat.admission import PendingReply
from core.chat.inbox import InboxRow
from core.chat.replies import Replies, RunningReply
from core.chat.stopping import stopped_since
from core.commands.registry import command
from core.commands.table import Call
from core.delivery.deliveries import keep_body, new_delivery
from core.delivery.live_view import show_once
from core.delivery.retry import deliver
from core.engine.protocol import Delta, Finished, FinishReason, Generation, Request
from core.errors import AdapterUnusable, BadInput, EngineError, UnknownThing, UserError
from core.i18n.messages import say
from core.jobs import jobs
from core.storage import lifecycle
from core.storage.database import Row, Tx
from core.storage.lifecycle import Erasure, Periods, Prune, Stage
from core.types import Body, Button, Caller, Effect, Message, Outcome, Role

log = logging.getLogger(__name__)
_MAX_QUESTION = 2000


@dataclass(frozen=True, slots=True)
class Pair:
    """A question and the versions that answer it, in the order in which the answers are shown."""

    id: int
    question: str
    answerers: tuple[str | None, str | None]  # sha256; None is base


# --- rows and commands: run inside a transaction ---


@command("adapter", "compare")
def compare(tx: Tx, caller: Caller, call: Call) -> Outcome:
    """Begin a comparison. Raises UnknownThing, BadInput for an unusable version or where there is no question."""
    version = find_version(tx, caller, call.arguments["version"])
    champion, label = adapter_names.champion(tx, caller.channel.adapter)
    if version is None and champion is not None:
        candidate, other = registry.by_sha(tx, champion), None  # base has no row: it is the other one
    elif version is not None and version.sha256 != champion:
        candidate, other = version, champion
    else:
        raise BadInput("compare.itself", label=label)
    check_usable(tx, candidate)
    typed = call.arguments.get("question", "").strip()
    question = typed or _unseen_question(tx, caller, candidate)
    if len(question) > _MAX_QUESTION:
        raise BadInput("compare.question_too_long", limit=_MAX_QUESTION)
    if tx.value("SELECT 1 FROM comparison WHERE inbox_id = ?", [caller.inbox_id]) is None:
        pair = {"candidate": candidate.sha256, "other": other, "question": tx.cipher.seal(question)}
        asked = {"inbox_id": caller.inbox_id, "channel_id": caller.channel.id, "candidate_first": secrets.randbelow(2)}
        tx.insert("comparison", **pair, **asked, typed=bool(typed), actor=caller.user, at_ms=tx.now_ms)
    return Outcome(Body(""), (Effect.COMPARE_BLIND,))


@command("adapter", "choose")
def choose(tx: Tx, caller: Caller, call: Call) -> Outcome:
    """Store a choice once, and tell which version it was. Raises UnknownThing."""
    typed, choice = call.arguments["comparison"], call.arguments["choice"]
    row = _find(tx, caller, typed)
    if row["chosen"] is None:
        first = bool(row["candidate_first"])
        chosen = "same" if choice == "same" else "candidate" if (choice == "a") == first else "other"
        _settle(tx, row["id"], chosen)
        audit.record(tx, caller, "adapter choose", _label(tx, row["candidate"]), None, {"chosen": chosen})
        head = _told(tx, caller.language, row, chosen)
    else:
        head = say(caller.language, "compare.chosen_already", what=_told(tx, caller.language, row, row["chosen"]))
    return Outcome(_with_score(tx, caller.language, row, head))


def score(tx: Tx, candidate: str, other: str | None) -> tuple[int, int, int]:
    """How often was chosen: (the candidate, the other, neither)."""
    sql = "SELECT count(*) FROM comparison WHERE candidate = ? AND other IS ? AND chosen = ?"
    better, worse, same = (int(tx.value(sql, [candidate, other, one])) for one in ("candidate", "other", "same"))
    return better, worse, same


def _unseen_question(tx: Tx, caller: Caller, version: Version) -> str:
    """A test question that this candidate was not asked yet, uncut ones first; else the first. Raises BadInput."""
    rows = tx.all("SELECT question FROM comparison WHERE candidate = ?", [version.sha256])
    asked = {tx.cipher.unseal(row["question"]) for row in rows if row["question"]}
    kept = [question for question, _ in jobs.test_rows(tx, version.sha256).unseen]
    unseen = sorted(kept, key=lambda question: question.endswith("…")) or list(caller.channel.questions)
    if not unseen:
        raise BadInput("compare.no_question", label=version.label)
    return next((question for question in unseen if question not in asked), unseen[0])


def _find(tx: Tx, caller: Caller, typed: str) -> Row:
    number = int(typed) if typed.isdecimal() and len(typed) < 16 else 0
    row = tx.one("SELECT * FROM comparison WHERE id = ? AND channel_id = ?", [number, caller.channel.id])
    if row is None:
        raise UnknownThing("compare.unknown", typed=typed[:40])
    return row


def _settle(tx: Tx, comparison_id: int, chosen: str) -> None:
    tx.run("UPDATE comparison SET chosen = ?, chosen_ms = ? WHERE id = ?", [chosen, tx.now_ms, comparison_id])


def _told(tx: Tx, language: str, row: Row, chosen: str) -> str:
    labels = _label(tx, row["candidate"]), _label(tx, row["other"])
    first, second = labels if row["candidate_first"] else labels[::-1]
    if chosen == "same":
        return say(language, "compare.was_same", first=first, second=second)
    label = labels[0] if chosen == "candidate" else labels[1]
    return say(language, "compare.was", label=label, first=first, second=second)


def _with_score(tx: Tx, language: str, row: Row, head: str) -> Body:
    label, other = _label(tx, row["candidate"]), _label(tx, row["other"])
    better, worse, same = score(tx, row["candidate"], row["other"])
    told = say(language, "compare.score", label=label, other=other, better=better, worse=worse, same=same)
    champion, _ = adapter_names.champion(tx, registry.by_sha(tx, row["candidate"]).name)
    idle = other if row["candidate"] == champion else label
    another = Button(say(language, "compare.another"), "command", f"/adapter compare {idle}")
    return Body(f"{head}\n{told}", (another, promote_button(language, idle)))


def _label(tx: Tx, sha256: str | None) -> str:
    return registry.by_sha(tx, sha256).label if sha256 else BASE


# --- both answers ---


@dataclass(slots=True)
class BothAnswers:
    """Two answers that are cancelled together, waiting or running."""

    answers: list[Generation | PendingReply] = field(default_factory=list)
    stopped: bool = False

    def cancel(self) -> None:
        self.stopped = True
        for answer in self.answers:
            answer.cancel()


async def answer(replies: Replies, row: InboxRow, caller: Caller) -> None:
    """Answer the row's question twice and store the text. Raises an AppError for the person."""
    database, key, both = replies.database, replace(caller.address, reply_to=""), BothAnswers()
    replies.running[key] = RunningReply(caller.user, both.cancel)
    try:
        if await database.read(lambda tx: stopped_since(tx, row, caller.channel.id)):  # a later stop cancels `both`
            raise UserError("service.stopped")
        pair = await database.read(lambda tx: _pair(tx, row.id))
        refs = await database.read(lambda tx: tuple(replies.adapter_ref(tx, sha256) for sha256 in pair.answerers))
        for ref in refs:
            if ref is not None:
                await asyncio.to_thread(folders.verify, ref)
        delivery_id = await database.write(lambda tx: new_delivery(tx, inbox_id=row.id))
        handle = await deliver(lambda: replies.deliveries.open(delivery_id, caller.address))
        text = say(caller.language, "compare.answering")
        await show_once(lambda: replies.deliveries.show(handle, caller.address, text))
        question, names = [Message(Role.USER, pair.question)], [f"comparison-{pair.id}-{number}" for number in (0, 1)]
        asked = zip(names, refs, strict=True)
        requests = [replies.request(caller, name, question, ref, pair.id, name) for name, ref in asked]
        async with replies.isolation.section(alone=row.suspect):
            await database.write(lambda tx: inbox.mark_started(tx, row))
            answers = await _answers(replies, requests, both)
    except AdapterUnusable as error:  # not the fault of the channel's champion
        log.error("compare.unusable", extra={"error": str(error)})
        raise BadInput("compare.unusable", label=error.fields.get("label", "?")) from error
    finally:
        both.cancel()
        del replies.running[key]

    def keep(tx: Tx) -> None:
        """Raises UserError, and stores nothing, where the person was erased meanwhile."""
        if inbox.is_forgotten(tx, row.id):
            raise UserError("service.stopped")
        keep_body(tx, delivery_id, _body(tx, caller, pair, answers))
        inbox.mark_generated(tx, row.id)

    await database.write(keep)


async def _answers(replies: Replies, requests: Sequence[Request], both: BothAnswers) -> list[str]:
    """Both at once, as far as admission allows; a stop cancels both. Raises AppError."""

    async def one(request: Request) -> str:
        pending = PendingReply()
        both.answers.append(pending)
        if both.stopped:
            pending.cancel()
        async with replies.admission.slot(request.scope, pending):
            generation = replies.engine.submit(request)
            both.answers.append(generation)
            return await _read(generation)

    answers = await asyncio.gather(*map(one, requests), return_exceptions=True)
    for found in answers:
        if isinstance(found, BaseException):
            raise found
    return [found for found in answers if isinstance(found, str)]


async def _read(generation: Generation) -> str:
    """Raises UserError where it was stopped: half an answer is not compared."""
    text = ""
    async for event in generation:
        if isinstance(event, Delta):
            text += event.text
        elif isinstance(event, Finished) and event.reason is FinishReason.CANCELLED:
            raise UserError("service.stopped")
    if not text.strip():
        raise EngineError("service.empty")
    return text.strip()


def _pair(tx: Tx, inbox_id: int) -> Pair:
    """Raises UserError where the person, and so the question, was erased meanwhile."""
    found = tx.one("SELECT * FROM comparison WHERE inbox_id = ?", [inbox_id])
    assert found is not None, inbox_id
    if found["question"] is None:
        raise UserError("service.stopped")
    one, two = ("candidate", "other") if found["candidate_first"] else ("other", "candidate")
    return Pair(found["id"], tx.cipher.unseal(found["question"]), (found[one], found[two]))


def _body(tx: Tx, caller: Caller, pair: Pair, answers: list[str]) -> Body:
    """Both answers without their versions. Identical ones count as a tie."""
    language = caller.language
    row = tx.one("SELECT * FROM comparison WHERE id = ?", [pair.id])
    assert row is not None
    if answers[0] == answers[1]:
        _settle(tx, pair.id, "same")
        head = say(language, "compare.identical", question=pair.question, answer=answers[0])
        return _with_score(tx, language, row, head)
    text = say(language, "compare.blind", question=pair.question, a=answers[0], b=answers[1])
    told = ((say(language, f"compare.choose_{key}"), f"/adapter choose {pair.id} {key}") for key in ("a", "b", "same"))
    return Body(text, tuple(Button(label, "command", line) for label, line in told))


@lifecycle.erases(Stage.TEXT)
def _erase(tx: Tx, erasure: Erasure) -> None:
    sql = "UPDATE comparison SET question = NULL WHERE actor = ? AND at_ms <= ?"
    tx.run(sql, [erasure.user_hash, erasure.until_ms])


@lifecycle.prunes
def _prunes(kept: Periods) -> list[Prune]:
    """A typed question is a message of a person; one from a test row goes with its data set, by a trigger."""
    typed = "question IS NOT NULL AND typed = 1 AND at_ms <= ?"
    return [lifecycle.batch("UPDATE comparison SET question = NULL", typed, kept.conversation)]
