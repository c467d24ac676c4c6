"""What a fake Slack holds: workspaces, messages, calls. Knows no rule."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

SIGNING, APP_TOKEN, CLIENT, CLIENT_SECRET = "s1gning-s3cret", "xapp-1-A1-test", "11.22", "cl13nt-s3cret"
STREAM_S = 300.0


@dataclass
class Workspace:
    """`enterprise`: the organisation that installed for all of its own; `belongs_to`: of one that did for itself."""

    team: str
    token: str
    bot: str
    name: str = ""
    enterprise: str = ""
    belongs_to: str = ""
    alive: bool = True
    refresh: str = ""
    installer: str = ""


@dataclass
class Held:
    """One message as Slack holds it."""

    team: str
    channel: str
    ts: str
    thread: str
    text: str = ""
    blocks: list[dict[str, Any]] = field(default_factory=list)
    streaming: bool = False
    streamed: bool = False
    started: float = 0.0
    files: list[str] = field(default_factory=list)
    history: list[str] = field(default_factory=list)

    @property
    def said(self) -> str:
        """What a person reads as the message itself."""
        marked = "".join(block["text"] for block in self.blocks if block["type"] == "markdown")
        plain = "".join(block["text"]["text"] for block in self.blocks if block["type"] == "section")
        return marked or plain or self.text

    @property
    def buttons(self) -> list[dict[str, Any]]:
        found = [
            (block, one)
            for block in self.blocks
            if block["type"] != "context" and "elements" in block
            for one in block["elements"]
        ]
        return [{**one, "block_id": block.get("block_id", "")} for block, one in found]

    @property
    def labels(self) -> list[str]:
        return [one["text"]["text"] for one in self.buttons if one["type"] == "button"]

    def button(self, label: str) -> dict[str, Any]:
        return next(one for one in self.buttons if one["type"] == "button" and one["text"]["text"] == label)


@dataclass
class Call:
    method: str
    token: str
    body: dict[str, Any]
