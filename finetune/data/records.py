"""One record from JSON or CSV -> one conversation.

Five formats, recognised by their keys:

    {"messages": [{"role": "user", "content": "..."}, ...]}             OpenAI; each with an optional "weight" of 0 or 1
    {"conversations": [{"from": "human", "value": "..."}, ...]}         ShareGPT
    {"prompt": "...", "completion": "..."}                              each a text, or a list of messages
    {"instruction": "...", "input": "...", "output": "..."}             Alpaca
    {"question": "...", "answer": "..."}, or q and a                    also in CSV, like the two before

A "system" key is the system turn. Otherwise common names of question and answer columns in several languages are
recognised, or the operator names the columns.
"""

import hashlib
import json
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from core.i18n.messages import Lazy, Refusal
from core.types import Message, Role

MAX_TURNS = 400
ALIKE = 32  # hexadecimal digits of the key that near duplicates share
ROLES = {
    **dict.fromkeys(("system", "developer"), Role.SYSTEM),
    **dict.fromkeys(("user", "human"), Role.USER),
    **dict.fromkeys(("assistant", "gpt", "bot", "chatgpt", "model"), Role.ASSISTANT),
}
SHAPES: tuple[tuple[str, ...], ...] = (  # the first whose keys a record has
    ("messages",),
    ("conversations",),
    ("prompt", "completion"),
    ("instruction", "output"),
    ("question", "answer"),
    ("q", "a"),
)


QUESTION = frozenset(
    "question questions q prompt instruction query input user human ask asked customer faq"
    " fråga frage pregunta domanda pergunta vraag kysymys spørgsmål spørsmål pytanie вопрос"
    " 问题 問題 问 提问 질문 質問".split()
)
ANSWER = frozenset(
    "answer answers a completion output response reply assistant bot gpt agent target"
    " svar antwort réponse respuesta risposta resposta antwoord vastaus odpowiedź ответ 回答 答案 答 答复 답변".split()
)


class BadRecord(Refusal):
    """The record cannot be used; `reason` is a message of [data] and never quotes the text."""

    def __init__(self, key: str, **fields: object) -> None:
        super().__init__(f"data.{key}", **fields)


class Turn(NamedTuple):
    message: Message
    taught: bool  # in the loss


@dataclass(frozen=True, slots=True)
class Conversation:
    """An optional system turn, then user and assistant alternating; the last is the assistant's.

    `line` is its first line in the file; `key` hashes its text without the channel's instructions.
    """

    turns: tuple[Turn, ...]
    key: str = ""
    line: int = 0

    @property
    def messages(self) -> tuple[Message, ...]:
        return tuple(turn.message for turn in self.turns)


@dataclass(slots=True)
class Mending:
    """Collects the repairs of a record."""

    said: list[Lazy]

    def note(self, key: str, **fields: object) -> None:
        what = Lazy(f"data.{key}", **fields)
        if not any((str(one), one.fields) == (str(what), what.fields) for one in self.said):
            self.said.append(what)


def read_record(record: Any, columns: Mapping[str, str] | None = None) -> tuple[Conversation, tuple[Lazy, ...]]:
    """(conversation, repairs). `columns` maps question, answer and system to names in the file. Raises BadRecord."""
    if not isinstance(record, Mapping):
        raise BadRecord("no_object", kind=_kind(record))
    mending = Mending([])
    turns = _in_turn(_turns(_named(record, columns) if columns else record, mending), mending)
    conversation = Conversation(tuple(turns))
    return replace(conversation, key=conversation_key(conversation)), tuple(mending.said)


def conversation_key(conversation: Conversation) -> str:
    """Identity for duplicates and the split: half a SHA-256 of the text without case, punctuation and spaces (equal for
    near duplicates, so they share a part), then half a SHA-256 of the exact text.
    """
    said = [(turn.message.role.value, turn.message.text) for turn in conversation.turns]
    return _hash([(role, bare(text)) for role, text in said])[:ALIKE] + _hash(said)[ALIKE:]


def _hash(said: list[tuple[str, str]]) -> str:
    """SHA-256 of the canonical JSON of (role, text) pairs."""
    return hashlib.sha256(json.dumps(said, ensure_ascii=True, separators=(",", ":")).encode()).hexdigest()


def bare(text: str) -> str:
    """Letters, digits and signs alone, without case; a text that has none stays as it is."""
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return folded.translate(_MARKS) or text


class _Marks(dict[int, int | None]):
    """For str.translate: punctuation, spaces and what cannot be seen go; filled as it is asked."""

    def __missing__(self, code: int) -> int | None:
        self[code] = None if unicodedata.category(chr(code))[0] in "PZC" else code
        return self[code]


_MARKS = _Marks()


def under_instructions(conversation: Conversation, instructions: str) -> Conversation:
    """The conversation as it is served: one without a system turn stands under the channel's instructions."""
    if not instructions or conversation.turns[0].message.role is Role.SYSTEM:
        return conversation
    first = Turn(Message(Role.SYSTEM, instructions), taught=False)
    return replace(conversation, turns=(first, *conversation.turns))


def pair_of(names: Iterable[str]) -> tuple[str, str] | None:
    """The (question, answer) column names, if unambiguous."""
    known = list(names)
    asked = [name for name in known if _plain(name) in QUESTION]
    said = [name for name in known if _plain(name) in ANSWER]
    return (asked[0], said[0]) if len(asked) == len(said) == 1 else None


def find_name(names: Iterable[str], wanted: str) -> str | None:
    """The equal name, or one equal up to case and spaces."""
    known = list(names)
    return wanted if wanted in known else next((name for name in known if _plain(name) == _plain(wanted)), None)


def _plain(name: str) -> str:
    return " ".join(name.split()).casefold()


