"""The sink of one account: drafts or edits while a reply is generated, then one final text.

A handle names a chat with a message id, or with a draft id while there is no message yet. `finish` turns a draft into a
message: it sends the first line, returns the message's handle to be committed (`Reopened`), and edits the message to
the full text when it is called again. A kill between any two calls leaves at most a first line with "…".
"""

import logging
import re
import secrets
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from typing import Any

from aiogram.exceptions import TelegramAPIError, TelegramBadRequest, TelegramMigrateToChat, TelegramNotFound
from aiogram.methods import (
    EditMessageMedia,
    EditMessageReplyMarkup,
    EditMessageText,
    GetMe,
    SendMessage,
    TelegramMethod,
)
from aiogram.types import FSInputFile, InputMediaDocument, InputMediaPhoto, InputRichMessage, ReplyParameters
from cachetools import LRUCache

from bots.shared.first_messages import FirstMessages
from bots.telegram.addresses import receipt, spot
from bots.telegram.sending import text as texts
from bots.telegram.sending.api import TelegramApi, TelegramProblem, classify
from bots.telegram.sending.buttons import chosen_keyboard, keyboard
from bots.telegram.sending.drafts import Draft, Drafts, TelegramHandle
from core.errors import AppError
from core.platform import Reopened
from core.types import Address, Attachment, Body, Handle, Receipt

