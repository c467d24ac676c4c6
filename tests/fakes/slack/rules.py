"""What Slack refuses: blocks and texts that are too long, methods and keys that it does not know, rates. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

MARKDOWN, ALL_MARKDOWN, TEXT = 12_000, 13_200, 40_000
REQUIRED: Mapping[str, tuple[str, ...]] = {
    "auth.test": (),
    "apps.connections.open": (),
    "oauth.v2.access": ("client_id", "client_secret"),
    "chat.postMessage": ("channel",),
    "chat.update": ("channel", "ts"),
    "chat.startStream": ("channel", "thread_ts"),
    "chat.appendStream": ("channel", "ts"),
    "chat.stopStream": ("channel", "ts"),
    "agents.sessions.setStatus": ("channel_id", "status"),
    "assistant.threads.setStatus": ("channel_id", "thread_ts", "status"),
    "assistant.threads.setSuggestedPrompts": ("channel_id", "prompts"),
    "views.publish": ("user_id", "view"),
    "views.open": ("trigger_id", "view"),
    "files.info": ("file",),
    "files.getUploadURLExternal": ("filename", "length"),
    "files.completeUploadExternal": ("files",),
}
PER_MINUTE: Mapping[str, int] = {
    "chat.startStream": 20,
    "chat.stopStream": 20,
    "chat.appendStream": 100,
    "chat.update": 50,
    "chat.postMessage": 60,
}


def wrong_blocks(blocks: object) -> str:
    """The error that Slack answers, or ""."""
    if not isinstance(blocks, list) or len(blocks) > 50:
        return "invalid_blocks"
    if sum(len(block.get("text", "")) for block in blocks if block.get("type") == "markdown") > ALL_MARKDOWN:
        return "msg_blocks_too_long"
    ids = [block["block_id"] for block in blocks if "block_id" in block]
    if len(ids) != len(set(ids)) or any(len(one) > 255 for one in ids):
        return "invalid_blocks"
    return "" if all(_fits(block) for block in blocks) else "invalid_blocks"


def _fits(block: Mapping[str, Any]) -> bool:
    kind = block.get("type")
    if kind == "markdown":
        return 0 < len(block["text"]) <= MARKDOWN
    if kind == "context":
        return 1 <= len(block["elements"]) <= 10 and all(0 < len(one["text"]) <= 3000 for one in block["elements"])
    if kind == "actions":
        elements = block["elements"]
        ids = [one["action_id"] for one in elements]
        return 1 <= len(elements) <= 25 and len(set(ids)) == len(ids) and all(_button(one) for one in elements)
    if kind == "context_actions":
        return 1 <= len(block["elements"]) <= 5 and all(_thumbs(one) for one in block["elements"])
    return False


def _button(one: Mapping[str, Any]) -> bool:
    return (
        one["type"] == "button"
        and one["text"]["type"] == "plain_text"
        and 0 < len(one["text"]["text"]) <= 75
        and len(one["action_id"]) <= 255
        and 0 < len(one.get("value", "-")) <= 2000
    )


def _thumbs(one: Mapping[str, Any]) -> bool:
    buttons = [one["positive_button"], one["negative_button"]]
    return one["type"] == "feedback_buttons" and all(
        0 < len(button["text"]["text"]) <= 75 and 0 < len(button["value"]) <= 2000 for button in buttons
    )
