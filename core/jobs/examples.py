"""Consented examples: whole conversations of people who gave /consent, and replies that were rated or corrected.

Platforms that forbid training are left out (core.channels.training_permission).
"""

import asyncio
import json
from dataclasses import dataclass, field
from typing import NamedTuple

from core.channels import training_permission
from core.commands.registry import CommandContext
from core.errors import AppError, BadInput, StoredUnreadable
from core.jobs import datasets
from core.jobs.datasets import CONVERSATIONS
from core.storage.database import Tx
from core.types import Caller

MOST_TURNS = 40_000  # the newest ones


@dataclass(slots=True)
class ConsentedExample:
    """A row of a data set. `id`: its conversation or generation. `corrected_by`: the operator who wrote the answer."""

    user: str
    id: str
    messages: list[dict[str, str | int]] = field(default_factory=list)
    corrected_by: str = ""


class ConsentedExamples(NamedTuple):
    """`unreadable` counts stored texts that cannot be decrypted; they are left out."""

    examples: list[ConsentedExample]
    unreadable: int


def conversations_of(tx: Tx, channel_id: int, *, most: int | None = None) -> ConsentedExamples:
    """Questions with their answers since each person's consent, one conversation for each person.

    Reads the `most` (MOST_TURNS) newest turns. Raises StoredUnreadable where none of them can be decrypted.
    """
    forbidden = training_permission.forbidden(tx)
    marks = ", ".join("?" * len(forbidden))
    rows = tx.all(
        "SELECT * FROM (SELECT conversation_id, turn.user_hash, role, text, turn.id FROM turn"
        " JOIN conversation ON conversation.id = conversation_id"
        " JOIN consent ON consent.user_hash = turn.user_hash AND consent.channel_id = conversation.channel_id"
        " WHERE conversation.channel_id = ? AND at_ms >= granted_ms AND NOT refused"
        f" AND conversation.platform NOT IN ({marks})"
        " ORDER BY turn.id DESC LIMIT ?) ORDER BY conversation_id, user_hash, id",
        [channel_id, *forbidden, MOST_TURNS if most is None else most],
    )
    examples: dict[tuple[int, str], ConsentedExample] = {}
    question: tuple[tuple[int, str], str] | None = None
    unreadable = 0
    for row in rows:
        key, text = (row["conversation_id"], row["user_hash"]), _unsealed(tx, row["text"])
        if text is None:
            question = None
            unreadable += 1
        elif row["role"] == "user":
            question = (key, text)
        elif question is not None and question[0] == key:
            example = examples.setdefault(key, ConsentedExample(row["user_hash"], str(row["conversation_id"])))
            example.messages += [{"role": "user", "content": question[1]}, {"role": "assistant", "content": text}]
            question = None
    return _counted(list(examples.values()), unreadable, len(rows))


def examples_of(tx: Tx, channel_id: int, *, most: int | None = None) -> ConsentedExamples:
    """Replies with a thumb up, and corrected replies with the correction as the answer.

    The person consented for the channel or shared this reply. Earlier answers have weight 0: they are not learned.
    Reads the `most` newest replies (MOST_TURNS). Raises StoredUnreadable where none can be decrypted.
    """
    forbidden = training_permission.forbidden(tx)
    marks = ", ".join("?" * len(forbidden))
    rows = tx.all(
        "SELECT example.generation_id, example.user_hash, said, correction, corrected_by FROM example"
        " LEFT JOIN feedback ON feedback.generation_id = example.generation_id"
        " AND feedback.user_hash = example.user_hash"
        " WHERE example.channel_id = ? AND (correction IS NOT NULL OR vote = 1)"
        " AND (shared = 1 OR EXISTS (SELECT 1 FROM consent WHERE consent.user_hash = example.user_hash"
        f" AND consent.channel_id = example.channel_id)) AND platform NOT IN ({marks})"
        " ORDER BY example.at_ms DESC, example.generation_id DESC LIMIT ?",
        [channel_id, *forbidden, MOST_TURNS if most is None else most],
    )
    examples = []
    for row in reversed(rows):
        text = _unsealed(tx, row["said"])
        correction = "" if row["correction"] is None else _unsealed(tx, row["correction"])
        if text is None or correction is None:
            continue
        *earlier, answer = json.loads(text)
        if correction:
            answer = {"role": "assistant", "content": correction}
        context = [{**message, "weight": 0} if message["role"] == "assistant" else message for message in earlier]
        corrected_by = row["corrected_by"] or ""
        examples.append(ConsentedExample(row["user_hash"], row["generation_id"], [*context, answer], corrected_by))
    return _counted(examples, len(rows) - len(examples), len(rows))


def _unsealed(tx: Tx, sealed: bytes) -> str | None:
    try:
        return tx.cipher.unseal(sealed)
    except StoredUnreadable:
        return None


def _counted(examples: list[ConsentedExample], unreadable: int, total: int) -> ConsentedExamples:
    """Raises StoredUnreadable where no text was readable: the key is wrong."""
    if total and unreadable == total:
        raise StoredUnreadable(detail=f"none of {total} stored texts can be read")
    return ConsentedExamples(examples, unreadable)


async def store_examples(context: CommandContext, caller: Caller, source: str) -> tuple[str, int]:
    """Store the consented examples of the caller's channel as a data set; (sha256, unreadable texts).

    Raises BadInput where there are none, AppError where a consent was withdrawn meanwhile.
    """
    channel, database = caller.channel.id, context.database
    read = conversations_of if source == CONVERSATIONS else examples_of
    examples, unreadable = await database.read(lambda tx: read(tx, channel))
    if not examples and unreadable:
        raise BadInput("training.none_readable", n=unreadable)
    if not examples:
        count = "SELECT count(*) FROM consent WHERE channel_id = ?"
        raise BadInput(f"training.no_{source}", people=await database.read(lambda tx: tx.value(count, [channel])))
    lines = [json.dumps({"messages": one.messages}, ensure_ascii=False).encode() + b"\n" for one in examples]
    sha256, size = await asyncio.to_thread(datasets.store, context.home, iter(lines))

    def keep(tx: Tx) -> None:
        now = read(tx, channel, most=2 * MOST_TURNS).examples  # newer turns may have arrived meanwhile
        if not {_identity(one) for one in examples} <= {_identity(one) for one in now}:
            raise AppError("training.consent_changed")
        datasets.keep_dataset(tx, sha256, source, source, size, caller.user)
        for user in sorted({user for one in examples for user in (one.user, one.corrected_by) if user}):
            datasets.add_person(tx, sha256, user)

    try:
        await database.write(keep)
    except AppError:
        if await database.read(lambda tx: datasets.is_erased(tx, sha256)):
            await asyncio.to_thread(datasets.path_of(context.home, sha256).unlink, missing_ok=True)
        raise
    return sha256, unreadable


def _identity(example: ConsentedExample) -> tuple[str, str, str]:
    return example.user, example.id, example.corrected_by
