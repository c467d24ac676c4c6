"""Messages to token ids by the chat template, for replies and for training.

Text of people never becomes a control token: where a message spells one (`<|im_end|>`), the rendered prompt is cut
inside the spelling and the parts are encoded separately, so that it stays plain text. All other text is encoded exactly
as by the tokenizer's `apply_chat_template(tokenize=True)`.
"""

import re
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

from jinja2 import TemplateError

from core.errors import BadInput, EngineError, PromptTooLong
from core.types import Message, Role

CUT = "\uf8ff"  # a private-use character; lengthened until no message holds it


class ChatTokenizer(Protocol):
    """The part of a transformers tokenizer that rendering uses."""

    @property
    def added_tokens_decoder(self) -> Mapping[int, Any]: ...

    @property
    def all_special_tokens(self) -> Sequence[str]: ...

    def apply_chat_template(
        self, conversation: list[dict[str, str]], *, tokenize: bool, add_generation_prompt: bool
    ) -> Any: ...

    def encode(self, text: str, *, add_special_tokens: bool, verbose: bool) -> Any: ...

    def __hash__(self) -> int: ...


@dataclass(frozen=True, slots=True)
class RenderedPrompt:
    """The prompt of one reply. `dropped` counts the oldest messages left out to fit."""

    ids: tuple[int, ...]
    dropped: int


@dataclass(frozen=True, slots=True)
class TrainingRow:
    """One conversation for the trainer. supervised[i]: ids[i] is a training target."""

    ids: tuple[int, ...]
    supervised: tuple[bool, ...]


def render(messages: Sequence[Message], tokenizer: ChatTokenizer, max_tokens: int) -> RenderedPrompt:
    """Render up to the assistant's turn; drop the oldest exchanges until the prompt fits max_tokens.

    Leading system messages and the last message stay; the rest begins with a user's turn.
    Raises PromptTooLong(tokens, limit) if these alone do not fit.
    """
    head, starts = _droppable(messages)

    def ids_from(start: int) -> tuple[int, ...]:
        return _encode_chat([*messages[:head], *messages[start:]], tokenizer)

    whole = ids_from(starts[0])  # nearly always fits, and is rendered once
    if len(whole) <= max_tokens:
        return RenderedPrompt(whole, dropped=0)
    first = bisect_left(starts, True, lo=1, key=lambda start: len(ids_from(start)) <= max_tokens)
    while first < len(starts):
        ids = ids_from(starts[first])
        if len(ids) <= max_tokens:
            return RenderedPrompt(ids, dropped=starts[first] - head)
        first += 1  # a template may grow when a turn is dropped
    raise PromptTooLong(tokens=len(ids_from(starts[-1])), limit=max_tokens)


def render_training(messages: Sequence[Message], tokenizer: ChatTokenizer) -> TrainingRow:
    """Render a whole conversation and supervise the assistant's answers, each up to its end-of-turn token.

    Each answer is encoded apart from its context, as the model sees it when it generates. Where the template rewrites
    earlier answers (reasoning models), only the last answer is supervised. Turns after the last answer are left out.
    Raises BadInput if the conversation has no answer, or the template marks no end of turn.
    """
    answers = [i for i, message in enumerate(messages) if message.role is Role.ASSISTANT]
    if not answers or not messages[answers[-1]].text.strip():
        raise BadInput(detail="a conversation for training needs an answer of the assistant")
    chat = _Chat(messages[: answers[-1] + 1], tokenizer)
    spans = _answer_spans(chat, answers) or _answer_spans(chat, answers[-1:])
    if spans is None:
        raise BadInput(detail="the chat template renders an answer differently from the prompt before it")
    return _supervise(chat, spans)


def _droppable(messages: Sequence[Message]) -> tuple[int, list[int]]:
    """The number of leading system messages, and the indices where the rest may begin: first everything, last the last
    message.
    """
    if not messages:
        raise BadInput(detail="a prompt needs at least one message")
    head = 0
    while head < len(messages) - 1 and messages[head].role is Role.SYSTEM:
        head += 1
    users = [i for i in range(head + 1, len(messages)) if messages[i].role is Role.USER]
    return head, [head, *users]


def _encode_chat(messages: Sequence[Message], tokenizer: ChatTokenizer) -> tuple[int, ...]:
    chat = _Chat(messages, tokenizer)
    return tuple(chat.encode(chat.text(len(messages), answer_follows=True)))


