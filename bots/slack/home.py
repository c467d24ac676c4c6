"""The App Home of a person: what the channel of this workspace is, and what they may do there. Pure.

A button runs the command that it names, and its answer comes as a DM: the same commands, checked as everywhere.
"""

from __future__ import annotations

import json
from typing import Any

from bots.slack import blocks
from core.commands import Grant
from core.texts import say
from core.types import Address, Button

LIMITS = ("per_minute", "per_hour", "tokens_in", "tokens_out")
_EVERYONE = ("/usage", "/privacy", "/help")
_OPERATORS = ("/usage chart", "/usage csv", "/channel show", "/adapter list", "/finetune list", "/operator list")


def view(place: str, user: str, grant: Grant, language: str) -> dict[str, Any]:
    """The view for `views.publish`. `place` is what the commands are about: the workspace's own channel."""
    at = Address("slack", "", place, f"@{user}")
    operator = grant >= Grant.OPERATOR
    commands = (*_OPERATORS, "/privacy", "/help") if operator else _EVERYONE
    labels = [Button(say(language, f"slack.home_{_key(command)}"), "command", command) for command in commands]
    if operator:
        labels.append(Button(say(language, "slack.limits_title"), blocks.LIMITS, ""))
    told = say(language, "slack.home_operator" if operator else "slack.home")
    return {"type": "home", "blocks": [{"type": "markdown", "text": told}, *blocks.rows(labels, at)]}


def limits_view(place: str, user: str, language: str) -> dict[str, Any]:
    """The modal that changes a channel's limits: what is left empty stays as it is."""

    def words(key: str) -> dict[str, str]:
        return {"type": "plain_text", "text": say(language, f"slack.{key}")}

    return {
        "type": "modal",
        "callback_id": blocks.LIMITS,
        "private_metadata": json.dumps({"place": place, "conversation": f"@{user}"}),
        "title": words("limits_title"),
        "submit": words("limits_submit"),
        "blocks": [
            {
                "type": "input",
                "block_id": name,
                "label": words(f"limits_{name}"),
                "optional": True,
                "element": {"type": "plain_text_input", "action_id": "number", "max_length": 9},
            }
            for name in LIMITS
        ],
    }


def _key(command: str) -> str:
    return command.strip("/").replace(" ", "_")
