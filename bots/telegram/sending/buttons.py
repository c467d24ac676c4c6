"""Inline keyboards and their callback data of at most 64 bytes."""

import logging
from collections.abc import Iterable

from aiogram.types import InlineKeyboardButton, InlineKeyboardMarkup

from core.i18n.messages import say
from core.platform import VOTE_REASONS
from core.types import Button

log = logging.getLogger(__name__)
STOP, DONE = "s", "d"
_PREFIXES = {"command": "c:", "feedback": "f:", "say": "y:"}
_MAX_BYTES = 64
_ROW_UNITS = 30


def keyboard(buttons: Iterable[Button]) -> InlineKeyboardMarkup | None:
    """Short buttons share a row. A "say" button whose value exceeds 64 bytes is resolved by its label when pressed.

    Any other button whose value is too long is left out.
    """
    rows: list[list[InlineKeyboardButton]] = []
    width = 0
    for number, button in enumerate(buttons):
        data = _PREFIXES.get(button.action, "") + button.value
        if button.action == "say" and len(data.encode()) > _MAX_BYTES and button.value == button.text:
            data = f"y:#{number}"
        if button.action not in _PREFIXES or len(data.encode()) > _MAX_BYTES:
            log.warning("telegram.button_left_out", extra={"action": button.action, "bytes": len(data.encode())})
            continue
        made = InlineKeyboardButton(text=button.text, callback_data=data)
        if rows and width + len(button.text) <= _ROW_UNITS:
            rows[-1].append(made)
            width += len(button.text)
        else:
            rows.append([made])
            width = len(button.text)
    return InlineKeyboardMarkup(inline_keyboard=rows) if rows else None


def stop_keyboard(text: str) -> InlineKeyboardMarkup:
    return _one_column([(text, STOP)])


def reasons_keyboard(language: str, vote: str) -> InlineKeyboardMarkup:
    """The reasons for a thumb down. `vote` is the value of its button."""
    return _one_column([(say(language, f"feedback.reason_{one}"), f"f:{vote}:{one}") for one in VOTE_REASONS])


def chosen_keyboard(label: str) -> InlineKeyboardMarkup:
    """The chosen label instead of the buttons."""
    return _one_column([(f"✓ {label}", DONE)])


def _one_column(buttons: Iterable[tuple[str, str]]) -> InlineKeyboardMarkup:
    rows = [[InlineKeyboardButton(text=text, callback_data=data)] for text, data in buttons]
    return InlineKeyboardMarkup(inline_keyboard=rows)


def action_of(data: str) -> tuple[str, str] | None:
    """(action, value) of a press; None for an unknown button."""
    if data == STOP:
        return "stop", ""
    return next(((action, data[2:]) for action, prefix in _PREFIXES.items() if data.startswith(prefix)), None)
