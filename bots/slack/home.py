"""The App Home of a person: what the channel of this workspace is, and what they may do there. Pure.

A button runs the command that it names, and its answer comes as a DM: the same commands, checked as everywhere.
"""

from __future__ import annotations

from typing import Any

from bots.slack import blocks
from core.commands import Grant
from core.texts import say
from core.types import Address, Button

_EVERYONE = ("/usage", "/privacy", "/help")
_OPERATORS = ("/usage chart", "/usage csv", "/channel show", "/adapter list", "/finetune list", "/operator list")


def view(place: str, user: str, grant: Grant, language: str) -> dict[str, Any]:
    """The view for `views.publish`. `place` is what the commands are about: the workspace's own channel."""
    at = Address("slack", "", place, f"@{user}")
    operator = grant >= Grant.OPERATOR
    commands = (*_OPERATORS, "/privacy", "/help") if operator else _EVERYONE
    labels = [Button(say(language, f"slack.home_{_key(command)}"), "command", command) for command in commands]
    told = say(language, "slack.home_operator" if operator else "slack.home")
    return {"type": "home", "blocks": [{"type": "markdown", "text": told}, *blocks.rows(labels, at)]}


def _key(command: str) -> str:
    return command.strip("/").replace(" ", "_")
