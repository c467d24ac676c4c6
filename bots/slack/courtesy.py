"""What Slack is told besides answers: suggested prompts, the modal of the message shortcut. Best effort, in order.

Knows no answer. What does not fit into its queue is left out.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from bots.outlet import Address, Door
from bots.slack.blocks import LIMITS, where
from bots.slack.home import limits_view, view
from bots.slack.places import PLATFORM
from bots.slack.reader import ASK, Payload, ask_view
from bots.slack.workspaces import Workspace
from core.texts import say

log = logging.getLogger(__name__)
_MOST = 1_000
_WORKERS = 4


class Courtesy:
    """`run` must be running for anything to be said."""

    def __init__(self, door: Door) -> None:
        self._door = door
        self._queue: asyncio.Queue[tuple[Workspace, Payload]] = asyncio.Queue(_MOST)

    def offer(self, workspace: Workspace, body: Payload) -> None:
        """Take what is acknowledged; never waits."""
        event = body.get("event") or {}
        modal = (body.get("type") == "message_action" and body.get("callback_id") == ASK) or _asks_for_limits(body)
        if modal or event.get("type") == "app_home_opened":
            try:
                self._queue.put_nowait((workspace, body))
            except asyncio.QueueFull:
                log.warning("slack.courtesy_left_out")

    async def run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            for _ in range(_WORKERS):
                tasks.create_task(self._work())

    async def _work(self) -> None:
        while True:
            workspace, body = await self._queue.get()
            try:
                await self._do(workspace, body)
            except Exception as error:  # the person can do it again; nothing was promised
                log.warning("slack.courtesy_failed", extra={"error": type(error).__name__})

    async def _do(self, workspace: Workspace, body: Payload) -> None:
        if body.get("type") == "message_action":
            await workspace.api.once("views.open", trigger_id=body["trigger_id"], view=ask_view(body))
            return
        if body.get("type") == "block_actions":
            (place, _), user = where(str(body["actions"][0].get("block_id", ""))), body["user"]["id"]
            shown = limits_view(place, user, "en")
            await workspace.api.once("views.open", trigger_id=body["trigger_id"], view=shown)
            return
        event = body["event"]
        if event.get("tab") == "messages":
            await self._greet(workspace, event)
        elif event.get("tab") == "home":
            await self._home(workspace, event)

    async def _home(self, workspace: Workspace, event: Payload) -> None:
        user, at = event["user"], Address(PLATFORM, workspace.account, event["channel"], "")
        shown = view(event["channel"], user, await self._door.grant(at, user), "en")
        await workspace.api.once("views.publish", user_id=user, view=shown)

    async def _greet(self, workspace: Workspace, event: Payload) -> None:
        """The channel's own questions, as prompts of an empty conversation."""
        at = Address(PLATFORM, workspace.account, event["channel"], "")
        questions = await self._door.questions(at, event["user"])
        prompts: list[dict[str, Any]] = [{"title": one, "message": one} for one in questions[:4]]
        if prompts:
            await workspace.api.once(
                "assistant.threads.setSuggestedPrompts",
                channel_id=event["channel"],
                title=say("en", "slack.prompts"),
                prompts=prompts,
            )


def _asks_for_limits(body: Payload) -> bool:
    pressed = body.get("actions") or [{}]
    return body.get("type") == "block_actions" and str(pressed[0].get("action_id", "")).startswith(f"{LIMITS}:")
