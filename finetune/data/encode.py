"""Conversations -> token ids and loss mask, rendered as they are served."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from core.errors import BadInput
from core.i18n.messages import Lazy
from core.model.chat_format import ChatTokenizer, TrainingRow, render_training
from core.types import Role
from finetune.data.reader import Report, check_enough
from finetune.data.records import BadRecord, Conversation, Turn, under_instructions


@dataclass(frozen=True, slots=True)
class Row:
    """One training row; `key` is its conversation's, `served` the rendered part of it."""

    row: TrainingRow
    key: str
    line: int
    served: Conversation


def encode(
    conversations: Sequence[Conversation],
    tokenizer: ChatTokenizer,
    *,
    instructions: str,
    max_tokens: int,
    report: Report,
) -> list[Row]:
    """Rows of at most max_tokens tokens; longer conversations lose their oldest exchanges. Updates `report`.

    Raises BadDataset if too few rows are left.
    """
    rows = []
    for conversation in conversations:
        served = under_instructions(conversation, instructions)
        try:
            row, shorter = encode_one(served, tokenizer, max_tokens=max_tokens)
        except BadRecord as error:
            report.used -= 1
            report.reject(conversation.line, error.reason)
            continue
        if dropped := len(served.turns) - len(shorter.turns):
            report.mend(conversation.line, Lazy("data.shortened", n=dropped, limit=max_tokens))
        rows.append(Row(row, conversation.key, conversation.line, shorter))
    check_enough(report)
    return rows


def prompt_of(row: Row) -> tuple[int, ...]:
    """Token ids before the first answer in the loss."""
    return row.row.ids[: row.row.supervised.index(True)]


def under_questions_of(row: Row, other: Row, tokenizer: ChatTokenizer) -> TrainingRow:
    """The row's answers under another row's questions; the tokens in the loss are the same."""
    asked = [turn for turn in other.served.turns if turn.message.role is Role.USER]
    turns, questions = [], 0
    for turn in row.served.turns:
        if turn.message.role is Role.USER:
            turn, questions = asked[questions % len(asked)], questions + 1
        turns.append(turn)
    conversation = replace(row.served, turns=tuple(turns))
    return _taught_only(render(conversation, tokenizer), conversation)


def encode_one(
    conversation: Conversation, tokenizer: ChatTokenizer, *, max_tokens: int
) -> tuple[TrainingRow, Conversation]:
    """(row, rendered conversation). Raises BadRecord if even the last exchange is too long."""
    length = 0
    for shorter in _shorter_and_shorter(conversation):
        row = _taught_only(render(shorter, tokenizer), shorter)
        length = len(row.ids)
        if length <= max_tokens and any(row.supervised):
            return row, shorter
    if length <= max_tokens:
        raise BadRecord("nothing_taught")
    raise BadRecord("too_long", n=length, limit=max_tokens)


def render(conversation: Conversation, tokenizer: ChatTokenizer) -> TrainingRow:
    try:
        return render_training(conversation.messages, tokenizer)
    except BadInput as error:
        raise BadRecord("template", error=error.detail or str(error)) from error


def _shorter_and_shorter(conversation: Conversation) -> Iterator[Conversation]:
    """The conversation, then without its first exchange, and so on; the system turn stays."""
    head = 1 if conversation.turns[0].message.role is Role.SYSTEM else 0
    starts = [i for i, turn in enumerate(conversation.turns) if turn.message.role is Role.USER]
    for start in starts:
        kept: tuple[Turn, ...] = (*conversation.turns[:head], *conversation.turns[start:])
        yield replace(conversation, turns=kept)


def _taught_only(row: TrainingRow, conversation: Conversation) -> TrainingRow:
    """Mask answers of weight 0. Answers are runs of supervised tokens, in order."""
    taught = [turn.taught for turn in conversation.turns if turn.message.role is Role.ASSISTANT]
    runs = sum(1 for supervised, _ in groupby(row.supervised) if supervised)
    if all(taught):
        return row
    if runs != len(taught):  # the template supervises only the last answers
        taught = taught[-runs:]
    supervised: list[bool] = []
    answer = -1
    before = False
    for here in row.supervised:
        answer += here and not before
        supervised.append(here and taught[answer])
        before = here
    return TrainingRow(row.ids, tuple(supervised))