class _Chat:
    """One conversation rendered with cuts, and encoded part by part."""

    def __init__(self, messages: Sequence[Message], tokenizer: ChatTokenizer) -> None:
        self.tokenizer = tokenizer
        self.cut = CUT
        while any(self.cut in message.text for message in messages):
            self.cut += CUT
        self.messages = [Message(m.role, _guard(m.text, tokenizer, self.cut)) for m in messages]

    def text(self, stop: int, *, answer_follows: bool) -> str:
        """The first `stop` messages as the template renders them, cuts included."""
        messages = self.messages[:stop]
        try:
            return _apply(messages, self.tokenizer, answer_follows)
        except TemplateError as first:
            try:  # templates without a system role, or with strictly alternating turns
                return _apply(_strict_turns(messages), self.tokenizer, answer_follows)
            except TemplateError:
                raise EngineError(detail=f"the chat template refuses this conversation: {first}") from first

    def encode(self, text: str) -> list[int]:
        parts = [part for part in text.split(self.cut) if part]
        return [i for part in parts for i in self.tokenizer.encode(part, add_special_tokens=False, verbose=False)]


def _apply(messages: Sequence[Message], tokenizer: ChatTokenizer, answer_follows: bool) -> str:
    turns = [{"role": m.role.value, "content": m.text} for m in messages]
    return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=answer_follows))


def _strict_turns(messages: Sequence[Message]) -> list[Message]:
    """The messages with user and assistant alternating, user first; system text joins the first user message."""
    turns: list[Message] = []
    for message in messages:
        role = Role.USER if message.role is Role.SYSTEM else message.role
        if turns and turns[-1].role is role:
            turns[-1] = Message(role, f"{turns[-1].text}\n\n{message.text}")
        elif turns or role is Role.USER:
            turns.append(Message(role, message.text))
    return turns


def _guard(text: str, tokenizer: ChatTokenizer, cut: str) -> str:
    """Replace lone surrogates, and put a cut into every spelling of a control token."""
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    spelling, ids = _control_tokens(tokenizer)
    if not ids:
        return text
    while True:
        guarded = spelling.sub(lambda found: found[0][:1] + cut + found[0][1:], text)
        if guarded == text:
            break
        text = guarded
    parts = text.split(cut)
    if any(ids.intersection(_plain(part, tokenizer)) for part in parts):
        # The tokenizer's normalizer turns another spelling into a control token: encode such text by characters.
        parts = [char for char in text.replace(cut, "") if not ids.intersection(_plain(char, tokenizer))]
    return cut.join(parts)


def _plain(text: str, tokenizer: ChatTokenizer) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False, verbose=False)) if text else []


@lru_cache(maxsize=8)
def _control_tokens(tokenizer: ChatTokenizer) -> tuple[re.Pattern[str], frozenset[int]]:
    """One pattern for all spellings of special tokens (longest first), and their ids.

    Special tokens of one character cannot be cut; no chat template uses one.
    """
    named = set(tokenizer.all_special_tokens)
    control = {
        i: token.content
        for i, token in tokenizer.added_tokens_decoder.items()
        if (token.special or token.content in named) and len(token.content) > 1
    }
    spellings = sorted(control.values(), key=lambda spelling: (-len(spelling), spelling))
    return re.compile("|".join(map(re.escape, spellings)) or "(?!)"), frozenset(control)


def _answer_spans(chat: _Chat, answers: Sequence[int]) -> list[tuple[int, int]] | None:
    """Start and end of each answer in the whole text, end-of-turn token included; None if the text does not chain."""
    whole = chat.text(len(chat.messages), answer_follows=False)
    spans = []
    for i in answers:
        before = chat.text(i, answer_follows=True)
        after = chat.text(i + 1, answer_follows=False)
        if not after.startswith(before):
            return None
        said = chat.messages[i].text.strip()
        start = after.find(said, len(before))  # a template may put text of its own first
        end = _control_tokens(chat.tokenizer)[0].search(after, start + len(said) if start >= 0 else len(before))
        if end is None:
            raise BadInput(detail="the chat template marks no end of an answer, so the model could not learn to stop")
        if not whole.startswith(after[: end.end()]):
            return None
        spans.append((len(before), end.end()))
    return spans


def _supervise(chat: _Chat, spans: Sequence[tuple[int, int]]) -> TrainingRow:
    whole = chat.text(len(chat.messages), answer_follows=False)
    ids: list[int] = []
    supervised: list[bool] = []
    done = 0
    for start, end in spans:
        for text, taught in ((whole[done:start], False), (whole[start:end], True)):
            encoded = chat.encode(text)
            ids += encoded
            supervised += [taught] * len(encoded)
        done = end
    return TrainingRow(tuple(ids), tuple(supervised))
