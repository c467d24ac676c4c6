"""What people said in a channel and allow to be learned from, as conversations. Reads rows; knows no file and no job.

Two sources: whole conversations of those who gave /consent, and single replies that they rated or that an operator
corrected (core.chat.feedback keeps those). Platforms that forbid training stay out (core.channels.training_permission).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field

from core.channels import training_permission
from core.errors import StoredUnreadable
from core.storage.database import Tx

MOST_TURNS = 40_000  # the newest of them


@dataclass(slots=True)
class ConsentedExample:
    """One conversation of one person, as rows of a data set hold it. `id` is of what it was made from.

    `corrected_by`: whose words the answer is, where an operator has corrected it.
    """

    user: str
    id: str
    messages: list[dict[str, str | int]] = field(default_factory=list)
    corrected_by: str = ""

    @property
    def people(self) -> set[str]:
        """Whose words are in it."""
        return {self.user, self.corrected_by} - {""}


@dataclass(frozen=True, slots=True)
class ConsentedExamples:
    """`unreadable` turns or replies are damaged, or of another key: they are left out, with what belongs to them."""

    said: list[ConsentedExample]
    unreadable: int


def conversations_of(tx: Tx, channel_id: int, *, most: int | None = None) -> ConsentedExamples:
    """What was asked since the person consented and not refused, each question with its answer; people stay apart.

    Of `most` turns, the newest; None is MOST_TURNS. Raises StoredUnreadable where not one of them can be read.
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
    said: dict[tuple[int, str], ConsentedExample] = {}
    question: tuple[tuple[int, str], str] | None = None
    unreadable = 0
    for row in rows:
        whose = (row["conversation_id"], row["user_hash"])
        text = _unsealed(tx, row["text"])
        if text is None:
            question = None
            unreadable += 1
        elif row["role"] == "user":
            question = (whose, text)
        elif question is not None and question[0] == whose:
            one = said.setdefault(whose, ConsentedExample(row["user_hash"], str(row["conversation_id"])))
            one.messages += [{"role": "user", "content": question[1]}, {"role": "assistant", "content": text}]
            question = None
    return _counted(list(said.values()), unreadable, len(rows))


def examples_of(tx: Tx, channel_id: int, *, most: int | None = None) -> ConsentedExamples:
    """Replies with a thumb up as they were given, and corrected ones with the correction in the place of the answer.

    Of people who consented, for all that they say here or for this one reply. What came before an answer is read by the
    model and not learned. Of `most` replies, the newest; None is MOST_TURNS. Raises StoredUnreadable where not one of
    them can be read.
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
    said = []
    for row in reversed(rows):
        text = _unsealed(tx, row["said"])
        correction = "" if row["correction"] is None else _unsealed(tx, row["correction"])
        if text is None or correction is None:
            continue
        *before, answer = json.loads(text)
        if correction:
            answer = {"role": "assistant", "content": correction}
        earlier = [{**one, "weight": 0} if one["role"] == "assistant" else one for one in before]
        said.append(
            ConsentedExample(row["user_hash"], row["generation_id"], [*earlier, answer], row["corrected_by"] or "")
        )
    return _counted(said, len(rows) - len(said), len(rows))


def _unsealed(tx: Tx, sealed: bytes) -> str | None:
    try:
        return tx.cipher.unseal(sealed)
    except StoredUnreadable:
        return None


def _counted(said: list[ConsentedExample], unreadable: int, of: int) -> ConsentedExamples:
    """Raises StoredUnreadable where nothing was readable: then it is the key."""
    if of and unreadable == of:
        raise StoredUnreadable(detail=f"none of {of} stored texts can be read")
    return ConsentedExamples(said, unreadable)
