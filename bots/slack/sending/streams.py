"""The working status of threads while replies are generated. Best effort, in the background."""

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any

from bots.slack.sending.api import ERRORS, SlackApi, error_name
from bots.slack.sending.handles import REMEMBERED
from core.i18n.messages import say
from core.types import Address

log = logging.getLogger(__name__)


class Sessions:
    """The agent sessions of one workspace's threads."""

    def __init__(self, api: SlackApi) -> None:
        self._api = api
        self._tasks: set[asyncio.Task[None]] = set()

    def begin(self, to: Address, language: str) -> asyncio.Task[None] | None:
        """Show the status "working" and Slack's own stop button."""
        return self._start(self._begin(to, language))

    def end(self, channel: str, thread: str, begun: asyncio.Task[None] | None) -> None:
        """End the status, after `begun` has finished."""
        self._start(self._end(channel, thread, begun))

    async def _begin(self, to: Address, language: str) -> None:
        words = [say(language, f"slack.working_{number}") for number in (1, 2, 3)]
        at = {"channel_id": to.place, "thread_ts": to.conversation}
        await self._call("agents.sessions.setStatus", **at, status="processing")
        await self._call("assistant.threads.setStatus", **at, status=words[0], loading_messages=words)

    async def _end(self, channel: str, thread: str, begun: asyncio.Task[None] | None) -> None:
        if begun is not None:
            await asyncio.wait({begun})
        await self._call("agents.sessions.setStatus", channel_id=channel, thread_ts=thread, status="active")

    async def _call(self, method: str, **given: Any) -> None:
        if not self._api.free(method):
            return
        try:
            await self._api.once(method, **given)
        except ERRORS as error:
            log.debug("slack.status_failed", extra={"method": method, "error": error_name(error)})

    def _start(self, call: Coroutine[Any, Any, None]) -> asyncio.Task[None] | None:
        if len(self._tasks) > REMEMBERED:
            call.close()
            return None
        task = asyncio.ensure_future(call)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task
