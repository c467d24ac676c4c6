"""What is known of the messages that are being written: where each is, what is seen of it, who asked. Makes no call."""

from __future__ import annotations

import asyncio
import json
from collections import OrderedDict
from dataclasses import asdict, dataclass, field
from typing import Any

from bots.slack.addresses import PLATFORM
from bots.slack.pages.blocks import Block
from core.types import Address, Body, Handle

REMEMBERED = 2_000


@dataclass(frozen=True, slots=True)
class SlackHandle:
    """A handle, read."""

    channel: str
    ts: str
    stream: bool
    place: str
    conversation: str
    reply_to: str = ""

    @classmethod
    def read(cls, handle: Handle) -> SlackHandle:
        return cls(**json.loads(handle))

    def handle(self) -> Handle:
        return Handle(json.dumps(asdict(self)))

    @property
    def elsewhere(self) -> bool:
        """Whether Slack did not let us write where the answer belongs."""
        return self.conversation[:1] != "@" and self.channel != self.place

    @property
    def to(self) -> Address:
        return Address(PLATFORM, "", self.place, self.conversation, self.reply_to)


@dataclass(frozen=True, slots=True)
class SlackPart(Body):
    """One message of a delivery. `shown`: its text as it is written, with the code block whole that is cut there."""

    shown: str = ""


@dataclass(slots=True)
class LiveMessage:
    """What is seen of a message that is being written in this run.

    `broken`: the stream takes no more; `ended`: Slack knows that. `status` tells Slack meanwhile that an answer is on
    its way: what takes that back must come after it.
    """

    sent: str = ""
    broken: bool = False
    ended: bool = False
    painted: float = 0.0
    below: list[Block] = field(default_factory=list)  # the stop button of a message that is edited
    busy: asyncio.Lock = field(default_factory=asyncio.Lock)
    status: asyncio.Task[None] | None = None


@dataclass(frozen=True, slots=True)
class Recipient:
    """Who is answered: Slack wants to know before it streams into a channel."""

    team: str
    user: str
    language: str = ""


def remember(known: OrderedDict[Any, Any], key: Any, value: Any) -> None:
    """Keep the newest: those before are of answers long settled."""
    known[key] = value
    known.move_to_end(key)
    if len(known) > REMEMBERED:
        known.popitem(last=False)
