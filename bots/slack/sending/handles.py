"""State of the messages that are being written: handles, live messages, recipients."""

from __future__ import annotations

import asyncio
import json
from dataclasses import asdict, dataclass, field
from typing import Any

from bots.slack.addresses import PLATFORM
from bots.slack.pages.blocks import Block
from core.types import Address, Body, Handle

REMEMBERED = 2_000


@dataclass(frozen=True, slots=True)
class SlackHandle:
    """A parsed handle."""

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
        """Whether the reply is in a DM because Slack refused its place."""
        return self.conversation[:1] != "@" and self.channel != self.place

    @property
    def at(self) -> dict[str, Any]:
        return {"channel": self.channel, "ts": self.ts}

    @property
    def to(self) -> Address:
        return Address(PLATFORM, "", self.place, self.conversation, self.reply_to)


@dataclass(frozen=True, slots=True)
class SlackPart(Body):
    """One message of a delivery. `shown` is its text with cut code blocks and tables completed."""

    shown: str = ""


@dataclass(slots=True)
class LiveMessage:
    """A message that is being written in this run.

    `sent` is the text in the stream, `changed_at` the time of the last change. `broken`: nothing more can be appended;
    `ended`: the stream has ended in Slack. `status` is the task that shows "working": the one that ends it comes after.
    """

    sent: str = ""
    broken: bool = False
    ended: bool = False
    changed_at: float = 0.0
    below: list[Block] = field(default_factory=list)  # the stop button of a message that is edited
    busy: asyncio.Lock = field(default_factory=asyncio.Lock)
    status: asyncio.Task[None] | None = None


@dataclass(frozen=True, slots=True)
class Recipient:
    """The person of a reply; Slack requires it for a stream in a channel."""

    team: str
    user: str
    language: str = ""
