"""What Slack refuses: blocks that are too long or not for that place, methods and keys that it does not know, rates.

Pure. Which block and element stands where: docs.slack.dev/reference/block-kit ("Available in surfaces").
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
    "users.info": ("user",),
    "files.info": ("file",),
    "files.getUploadURLExternal": ("filename", "length"),
    "files.completeUploadExternal": ("files",),
}
BY_FORM = (  # these do not understand JSON
    "files.completeUploadExternal",
    "files.getUploadURLExternal",
    "files.info",
    "oauth.v2.access",
    "users.info",
)
PER_MINUTE: Mapping[str, int] = {
    "chat.startStream": 20,
    "chat.stopStream": 20,
    "chat.appendStream": 100,
    "chat.update": 50,
    "chat.postMessage": 60,
}
MESSAGE = ("markdown", "section", "divider", "context", "actions", "context_actions", "image", "data_visualization")
HOME = ("header", "section", "divider", "context", "actions", "image", "data_visualization")
MODAL = ("header", "section", "divider", "context", "actions", "image", "input")


def wrong_blocks(blocks: object, surface: Sequence[str] = MESSAGE, most: int = 50) -> str:
    """The error that Slack answers, or ""."""
    if not isinstance(blocks, list) or len(blocks) > most:
        return "invalid_blocks"
    if sum(len(block.get("text", "")) for block in blocks if block.get("type") == "markdown") > ALL_MARKDOWN:
        return "msg_blocks_too_long"
    ids = [block["block_id"] for block in blocks if "block_id" in block]
    if len(ids) != len(set(ids)) or any(len(one) > 255 for one in ids):
        return "invalid_blocks"
    return (
        ""
        if all(block.get("type") in surface and _FITS[block["type"]](block) for block in blocks)
        else "invalid_blocks"
    )


def wrong_view(view: Mapping[str, Any], *, draws: bool = True) -> str:
    """The error that Slack answers to a view, or "". `draws`: whether this Slack knows charts."""
    if any(block.get("type") == "data_visualization" for block in view["blocks"]) and not draws:
        return "invalid_arguments"
    if len(view.get("private_metadata", "")) > 3000 or len(view.get("callback_id", "")) > 255:
        return "invalid_arguments"
    if view["type"] == "home":
        return "invalid_arguments" if wrong_blocks(view["blocks"], HOME, 100) else ""
    titles = [view.get(key) for key in ("title", "submit", "close") if key in view]
    if "title" not in view or not all(_plain(one, 24) for one in titles):
        return "invalid_arguments"
    if any(block["type"] == "input" for block in view["blocks"]) and "submit" not in view:
        return "invalid_arguments"
    return "invalid_arguments" if wrong_blocks(view["blocks"], MODAL, 100) else ""


def _plain(text: object, most: int) -> bool:
    return isinstance(text, dict) and text["type"] == "plain_text" and 0 < len(text["text"]) <= most


def _text(text: object, most: int) -> bool:
    return isinstance(text, dict) and text["type"] in ("plain_text", "mrkdwn") and 0 < len(text["text"]) <= most


def _section(block: Mapping[str, Any]) -> bool:
    fields = block.get("fields", [])
    if "text" not in block and not fields:
        return False
    return (
        ("text" not in block or _text(block["text"], 3000))
        and len(fields) <= 10
        and all(_text(one, 2000) for one in fields)
    )


def _actions(block: Mapping[str, Any]) -> bool:
    ids = [one["action_id"] for one in block["elements"]]
    return 1 <= len(ids) <= 25 and len(set(ids)) == len(ids) and all(_button(one) for one in block["elements"])


def _button(one: Mapping[str, Any]) -> bool:
    return (
        one["type"] == "button"
        and _plain(one["text"], 75)
        and len(one["action_id"]) <= 255
        and 0 < len(one.get("value", "-")) <= 2000
        and ("confirm" not in one or _confirm(one["confirm"]))
    )


def _confirm(one: Mapping[str, Any]) -> bool:
    return (
        _plain(one["title"], 100) and _text(one["text"], 300) and _plain(one["confirm"], 30) and _plain(one["deny"], 30)
    )


def _thumbs(one: Mapping[str, Any]) -> bool:
    buttons = [one["positive_button"], one["negative_button"]]
    return one["type"] == "feedback_buttons" and all(
        _plain(button["text"], 75) and 0 < len(button["value"]) <= 2000 for button in buttons
    )


def _chart(block: Mapping[str, Any]) -> bool:
    chart = block["chart"]
    days, series = chart["axis_config"]["categories"], chart["series"]
    return (
        0 < len(block["title"]) <= 50
        and chart["type"] == "bar"
        and 1 <= len(days) <= 20
        and len(set(days)) == len(days)
        and all(0 < len(day) <= 20 for day in days)
        and 1 <= len(series) <= 12
        and all(0 < len(one["name"]) <= 20 and [point["label"] for point in one["data"]] == days for one in series)
        and all(isinstance(point["value"], int | float) for one in series for point in one["data"])
    )


def _input(block: Mapping[str, Any]) -> bool:
    element = block["element"]
    known = _ELEMENTS.get(element["type"])
    return (
        known is not None
        and known(element)
        and _plain(block["label"], 2000)
        and ("hint" not in block or _plain(block["hint"], 2000))
        and 0 < len(block.get("block_id", "-")) <= 255
    )


_FITS: Mapping[str, Callable[[Mapping[str, Any]], bool]] = {
    "markdown": lambda block: 0 < len(block["text"]) <= MARKDOWN,
    "header": lambda block: _plain(block["text"], 150),
    "section": _section,
    "divider": lambda block: True,
    "context": lambda block: 1 <= len(block["elements"]) <= 10 and all(_text(one, 3000) for one in block["elements"]),
    "actions": _actions,
    "context_actions": lambda block: (
        1 <= len(block["elements"]) <= 5 and all(_thumbs(one) for one in block["elements"])
    ),
    "data_visualization": _chart,
    "input": _input,
}
_ELEMENTS: Mapping[str, Callable[[Mapping[str, Any]], bool]] = {
    "plain_text_input": lambda one: len(one.get("initial_value", "")) <= one.get("max_length", 3000) <= 3000,
    "number_input": lambda one: (
        isinstance(one["is_decimal_allowed"], bool) and isinstance(one.get("min_value", ""), str)
    ),
    "file_input": lambda one: 1 <= one.get("max_files", 10) <= 10,
    "external_select": lambda one: one.get("min_query_length", 3) >= 0,
}
