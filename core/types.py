"""Values that cross packages: frozen dataclasses and enums, without behaviour."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from pathlib import Path
from typing import Any, NewType

Handle = NewType("Handle", str)  # JSON of the bot: addresses one part of a delivery that can still be edited
Receipt = NewType("Receipt", str)  # JSON of the bot: proof that the platform holds a part in its final form


class Lane(StrEnum):
    """CONTROL is handled at once and is idempotent; TURN waits for its conversation's earlier turns."""

    CONTROL = "control"
    TURN = "turn"


class Kind(StrEnum):
    MESSAGE = "message"
    EDIT = "edit"
    PRESS = "press"
    MEMBERSHIP = "membership"
    STOP = "stop"


class Role(StrEnum):
    SYSTEM = "system"
    USER = "user"
    ASSISTANT = "assistant"


@dataclass(frozen=True, slots=True)
class Message:
    """One message of the chat template."""

    role: Role
    text: str


@dataclass(frozen=True, slots=True)
class Address:
    """Where a reply goes. `place` is a chat or channel of the platform; `conversation` is a thread in it."""

    platform: str
    account: str
    place: str
    conversation: str
    reply_to: str = ""


@dataclass(frozen=True, slots=True)
class Attachment:
    """A file that a person sent. `file_id` is the platform's id; on the terminal a local path."""

    file_id: str
    name: str
    size_bytes: int = 0
    media_type: str = ""


@dataclass(frozen=True, slots=True)
class Incoming:
    """One platform update, parsed. `update_key` and `message_key` are unique per account: a repeat is a no-op."""

    lane: Lane
    kind: Kind
    address: Address
    user: str  # the platform's immutable id; stored only as a keyed hash
    update_key: str
    message_key: str
    text: str = ""
    command: str = ""  # the command behind a pressed button; a typed one is recognised in `text`
    language: str = ""
    attachments: tuple[Attachment, ...] = ()
    action: str = ""
    value: str = ""
    answers: str = ""  # the receipt of our message that this one replies to
    public: bool = False  # others can read the answer
    moderates: bool = False  # a moderator of the place: may stop anyone's reply there
    second_hand: bool = False  # forwarded, or written through another bot: answers no question of ours


@dataclass(frozen=True, slots=True)
class Button:
    """A button below a reply. A press arrives as Incoming(kind=PRESS, action=..., value=...)."""

    text: str
    action: str
    value: str = ""


@dataclass(frozen=True, slots=True)
class Body:
    """The content of one reply: Markdown text, buttons, files."""

    text: str
    buttons: tuple[Button, ...] = ()
    files: tuple[Path, ...] = ()
    note: str = ""  # a remark on the reply (tokens, seconds) that a bot may leave out


@dataclass(frozen=True, slots=True)
class Sampling:
    """Sampling of one reply. temperature 0 is greedy; top_k 0, top_p 1, min_p 0 and repetition_penalty 1 are off.

    Random numbers depend only on `seed` and the token's position.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    max_tokens: int = 512


@dataclass(frozen=True, slots=True)
class TokenUsage:
    """Tokens of one generation. `reused_tokens` are prompt tokens found in the prefix cache."""

    prompt_tokens: int
    completion_tokens: int
    reused_tokens: int = 0


@dataclass(frozen=True, slots=True)
class AdapterRef:
    """An adapter version: its hash and folder, and its label `name@version` for people."""

    sha256: str
    folder: Path
    label: str = ""


def _limit(default: int, help: str, least: int = 0) -> int:
    bounds = {"ge": least, "le": 1_000_000_000}
    made: Any = field(default=default, metadata={"help": help, "chat": "operator", "bounds": bounds})
    return made  # type: ignore[no-any-return]


@dataclass(frozen=True, slots=True)
class Limits:
    """What one person may use in a channel. core.config.keys reads the metadata of each field."""

    per_minute: int = _limit(6, "messages of one person in a minute; 0 is no limit")
    per_hour: int = _limit(60, "messages of one person in an hour; 0 is no limit")
    tokens_in: int = _limit(2000, "tokens of the longest prompt; 0 is what the model can take")
    tokens_out: int = _limit(512, "tokens of the longest reply", least=1)


@dataclass(frozen=True, slots=True)
class Price:
    """Prices in integer nano-units of the currency per token."""

    id: int
    in_nano: int
    out_nano: int
    share_bps: int  # basis points that go to the partner
    train_nano: int = 0  # of a trained token, of which the partner gets no share


@dataclass(frozen=True, slots=True)
class Channel:
    """One offer of the model: its instructions, limits and sampling."""

    id: int
    name: str
    title: str
    partner: str
    adapter: str  # the name whose champion answers
    instructions: str = ""
    language: str = ""
    questions: tuple[str, ...] = ()  # suggested at the start
    limits: Limits = field(default_factory=Limits)
    sampling: Sampling = field(default_factory=Sampling)
    settings: Mapping[str, object] = field(default_factory=dict, compare=False)  # those without a field here, by name
    archived: bool = False
    weight: float = 1.0  # its partner's share of the engine


Json = str | int | float | bool | None | list["Json"] | Mapping[str, "Json"]


class Grant(IntEnum):
    """What a person may do in a channel; each includes the ones before."""

    ANYONE = 0
    OPERATOR = 1  # of this channel
    OWNER = 2  # operator of every channel


@dataclass(frozen=True, slots=True)
class Caller:
    """Who gave a command, and where. `user` is a keyed hash; `language` is the person's, the channel's or "en"."""

    user: str
    address: Address
    channel: Channel
    language: str
    inbox_id: int
    conversation_id: int
    attachments: tuple[Attachment, ...] = ()
    answers: str = ""  # the receipt of our message that they replied to
    public: bool = False  # others can read the answer
    moderates: bool = False  # a moderator of the place: may stop anyone's reply there
    grant: Grant = Grant.ANYONE  # in `channel`


class Effect(StrEnum):
    """What follows a command once its transaction is committed."""

    ANSWER_AGAIN = "answer again"  # instead of the body: answer the conversation's last question again
    ANSWER_UNANSWERED = "answer unanswered"  # instead of the body: answer the question that this row has taken over
    COMPARE_BLIND = "compare blind"  # instead of the body: both answers of the comparison that this command began
    WAKE_TRAINING = "wake training"  # the job supervisor reads the job table
    ERASE_FILES = "erase files"  # files of erased rows are removed and the WAL is truncated
    CHOOSE = "choose"  # the buttons of the pressed message are replaced by the choice


@dataclass(frozen=True, slots=True)
class StopReply:
    """After the commit: stop the running reply in the caller's conversation if it is for `user` ("": anyone)."""

    user: str


@dataclass(frozen=True, slots=True)
class ForgetMemory:
    """After the commit: the engine drops its prefix cache of the conversation ("": of the whole channel)."""

    channel: str
    conversation: str = ""


After = Effect | StopReply | ForgetMemory


@dataclass(frozen=True, slots=True)
class Outcome:
    """The answer of a command, and its effects once the transaction is committed."""

    body: Body
    after: tuple[After, ...] = ()
