"""Takes in what Slack sends: read, commit, and only then acknowledge. Knows no answer.

It stands in Bolt's `before_authorize`: after the signature check, before any call to Slack. What it returns is the
acknowledgement; a commit that fails returns 503, which Slack sends again, over HTTP and by Socket Mode alike.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Awaitable, Callable

from slack_bolt.request.async_request import AsyncBoltRequest
from slack_bolt.response import BoltResponse

from bots.outlet import Door
from bots.slack.courtesy import Courtesy
from bots.slack.outlet import Asker
from bots.slack.places import PLATFORM
from bots.slack.reader import Payload, Read, Unreadable, account_of, read, update_key
from bots.slack.workspaces import Workspaces
from core.errors import Overloaded, StorageError

log = logging.getLogger(__name__)


class Intake:
    def __init__(self, workspaces: Workspaces, courtesy: Courtesy, door: Door) -> None:
        self._workspaces, self._courtesy, self._door = workspaces, courtesy, door

    async def before_authorize(
        self, req: AsyncBoltRequest, resp: BoltResponse, next: Callable[[], Awaitable[BoltResponse]]
    ) -> BoltResponse:
        """Bolt's seam. Never calls `next`: everything is answered here, and tokens are had when a row runs."""
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
        return BoltResponse(status=200, body=answer if answer is not None else "")

    async def take(self, body: Payload) -> dict[str, object] | str | None:
        """Commit one payload; what the acknowledgement says. Raises Overloaded or StorageError: nothing was kept."""
        try:
            found = read(body)
        except Unreadable as error:
            account = str(account_of(body)) if isinstance(body, dict) else ""
            log.error("slack.unreadable", extra={"account": account, "error": str(error)})
            await self._door.accept_dead(PLATFORM, account, update_key(body), json.dumps(body))
            return None
        return await self._commit(body, found)

    async def _commit(self, body: Payload, found: Read) -> dict[str, object] | str | None:
        if found.gone:
            await self._workspaces.drop(found.account)
            return None
        workspace = self._workspaces.get(found.account)
        if workspace is None:
            log.warning("slack.not_installed", extra={"account": found.account})
            return None
        if found.incoming is not None:
            asked = found.incoming
            workspace.outlet.asked(asked.address, Asker(found.user_team, asked.user))
            await self._door.accept(asked)
        self._courtesy.offer(workspace, body)
        return found.answer
