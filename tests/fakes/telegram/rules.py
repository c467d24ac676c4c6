"""What Telegram takes and what it refuses: requests parsed by aiogram's own method models, texts, entities, buttons."""

from __future__ import annotations

import json
from typing import Any

import aiogram.methods
from aiogram.methods import TelegramMethod
from aiohttp import web
from pydantic import ValidationError

from tests.fakes.telegram.people import units

KINDS = set(
    "mention hashtag cashtag bot_command url email phone_number bold italic underline strikethrough spoiler blockquote"
    " expandable_blockquote code pre text_link text_mention custom_emoji".split()
)
METHODS = {
    name[0].lower() + name[1:]: made
    for name in aiogram.methods.__all__
    if isinstance(made := getattr(aiogram.methods, name), type) and issubclass(made, TelegramMethod)
}


class Refused(Exception):
    """What the Bot API answers instead of a result."""

    def __init__(self, code: int, description: str, **parameters: int) -> None:
        super().__init__(description)
        self.code, self.description, self.parameters = code, description, parameters


async def read(request: web.Request, name: str) -> tuple[TelegramMethod[Any], dict[str, bytes]]:
    """The method that was called, and the files that came with it. Raises Refused."""
    kind = METHODS.get(name)
    if kind is None:
        raise Refused(404, "Not Found")
    given: dict[str, Any] = {}
    files: dict[str, bytes] = {}
    for key, value in (await request.post()).items():
        if isinstance(value, web.FileField):
            files[key] = value.file.read()
        elif key in kind.model_fields:
            given[key] = _value(str(value), str(kind.model_fields[key].annotation))
        else:
            raise Refused(400, f"Bad Request: unknown parameter {key}")
    try:
        return kind.model_validate(given), files
    except ValidationError as error:
        raise Refused(400, f"Bad Request: {error}") from None


def _value(text: str, annotation: str) -> Any:
    """As JSON, unless it can only be text."""
    if annotation in ("<class 'str'>", "str | None", "typing.Optional[str]", "ChatIdUnion", "int | str"):
        return int(text) if annotation in ("ChatIdUnion", "int | str") and text.lstrip("-").isdigit() else text
    try:
        return json.loads(text)
    except ValueError:
        return text


def check_text(text: str | None, entities: list[Any] | None, *, empty: bool = False, limit: int = 4096) -> None:
    """Raises Refused as Telegram does."""
    text = text or ""
    if not text.strip() and not empty:
        raise Refused(400, "Bad Request: message text is empty")
    if units(text) > limit:
        raise Refused(400, "Bad Request: message is too long")
    if any(0xD800 <= ord(c) <= 0xDFFF for c in text):
        raise Refused(400, "Bad Request: strings must be encoded in UTF-8")
    raw = text.encode("utf-16-le")
    taken: list[tuple[int, int, str]] = []
    for one in entities or []:
        start, end = one.offset, one.offset + one.length
        if one.type not in KINDS or one.length <= 0 or start < 0 or end * 2 > len(raw):
            raise Refused(
                400, f"Bad Request: can't parse entities: {one.type} at {start} ends at {end} of {len(raw) // 2}"
            )
        for edge in (start, end):
            if edge * 2 < len(raw) and 0xDC00 <= int.from_bytes(raw[edge * 2 : edge * 2 + 2], "little") <= 0xDFFF:
                raise Refused(400, f"Bad Request: can't parse entities: {one.type} cuts a character at {edge}")
        if one.type == "text_link" and not one.url:
            raise Refused(400, "Bad Request: can't parse entities: text_link has no URL")
        for begin, stop, other in taken:
            if begin < start < stop < end or start < begin < end < stop:
                raise Refused(400, f"Bad Request: can't parse entities: {one.type} crosses {other}")
            overlap = start < stop and begin < end
            if overlap and {one.type, other} & {"pre", "code"} and "blockquote" not in (one.type, other):
                raise Refused(400, f"Bad Request: can't parse entities: {one.type} within {other}")
        taken.append((start, end, one.type))
    if len(entities or []) > 100:
        raise Refused(400, "Bad Request: can't parse entities: too many")


def check_buttons(markup: Any) -> None:
    """Raises Refused for a button that Telegram does not take."""
    for row in markup.inline_keyboard if markup is not None else []:
        for button in row:
            data = button.callback_data
            if not button.text or data is None or not 1 <= len(data.encode()) <= 64:
                raise Refused(400, "Bad Request: BUTTON_DATA_INVALID")
