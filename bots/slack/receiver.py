"""Receives payloads: parse, commit, then acknowledge.

It runs as Bolt's `before_authorize`: after the signature check, before any call to Slack. A commit that fails is
answered with 503, after which Slack sends the payload again, over HTTP and by Socket Mode alike.
"""

import json
import logging
from collections.abc import Awaitable, Callable
from dataclasses import replace

from slack_bolt.request.async_request import AsyncBoltRequest
from slack_bolt.response import BoltResponse

from bots.slack.addresses import PLATFORM
from bots.slack.events import Payload, ReadEvent, UnreadableEvent, account_of, read, update_key
from bots.slack.housekeeping import SlackHousekeeping
from bots.slack.pages import modals
from bots.slack.sending.handles import Recipient
from bots.slack.workspaces import Workspaces
from core.errors import Overloaded, StorageError
from core.platform import BotService
from core.types import Address, Kind

log = logging.getLogger(__name__)


class SlackReceiver:
    def __init__(self, workspaces: Workspaces, housekeeping: SlackHousekeeping, service: BotService) -> None:
        self._workspaces, self._housekeeping, self._service = workspaces, housekeeping, service

    async def before_authorize(
        self, req: AsyncBoltRequest, resp: BoltResponse, next: Callable[[], Awaitable[BoltResponse]]
    ) -> BoltResponse:
        """Bolt's hook. It never calls `next`: tokens are looked up when the message is handled."""
        body = req.body
        if body.get("type") == "url_verification":
            return BoltResponse(status=200, body={"challenge": str(body.get("challenge", ""))})
        if body.get("type") == "app_rate_limited":
            log.error("slack.events_limited", extra={"account": str(body.get("team_id"))})
            return BoltResponse(status=200, body="")
        try:
            answer = await self.take(body)
        except (Overloaded, StorageError) as error:
            log.error("slack.not_stored", extra={"error": str(error)})
            return BoltResponse(status=503, body="", headers={"Retry-After": ["5"]})
        return BoltResponse(status=200, body=answer or "")

    async def take(self, body: Payload) -> dict[str, object] | str | None:
        """Commit a payload; the body of the acknowledgement. Raises Overloaded or StorageError."""
        try:
            found = read(body, await self._language(body))
        except UnreadableEvent as error:
            account = account_of(body) if isinstance(body, dict) else ""
            log.error("slack.unreadable", extra={"account": account, "error": str(error)})
            await self._service.accept_dead(PLATFORM, account, update_key(body), json.dumps(body))
            return None
        return await self._commit(body, found)

    async def _commit(self, body: Payload, found: ReadEvent) -> dict[str, object] | str | None:
        if found.gone:
            await self._workspaces.drop(found.account, float(body.get("event_time") or 0))
            return None
        workspace = self._workspaces.get(found.account)
        if workspace is None:
            log.warning("slack.not_installed", extra={"account": found.account})
            return None
        if found.options is not None:
            return await self._options(found.account, found.person.user, *found.options)
        if found.incoming is not None:
            locale, spoken = workspace.languages.get(found.person.user, ("", ""))
            asked = replace(found.incoming, language=locale)
            if found.below and not await self._service.places.heard(asked.address, found.below):
                return None
            team = found.person.team if found.person.team[:1] == "T" else found.account
            workspace.sink.asked(asked.address, Recipient(team, found.person.user, spoken))
            if asked.kind is Kind.PRESS:
                workspace.sink.pressed(str((body.get("channel") or {}).get("id") or ""), body.get("message") or {})
            await self._service.accept(asked)
        self._housekeeping.offer(workspace, body, found.person)
        return found.answer

    async def _options(self, account: str, user: str, context: modals.ModalContext, typed: str) -> dict[str, object]:
        """The current options of a modal's list of versions."""
        at = Address(PLATFORM, account, context.place, context.conversation)
        shown = await self._service.places.overview(at, user)
        return modals.options(shown.choices if shown else (), typed, context.language)

    async def _language(self, body: Payload) -> str:
        """The language of whoever used a slash command, for its acknowledgement."""
        if not (isinstance(body.get("command"), str) and isinstance(body.get("user_id"), str)):
            return "en"
        account, user = account_of(body), body["user_id"]
        workspace = self._workspaces.get(account)
        known = workspace.languages.get(user, ("", ""))[1] if workspace else ""
        at = Address(PLATFORM, account, str(body.get("channel_id") or ""), "")
        return known or await self._service.places.language(at, user) or "en"
