"""The blocks of a message: Markdown, note, buttons and feedback.

A block id carries place and conversation, so that a press finds them from any message.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from bots.slack.pages.text import harmless
from core.types import Address, Body, Button

log = logging.getLogger(__name__)
Block = dict[str, Any]
_MAX_LABEL, _MAX_VALUE, _MAX_ID, _MAX_SECTION, _ROW = 75, 2000, 255, 3000, 5
STOP = "stop"
ACTIONS = ("command", "feedback", "say", STOP)


def message(body: Body, to: Address) -> list[Block]:
    """All blocks of a message."""
    text = [{"type": "markdown", "text": harmless(body.text)}] if body.text.strip() else []
    return [*text, *below(body, to)]


def forms(body: Body, to: Address) -> list[list[Block]]:
    """The message in several forms, best first: Markdown; plain text; plain text without buttons and note."""
    text, whole = harmless(body.text), message(body, to)
    if not text.strip():
        return [whole]
    pieces = [text[start : start + _MAX_SECTION] for start in range(0, len(text), _MAX_SECTION)]
    plain = [{"type": "section", "text": {"type": "plain_text", "text": piece}} for piece in pieces]
    return [whole, [*plain, *below(body, to)], plain]


def below(body: Body, to: Address) -> list[Block]:
    """The note, the feedback buttons and the other buttons."""
    blocks: list[Block] = []
    if body.note:
        blocks.append({"type": "context", "elements": [{"type": "plain_text", "text": body.note[:2000]}]})
    thumbs = [button for button in body.buttons if button.action == "feedback"]
    if len(thumbs) == 2:
        blocks.append(_feedback(thumbs))
    blocks += rows([button for button in body.buttons if button.action in ("command", "say")], to)
    return blocks


def chosen(shown: Sequence[Block], label: str) -> list[Block]:
    """The message with the chosen label instead of its buttons."""
    text = {"type": "context", "elements": [{"type": "plain_text", "text": f"✓ {label[:_MAX_LABEL]}"}]}
    return [*(block for block in shown if block.get("type") != "actions"), text]


def stop_row(label: str, to: Address) -> list[Block]:
    return rows([Button(label, STOP)], to)


def where(block_id: str) -> tuple[str, str]:
    """(place, conversation) from a block id, or ("", "") for a foreign one."""
    parts = block_id.split("|")
    return (parts[2], parts[3]) if len(parts) == 4 and parts[0] == "at" else ("", "")


def rows(buttons: Sequence[Button], to: Address, *, first: int = 0) -> list[Block]:
    """Rows of five buttons; a button whose value is too long for Slack is left out.

    `first` makes block ids unique when a message or view has several calls.
    """
    fit = [button for button in buttons if len(button.value) <= _MAX_VALUE]
    for _ in range(len(buttons) - len(fit)):
        log.warning("slack.button_left_out")
    cut = [fit[start : start + _ROW] for start in range(0, len(fit), _ROW)]
    return [
        {
            "type": "actions",
            "block_id": f"at|{first}.{number}|{to.place}|{to.conversation}"[:_MAX_ID],
            "elements": [
                {
                    "type": "button",
                    "action_id": f"{button.action}:{place}",
                    "text": {"type": "plain_text", "text": button.text[:_MAX_LABEL], "emoji": True},
                    **({"value": button.value} if button.value else {}),
                }
                for place, button in enumerate(row)
            ],
        }
        for number, row in enumerate(cut)
    ]


def _feedback(thumbs: Sequence[Button]) -> Block:
    """Feedback buttons. The final colon of a thumb down means that no reason follows (core.chat.feedback)."""
    ends = [thumbs[0], replace(thumbs[1], value=f"{thumbs[1].value}:")]
    good, bad = ({"text": {"type": "plain_text", "text": one.text}, "value": one.value} for one in ends)
    element = {"type": "feedback_buttons", "action_id": "feedback:0", "positive_button": good, "negative_button": bad}
    return {"type": "context_actions", "elements": [element]}
