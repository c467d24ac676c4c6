"""Values that cross folders: frozen dataclasses and enums. Standard library only; no behaviour, no I/O."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from pathlib import Path
from typing import NewType

Handle = NewType("Handle", str)
"""The bot's own JSON, by which one part of a delivery can be written again."""

Receipt = NewType("Receipt", str)
"""The bot's own JSON, proof that a part is held by the platform in its final form."""


class Lane(StrEnum):
    """CONTROL is handled at once and idempotent; TURN is handled in order per conversation."""

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
    """One turn as the chat template sees it."""

    role: Role
    text: str


@dataclass(frozen=True, slots=True)
class Address:
    """Where a reply goes. `place` is a chat or a Slack channel; `conversation` is one thread of turns in it."""

    platform: str
    account: str
    place: str
    conversation: str
    reply_to: str = ""


@dataclass(frozen=True, slots=True)
class Attachment:
    """A file that a person sent, by the platform's id for it; on the terminal the id is a local path."""

    file_id: str
    name: str
    size_bytes: int = 0
    media_type: str = ""


@dataclass(frozen=True, slots=True)
class Incoming:
    """One platform update, read. `update_key` and `message_key` are unique per account: a repeat is a no-op."""

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
    answers: str = ""  # the receipt of our message that this one is a reply to
    public: bool = False  # others read what is answered
    moderates: bool = False  # the bot knows that they may stop what others asked for here


@dataclass(frozen=True, slots=True)
class Button:
    """A choice below a reply; pressing it comes back as Incoming(kind=PRESS, action=..., value=...)."""

    text: str
    action: str
    value: str = ""


@dataclass(frozen=True, slots=True)
class Body:
    """What one reply says: Markdown text, and what may hang below it.

    `note` is a small remark on the reply itself (tokens and seconds); a bot may leave it out.
    """

    text: str
    buttons: tuple[Button, ...] = ()
    files: tuple[Path, ...] = ()
    note: str = ""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How one reply is drawn. temperature 0 is greedy; top_k 0, top_p 1, min_p 0 and repetition_penalty 1 are off.

    Random numbers depend on `seed` and the position of the token alone.
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
    """Tokens of one generation. `reused_tokens` are those of the prompt that were not computed again."""

    prompt_tokens: int
    completion_tokens: int
    reused_tokens: int = 0


@dataclass(frozen=True, slots=True)
class AdapterRef:
    """An adapter version as machines know it, and the label (`name@version`) by which people do."""

    sha256: str
    folder: Path
    label: str = ""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one user of a channel may use. 0 means no limit."""

    per_minute: int = 6
    per_hour: int = 60
    tokens_in: int = 2000
    tokens_out: int = 512


@dataclass(frozen=True, slots=True)
class Price:
    """Integer nano-units of the currency per token; `share_bps` of it, in basis points, is the partner's.

    A token that is trained has its own price, of which no partner has a share.
    """

    id: int
    in_nano: int
    out_nano: int
    share_bps: int
    train_nano: int = 0


@dataclass(frozen=True, slots=True)
class Channel:
    """One place where the model is offered under one agreement.

    `adapter` is the adapter name whose champion the channel answers from.
    """

    id: int
    name: str
    title: str
    partner: str
    adapter: str
    instructions: str = ""
    language: str = ""
    questions: tuple[str, ...] = ()  # to begin with
    limits: Limits = field(default_factory=Limits)
    sampling: Sampling = field(default_factory=Sampling)
    archived: bool = False
    weight: float = 1.0  # its partner's, beside other partners


Json = str | int | float | bool | None | list["Json"] | Mapping[str, "Json"]


class Grant(IntEnum):
    """What a person may do in a channel; each holds what stands before it."""

    ANYONE = 0
    OPERATOR = 1  # of this channel
    OWNER = 2  # operator of every channel


@dataclass(frozen=True, slots=True)
class Caller:
    """Who gave a command, and where. `user` is the keyed hash; `language` is resolved: person, channel, then "en"."""

    user: str
    address: Address
    channel: Channel
    language: str
    inbox_id: int
    conversation_id: int
    attachments: tuple[Attachment, ...] = ()
    answers: str = ""  # the receipt of our message that they replied to
    public: bool = False  # others read what is answered
    moderates: bool = False  # the bot knows that they may stop what others asked for here
    grant: Grant = Grant.ANYONE  # in `channel`


@dataclass(frozen=True, slots=True)
class StopReply:
    """After the commit: stop what is being answered in the caller's conversation, if it is for `user` ("": anybody)."""

    user: str


@dataclass(frozen=True, slots=True)
class AnswerAgain:
    """Instead of the body: a new answer to the conversation's last question."""


@dataclass(frozen=True, slots=True)
class CompareBlind:
    """Instead of the body: both answers of the comparison that the caller's row has begun."""


@dataclass(frozen=True, slots=True)
class ForgetMemory:
    """After the commit: the engine drops what it keeps of the conversation ("" is all of the channel's)."""

    channel: str
    conversation: str = ""


@dataclass(frozen=True, slots=True)
class WakeTraining:
    """After the commit: the jobs' supervisor looks at the job table."""


@dataclass(frozen=True, slots=True)
class EraseFiles:
    """After the commit: privacy sweeps files whose rows are marked as erased, and folds the WAL."""


@dataclass(frozen=True, slots=True)
class Choose:
    """After the answer: where a button was pressed for this, the buttons beside it give way to what was chosen."""


After = StopReply | AnswerAgain | CompareBlind | ForgetMemory | WakeTraining | EraseFiles | Choose


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a command says, and what is to be done once its transaction is committed."""

    body: Body
    after: tuple[After, ...] = ()
