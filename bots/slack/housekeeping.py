"""App Homes, modals, suggested prompts and people's languages: best effort, from bounded queues.

Modals have workers of their own, since Slack accepts one only within three seconds of the press.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable

from cachetools import LRUCache
from slack_sdk.errors import SlackApiError

from bots.slack.addresses import PLATFORM
from bots.slack.events import Payload, Person
from bots.slack.pages import home, modals
from bots.slack.pages.blocks import where
from bots.slack.sending.api import ERRORS
from bots.slack.workspaces import Workspace
from core.i18n.messages import resolve, say
from core.platform import BotService
from core.types import Address, Grant

log = logging.getLogger(__name__)
_QUEUE, _HOMES = 1_000, 5_000
_WORKERS = 3
_UNKNOWN_BLOCK = ("invalid_blocks", "invalid_arguments")
_Action = Callable[[], Awaitable[None]]


class SlackHousekeeping:
    """`run` must be running."""

    def __init__(self, service: BotService) -> None:
        self._service = service
        self._modals: asyncio.Queue[_Action] = asyncio.Queue(_QUEUE)
        self._rest: asyncio.Queue[_Action] = asyncio.Queue(_QUEUE)
        self._homes: LRUCache[tuple[str, str], str] = LRUCache(_HOMES)  # (account, user) -> DM, of opened App Homes

    def offer(self, workspace: Workspace, body: Payload, person: Person) -> None:
        """Queue the work of an acknowledged payload; drops it when the queue is full."""
        event = body.get("event") or {}
        if body.get("type") == "message_action" and body.get("callback_id") == modals.ASK:
            _put(self._modals, lambda: self._ask(workspace, body))
        elif (name := _modal_of(body)) is not None:
            _put(self._modals, lambda: self._open(workspace, body, name))
        elif event.get("type") == "app_home_opened":
            self._learn(workspace, event["channel"], str(event["user"]))
            if event.get("tab") == "messages":
                _put(self._rest, lambda: self._greet(workspace, event))
            elif event.get("tab") == "home":
                self._homes[workspace.account, event["user"]] = event["channel"]
                self.refresh(workspace, event["user"])
        elif person.user:
            chosen = "language" in str(event.get("text") or body.get("text") or "")[:20]
            self._learn(workspace, str(event.get("channel") or body.get("channel_id") or ""), person.user, anew=chosen)

    def refresh(self, workspace: Workspace, user: str) -> None:
        """Publish a person's App Home again, if they have opened it: a command may have changed it."""
        place = self._homes.get((workspace.account, user))
        if place is not None:
            _put(self._rest, lambda: self._publish(workspace, place, user))

    async def run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            for queue in (self._modals, self._rest):
                for _ in range(_WORKERS):
                    tasks.create_task(_work(queue))

    # --- modals ---

    async def _ask(self, workspace: Workspace, body: Payload) -> None:
        at = Address(PLATFORM, workspace.account, body["channel"]["id"], "")
        language = await self._service.places.language(at, body["user"]["id"]) or "en"
        shown = modals.ask_view(body["message"], at.place, language)
        await workspace.api.once("views.open", trigger_id=body["trigger_id"], view=shown)

    async def _open(self, workspace: Workspace, body: Payload, name: str) -> None:
        """Open a modal of the App Home for an operator; for others publish the App Home again."""
        (place, conversation), user = where(str(body["actions"][0].get("block_id", ""))), body["user"]["id"]
        at = Address(PLATFORM, workspace.account, place, conversation)
        found = await self._service.places.overview(at, user)
        if found is None or found.grant < Grant.OPERATOR:
            await self._publish(workspace, place, user)
            return
        shown = modals.VIEWS[name](modals.ModalContext(place, conversation, found.language), found)
        if shown is None:
            shown = modals.notice_view(found.language, name, say(found.language, "slack.instructions_too_long"))
        await workspace.api.once("views.open", trigger_id=body["trigger_id"], view=shown)

    # --- home, prompts ---

    async def _publish(self, workspace: Workspace, place: str, user: str) -> None:
        """Publish the App Home with Slack's chart block, or with a text chart where that block is refused."""
        found = await self._service.places.overview(Address(PLATFORM, workspace.account, place, ""), user)
        try:
            await workspace.api.once("views.publish", user_id=user, view=home.view(found, place, user))
        except SlackApiError as error:
            if error.response.get("error") not in _UNKNOWN_BLOCK:
                raise
            await workspace.api.once("views.publish", user_id=user, view=home.view(found, place, user, charts=False))

    async def _greet(self, workspace: Workspace, event: Payload) -> None:
        """Suggest the channel's questions as prompts."""
        at = Address(PLATFORM, workspace.account, event["channel"], "")
        found = await self._service.places.overview(at, event["user"])
        if found is None or not found.channel.questions:
            return
        prompts = [{"title": one, "message": one} for one in found.channel.questions[:4]]
        given = {"channel_id": event["channel"], "title": say(found.language, "slack.prompts"), "prompts": prompts}
        await workspace.api.once("assistant.threads.setSuggestedPrompts", **given)

    # --- languages ---

    def _learn(self, workspace: Workspace, place: str, user: str, *, anew: bool = False) -> None:
        """Look up a person's language once, and again (`anew`) when they may have changed it."""
        if anew or user not in workspace.languages:
            workspace.languages[user] = workspace.languages.get(user, ("", ""))
            _put(self._rest, lambda: self._ask_language(workspace, place, user))

    async def _ask_language(self, workspace: Workspace, place: str, user: str) -> None:
        locale = workspace.languages.get(user, ("", ""))[0]
        if not locale and workspace.api.free("users.info"):
            try:
                answer = await workspace.api.once("users.info", user=user, include_locale=True)
                locale = resolve(str((answer.get("user") or {}).get("locale") or ""))
            except ERRORS:
                log.debug("slack.no_locale")
        at = Address(PLATFORM, workspace.account, place, "")
        workspace.languages[user] = (locale, await self._service.places.language(at, user) or locale)


async def _work(queue: asyncio.Queue[_Action]) -> None:
    while True:
        action = await queue.get()
        try:
            await action()
        except Exception as error:  # best effort: the person may repeat it
            log.warning("slack.housekeeping_failed", extra={"error": type(error).__name__})


def _put(queue: asyncio.Queue[_Action], action: _Action) -> None:
    try:
        queue.put_nowait(action)
    except asyncio.QueueFull:
        log.warning("slack.housekeeping_dropped")


def _modal_of(body: Payload) -> str | None:
    """The name of the modal that a pressed button opens, or None."""
    pressed = (body.get("actions") or [{}])[0] if body.get("type") == "block_actions" else {}
    name = str(pressed.get("action_id", "")).partition(":")[0]
    return name if name in modals.VIEWS else None
