"""What Slack is told beside an answer: that it is on its way, and that it is over. Best effort; nobody waits for it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any

from bots.slack.sending.api import ERRORS, SlackApi, name_of
from bots.slack.sending.handles import REMEMBERED
from core.i18n.messages import say
from core.types import Address

log = logging.getLogger(__name__)


class Sessions:
    """One workspace's: the agent sessions of its threads."""

    def __init__(self, api: SlackApi) -> None:
        self._api = api
        self._errands: set[asyncio.Task[None]] = set()

    def begin(self, to: Address, language: str) -> asyncio.Task[None] | None:
        """Show that an answer is on its way, and Slack's own stop button."""
        return self._errand(self._begin(to, language))

    def end(self, channel: str, thread: str, begun: asyncio.Task[None] | None) -> None:
        """No longer at work; after all that was said at the beginning."""
        self._errand(self._end(channel, thread, begun))

    async def _begin(self, to: Address, language: str) -> None:
        words = [say(language, f"slack.working_{number}") for number in (1, 2, 3)]
        at = {"channel_id": to.place, "thread_ts": to.conversation}
        await self._tell("agents.sessions.setStatus", **at, status="processing")
        await self._tell("assistant.threads.setStatus", **at, status=words[0], loading_messages=words)

    async def _end(self, channel: str, thread: str, begun: asyncio.Task[None] | None) -> None:
        if begun is not None:
            await asyncio.wait({begun})
        await self._tell("agents.sessions.setStatus", channel_id=channel, thread_ts=thread, status="active")

    async def _tell(self, method: str, **given: Any) -> None:
        if not self._api.free(method):
            return
        try:
            await self._api.once(method, **given)
        except ERRORS as error:
            log.debug("slack.aside_failed", extra={"method": method, "error": name_of(error)})

    def _errand(self, what: Coroutine[Any, Any, None]) -> asyncio.Task[None] | None:
        if len(self._errands) > REMEMBERED:
            what.close()
            return None
        task = asyncio.ensure_future(what)
        self._errands.add(task)
        task.add_done_callback(self._errands.discard)
        return task
