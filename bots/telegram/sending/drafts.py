"""Replies while they are generated: drafts, edits, chat actions. Best effort, and nothing after `end`.

`show` keeps the newest text; `keep` sends it within the rate limits and renews drafts before they expire.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from dataclasses import asdict, dataclass, field
from typing import Any

from aiogram.exceptions import TelegramAPIError, TelegramRetryAfter
from aiogram.methods import EditMessageText, SendChatAction, SendMessageDraft, TelegramMethod

from bots.telegram.sending import text as texts
from bots.telegram.sending.api import TelegramApi, TelegramProblem, classify
from bots.telegram.sending.buttons import stop_keyboard
from core.types import Handle

log = logging.getLogger(__name__)
STOP_SIGN = "■"
TICK_S = 0.1
RENEW_S = 20.0  # a draft is shown for 30
TYPING_S = 4.5  # an action is shown for 5
_GRACE_S = 0.15  # what ends sooner needs no draft
_FORGET_S = 900.0


@dataclass(frozen=True, slots=True)
class TelegramHandle:
    """A parsed handle. Without a message it is a draft, or with draft 0 nothing visible."""

    chat: int
    message: int = 0
    draft: int = 0
    topic: int | None = None
    action_topic: int | None = None
    reply_to: int | None = None
    streamed: bool = False

    @classmethod
    def read(cls, handle: str) -> TelegramHandle:
        return cls(**json.loads(handle))

    def handle(self) -> Handle:
        return Handle(json.dumps({name: value for name, value in asdict(self).items() if value}))


@dataclass(slots=True)
class Draft:
    """A reply as it is shown while it is generated."""

    where: TelegramHandle
    begun: float
    text: str = ""
    drawn: texts.RenderedText | None = None
    drawn_from: str = ""
    drawn_at: float = 0.0
    typed_at: float = 0.0
    touched: float = 0.0
    recovered: bool = False
    ended: bool = False
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


class Drafts:
    """The replies that one account is writing."""

    def __init__(self, api: TelegramApi) -> None:
        self._api = api
        self._drafts: dict[Handle, Draft] = {}
        self._seen = asyncio.Event()

    def get(self, handle: Handle) -> Draft | None:
        return self._drafts.get(handle)

    def show(self, handle: Handle, text: str) -> None:
        draft = self.look(handle)
        draft.text, draft.touched = text, time.monotonic()

    async def keep(self) -> None:
        """Until cancelled, show replies that have grown, within the rate limits."""
        async with asyncio.TaskGroup() as tasks:
            while True:
                if not self._drafts:
                    self._seen.clear()
                    await self._seen.wait()
                now = time.monotonic()
                for handle, draft in list(self._drafts.items()):
                    if now - draft.touched > _FORGET_S:
                        del self._drafts[handle]
                    elif not draft.lock.locked():
                        if self._due(draft, now):
                            tasks.create_task(self._update(draft))
                        elif self._types(draft, now):
                            tasks.create_task(self._type(draft))
                await asyncio.sleep(TICK_S)

    def look(self, handle: Handle, *, recovered: bool = False) -> Draft:
        """The draft of a handle, new or known."""
        if handle in self._drafts:
            return self._drafts[handle]
        now = time.monotonic()
        made = self._drafts[handle] = Draft(TelegramHandle.read(handle), now, touched=now, recovered=recovered)
        self._seen.set()
        return made

    async def end(self, handle: Handle) -> Draft | None:
        """Stop showing: a late edit must not follow the final one."""
        draft = self._drafts.get(handle)
        if draft is not None:
            draft.ended = True
            async with draft.lock:
                self._drafts.pop(handle, None)
        return draft

    def _due(self, draft: Draft, now: float) -> bool:
        where = draft.where
        if where.message:
            new = bool(draft.text) and draft.text != draft.drawn_from
        elif where.draft:
            first = draft.drawn is None and now - draft.begun > _GRACE_S
            new = first or draft.text != draft.drawn_from or now - draft.drawn_at > RENEW_S
        else:
            return False
        return new and self._api.limiter.wait_s(where.chat, draft=bool(where.draft), show=True) <= 0

    async def _update(self, draft: Draft) -> None:
        async with draft.lock:
            if draft.ended:
                return
            source = draft.text
            shown = await _rendered(source) if source else texts.RenderedText("")
            method: TelegramMethod[Any]
            if draft.where.message:
                shown = texts.head(shown)
                if draft.drawn is not None and shown.text == draft.drawn.text:
                    draft.drawn_from = source
                    return
                method = _edit(draft.where, shown)
            else:
                shown = texts.tail(shown)
                method = _draft(draft.where, shown)
            if await self._shown(draft.where, method):
                draft.drawn, draft.drawn_from, draft.drawn_at = shown, source, time.monotonic()

    async def _shown(self, where: TelegramHandle, method: TelegramMethod[Any]) -> bool:
        """Whether the text counts as shown. Best effort: a refused text counts, so that it is not sent again."""
        try:
            return await self._api.show(where.chat, method, draft=bool(where.draft))
        except Exception as error:  # a failure here costs an intermediate text, never the reply
            if not (isinstance(error, TelegramAPIError) and classify(error) is TelegramProblem.SAME):
                _log_failure(method, error)
            return True

    def _types(self, draft: Draft, now: float) -> bool:
        where = draft.where
        wanted = where.streamed and now - draft.begun > _GRACE_S and not (where.draft and draft.drawn)
        return wanted and now - draft.typed_at > TYPING_S and not self._api.limiter.blocked(where.chat)

    async def _type(self, draft: Draft) -> None:
        async with draft.lock:
            draft.typed_at = time.monotonic()
            where = draft.where
            method = SendChatAction(chat_id=where.chat, message_thread_id=where.action_topic, action="typing")
            try:
                await self._api.call(method, timeout_s=5)
            except TelegramRetryAfter as error:
                self._api.limiter.refused(where.chat, error.retry_after)
            except Exception as error:
                _log_failure(method, error)


def _log_failure(method: TelegramMethod[Any], error: Exception) -> None:
    log.info("telegram.not_shown", extra={"method": method.__api_method__, "error": type(error).__name__})


async def _rendered(source: str) -> texts.RenderedText:
    return texts.render(source) if len(source) < 2_000 else await asyncio.to_thread(texts.render, source)


def _edit(where: TelegramHandle, shown: texts.RenderedText) -> TelegramMethod[Any]:
    """An intermediate text, with a stop button below a reply."""
    entities, markup = shown.entities() or None, stop_keyboard(STOP_SIGN) if where.streamed else None
    return EditMessageText(
        chat_id=where.chat, message_id=where.message, text=shown.text, entities=entities, reply_markup=markup
    )


def _draft(where: TelegramHandle, shown: texts.RenderedText) -> TelegramMethod[Any]:
    return SendMessageDraft(
        chat_id=where.chat,
        draft_id=where.draft,
        message_thread_id=where.topic,
        text=shown.text,
        entities=shown.entities() or None,
        can_stop=True,
        keep_on_stop=True,
    )