log = logging.getLogger(__name__)
WAITING = "…"
_REMEMBERED = 2_000
_PICTURES = (".png", ".jpg", ".jpeg")
_RICH = re.compile(r"^\s*\|?[ :]*-{3,}[-| :]*\|[-| :]*$|\$\$|\\\(|\\\[", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class TelegramPart(Body):
    """One rendered message of a delivery. `rich` is the Markdown of a rich message."""

    marks: tuple[texts.Mark, ...] = ()
    rich: str = ""


class TelegramSink(FirstMessages):
    """`drafts.keep` must run for anything to be shown before the final text."""

    def __init__(self, api: TelegramApi, *, transport: str = "draft", rich: bool = False) -> None:
        super().__init__()
        self._api, self._transport, self._rich = api, transport, rich
        self.drafts = Drafts(api)
        self._moved: LRUCache[Handle, TelegramHandle] = LRUCache(_REMEMBERED)  # handle -> its present message
        self._tried: LRUCache[Handle, bool] = LRUCache(_REMEMBERED)  # sent directly, outcome unknown

    # --- the contract ---

    def split(self, body: Body) -> tuple[Body, ...]:
        """Render and cut; the last text has the buttons, each file is a message of its own."""
        whole = texts.render(body.text)
        pieces = texts.split(whole)
        if self._rich and len(pieces) == 1 and _RICH.search(body.text):
            parts = [TelegramPart(whole.text, marks=whole.marks, rich=body.text)]
        else:
            parts = [TelegramPart(piece.text, marks=piece.marks) for piece in pieces]
        parts[-1] = replace(parts[-1], buttons=body.buttons)
        return (*parts, *(TelegramPart("", files=(path,)) for path in body.files))

    async def open(self, to: Address) -> Handle:
        at = spot(to)
        where = TelegramHandle(at.chat, 0, 0, at.topic, at.action_topic, at.reply_to, bool(to.reply_to))
        if where.streamed and self._transport == "off":
            handle = where.handle()
        elif where.streamed and at.private and self._transport != "edit":
            handle = replace(where, draft=secrets.randbelow(2**31 - 1) + 1).handle()
        else:
            handle = (await self._post(where, texts.RenderedText(WAITING))).handle()
        self.drafts.look(handle)
        return handle

    async def show(self, handle: Handle, text: str) -> None:
        self.drafts.show(handle, text)

    async def finish(self, handle: Handle, body: Body) -> Receipt | Reopened:
        part = body if isinstance(body, TelegramPart) else self.split(body)[0]
        assert isinstance(part, TelegramPart)
        draft = await self.drafts.end(handle)
        where = self._moved.get(handle) or TelegramHandle.read(handle)
        if where.message:
            where = await self._write(handle, where, part)
        elif self._transport == "draft_direct":
            where = await self._send_directly(handle, where, part, draft)
        else:
            made = replace(await self._post(where, texts.first_line(part.text)), draft=0)
            self._moved[handle] = made
            return Reopened(made.handle())
        return receipt(where.chat, where.message)

    async def recover(self, handle: Handle) -> Handle:
        """The message that a draft of this run became, else the same handle; drafts are shown again."""
        where = TelegramHandle.read(handle)
        if not where.message and handle in self._moved:
            return self._moved[handle].handle()
        self.drafts.look(handle, recovered=True)
        return handle

    async def fail(self, handle: Handle, body: Body) -> Reopened | None:
        ended = await self.finish(handle, self.split(body)[0])
        return ended if isinstance(ended, Reopened) else None

    async def choose(self, to: Address, label: str) -> None:
        """`to` replies to the message whose button was pressed."""
        at = spot(to)
        if at.reply_to is None:
            return
        edit = EditMessageReplyMarkup(chat_id=at.chat, message_id=at.reply_to, reply_markup=chosen_keyboard(label))
        try:
            await self._api.write(at.chat, edit)
        except (TelegramAPIError, AppError) as error:
            log.info("telegram.not_chosen", extra={"error": type(error).__name__})

    def fetch(self, attachment: Attachment) -> AsyncIterator[bytes]:
        """Stream a file that a person sent. Raises BadInput."""
        return self._api.download(attachment.file_id, attachment.name, attachment.size_bytes)

    # --- final texts ---

    async def _write(self, handle: Handle, where: TelegramHandle, part: TelegramPart) -> TelegramHandle:
        """Edit the message to its final form; one that was deleted, or whose group has moved, is replaced."""
        try:
            await self._put(where, part)
        except TelegramMigrateToChat as error:
            where = replace(where, chat=error.migrate_to_chat_id, topic=None, reply_to=None)
        except TelegramBadRequest as error:
            if classify(error) is not TelegramProblem.GONE:
                raise
        else:
            return where
        where = await self._post(where, texts.first_line(part.text))
        self._moved[handle] = where
        await self._put(where, part)
        return where

    async def _put(self, where: TelegramHandle, part: TelegramPart) -> None:
        """Edit in the best form that Telegram accepts."""
        *better, plainest = _forms(where, part)
        for form in (*better, plainest):
            try:
                await self._api.write(where.chat, form)
                return
            except (TelegramBadRequest, TelegramNotFound) as error:
                meaning = classify(error)
                if meaning is TelegramProblem.SAME:
                    return
                if meaning is TelegramProblem.GONE or form is plainest:
                    raise
                log.warning("telegram.plainer", extra={"method": form.__api_method__, "error": type(error).__name__})

    async def _post(self, where: TelegramHandle, first: texts.RenderedText) -> TelegramHandle:
        """Send the first small message; to the chat itself where the topic is gone."""
        reply = ReplyParameters(message_id=where.reply_to, allow_sending_without_reply=True) if where.reply_to else None
        method = SendMessage(
            chat_id=where.chat,
            message_thread_id=where.topic,
            text=first.text or WAITING,
            entities=first.entities() or None,
            reply_parameters=None if where.chat > 0 else reply,
        )
        place, chat = (where.chat, where.topic, where.reply_to), where.chat
        try:
            sent = await self.first(
                place, lambda: self._api.write(chat, GetMe()), lambda: self._api.write(chat, method, repeatable=False)
            )
        except TelegramMigrateToChat as error:
            return await self._post(replace(where, chat=error.migrate_to_chat_id, topic=None, reply_to=None), first)
        except TelegramBadRequest as error:
            if classify(error) is not TelegramProblem.THREAD or where.topic is None:
                raise
            return await self._post(replace(where, topic=None, action_topic=None), first)
        return replace(where, message=sent.message_id)

    async def _send_directly(
        self, handle: Handle, where: TelegramHandle, part: TelegramPart, draft: Draft | None
    ) -> TelegramHandle:
        """Send the final text in one request, which is never repeated: with a lost response it stays unconfirmed."""
        if handle in self._tried or (draft is not None and draft.recovered and not draft.text):
            raise AppError(detail="whether the answer was sent is not known")
        buttons, shown = keyboard(part.buttons), texts.RenderedText(part.text, part.marks)
        for entities in (shown.entities() or None, None):
            method = SendMessage(
                chat_id=where.chat,
                message_thread_id=where.topic,
                text=part.text,
                entities=entities,
                reply_markup=buttons,
            )
            try:
                self._tried[handle] = True
                sent = await self._api.write(where.chat, method, repeatable=False)
                return replace(where, message=sent.message_id)
            except TelegramBadRequest as error:
                self._tried.pop(handle, None)
                if classify(error) is not TelegramProblem.MARKUP or entities is None:
                    raise
        raise AppError(detail="unreachable")


def _forms(where: TelegramHandle, part: TelegramPart) -> list[TelegramMethod[Any]]:
    """The final edit, best first: file, rich message, text with entities, plain text."""
    at: dict[str, Any] = {"chat_id": where.chat, "message_id": where.message}
    buttons = keyboard(part.buttons)
    if part.files:
        path = part.files[0]
        kind = InputMediaPhoto if path.suffix.lower() in _PICTURES else InputMediaDocument
        media = kind(media=FSInputFile(path))
        return [EditMessageMedia(**at, media=media, reply_markup=buttons)]
    forms: list[TelegramMethod[Any]] = []
    if part.rich:
        rich = InputRichMessage(markdown=part.rich)
        forms.append(EditMessageText(**at, rich_message=rich, reply_markup=buttons))
    if part.marks:
        entities = texts.RenderedText(part.text, part.marks).entities()
        forms.append(EditMessageText(**at, text=part.text, entities=entities, reply_markup=buttons))
    forms.append(EditMessageText(**at, text=part.text, reply_markup=buttons))
    return forms