def _named(record: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """The record under standard keys. Raises BadRecord naming a missing key."""
    found: dict[str, Any] = {}
    for ours, theirs in columns.items():
        name = find_name((key for key in record if isinstance(key, str)), theirs)
        if name is not None:
            found[ours] = record[name]
        elif ours != "system":
            raise BadRecord("no_named_key", name=theirs[:40])
    return found


def _turns(record: Mapping[str, Any], mending: Mending) -> list[Turn]:
    shape = next((keys for keys in SHAPES if all(record.get(key) is not None for key in keys)), None)
    if shape is None:
        shape = pair_of(key for key, value in record.items() if isinstance(key, str) and value is not None)
    if shape is None:
        known = "; ".join(" and ".join(keys) for keys in SHAPES)
        raise BadRecord("no_keys", known=known)
    return [*_system(record, mending), *_spoken(record, shape, mending)]


def _spoken(record: Mapping[str, Any], shape: tuple[str, ...], mending: Mending) -> list[Turn]:
    if shape in (("messages",), ("conversations",)):
        return _list(record[shape[0]], mending)
    if shape == ("prompt", "completion"):
        prompt, completion = record["prompt"], record["completion"]
        asked = _list(prompt, mending) if isinstance(prompt, list) else [_turn(Role.USER, prompt, mending)]
        said = (
            _list(completion, mending) if isinstance(completion, list) else [_turn(Role.ASSISTANT, completion, mending)]
        )
        return [*(turn._replace(taught=False) for turn in asked), *said]
    asked_key, said_key = shape[0], shape[1]
    question = _text(record[asked_key], asked_key, mending)
    if shape == ("instruction", "output") and record.get("input"):
        question = f"{question}\n\n{_text(record['input'], 'input', mending)}"
    answer = _text(record[said_key], said_key, mending)
    return [
        Turn(Message(Role.USER, question.strip()), taught=False),
        Turn(Message(Role.ASSISTANT, answer.strip()), taught=True),
    ]


def _system(record: Mapping[str, Any], mending: Mending) -> list[Turn]:
    return [_turn(Role.SYSTEM, record["system"], mending)] if record.get("system") else []


def _turn(role: Role, content: Any, mending: Mending) -> Turn:
    return Turn(Message(role, _text(content, role.value, mending).strip()), taught=role is Role.ASSISTANT)


def _list(given: Any, mending: Mending) -> list[Turn]:
    if not isinstance(given, list) or not given:
        raise BadRecord("no_list")
    if len(given) > MAX_TURNS:
        raise BadRecord("many_messages", n=len(given), limit=MAX_TURNS)
    return [_message(one, number, mending) for number, one in enumerate(given, 1)]


def _message(given: Any, number: int, mending: Mending) -> Turn:
    if not isinstance(given, Mapping):
        raise BadRecord("message_no_object", n=number, kind=_kind(given))
    name = given.get("role", given.get("from"))
    role = ROLES.get(name.strip().lower()) if isinstance(name, str) else None
    if role is None:
        shown = repr(name[:20]) if isinstance(name, str) else _kind(name)
        raise BadRecord("role", n=number, role=shown)
    content = given.get("content", given.get("value"))
    turn = _turn(role, _joined(content, number), mending)
    weight = given.get("weight", 1)
    if isinstance(weight, bool) or weight not in (0, 1):
        raise BadRecord("weight", n=number)
    return turn._replace(taught=turn.taught and weight == 1)


def _joined(content: Any, number: int) -> Any:
    """Joins a list of text parts; other parts raise BadRecord."""
    if not isinstance(content, list):
        return content
    if not all(isinstance(part, Mapping) and part.get("type") == "text" for part in content):
        raise BadRecord("more_than_text", n=number)
    texts = [part.get("text") for part in content]
    if not all(isinstance(text, str) for text in texts):
        raise BadRecord("part_without_text", n=number)
    return "".join(texts)


def _text(given: Any, where: str, mending: Mending) -> str:
    """Text without NUL and lone surrogates."""
    if not isinstance(given, str):
        raise BadRecord("no_text", where=where, kind=_kind(given))
    text = given
    if "\0" in text:
        text = text.replace("\0", "")
        mending.note("nul")
    if any("\ud800" <= char <= "\udfff" for char in text):
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        mending.note("surrogates")
    return text


def _kind(value: Any) -> Lazy:
    names = {dict: "object", list: "list", str: "text", bool: "bool", type(None): "empty"}
    return Lazy(f"data.kind_{names.get(type(value), 'number')}")


def _in_turn(turns: list[Turn], mending: Mending) -> list[Turn]:
    """Merge consecutive turns of one role, drop a trailing question, and check that roles alternate."""
    merged: list[Turn] = []
    for turn in turns:
        role, text = turn.message.role, turn.message.text
        if not text:
            raise BadRecord("empty_message", role=role.value)
        last = merged[-1] if merged else None
        if last is not None and last.message.role is role and last.taught == turn.taught:
            merged[-1] = last._replace(message=Message(role, f"{last.message.text}\n\n{text}"))
            mending.note("joined", role=role.value)
        elif role is Role.SYSTEM and last is not None:
            raise BadRecord("late_system")
        elif last is not None and last.message.role is role:
            raise BadRecord("two_weights")
        else:
            merged.append(turn)
    while merged and merged[-1].message.role is not Role.ASSISTANT:
        merged.pop()
        mending.note("tail")
    if not merged:
        raise BadRecord("no_answer")
    spoken = merged[1:] if merged[0].message.role is Role.SYSTEM else merged
    if spoken[0].message.role is not Role.USER:
        raise BadRecord("no_question")
    if not any(turn.taught for turn in merged):
        raise BadRecord("nothing_weighs")
    return merged
