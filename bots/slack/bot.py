"""One Slack app for all its workspaces, by Socket Mode or HTTP."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Self

from aiohttp import ClientSession
from slack_bolt.adapter.socket_mode.aiohttp import AsyncSocketModeHandler
from slack_bolt.app.async_app import AsyncApp
from slack_bolt.authorization import AuthorizeResult
from slack_sdk.web.async_client import AsyncWebClient

from bots.shared.backoff import pauses
from bots.slack.addresses import PLATFORM
from bots.slack.housekeeping import SlackHousekeeping
from bots.slack.receiver import SlackReceiver
from bots.slack.sending.api import CALL_S, ERRORS, SlackProblem, classify
from bots.slack.sending.rate_limits import SlackRateLimiter
from bots.slack.settings import SlackSettings, read_settings
from bots.slack.web import Web
from bots.slack.workspaces import Workspaces, bad_token
from core.platform import BotService

log = logging.getLogger(__name__)
_PING_S = 5  # a broken socket is noticed at the next ping


class SlackBot:
    """One Slack app: a table [bots.NAME]."""

    platform = PLATFORM
    training_allowed = False  # API terms, "Data usage", since 2025-05-29

    def __init__(self, settings: SlackSettings, limiter: Callable[[], SlackRateLimiter] = SlackRateLimiter) -> None:
        self._settings, self._limiter = settings, limiter
        self.web: Web | None = None
        self.workspaces: Workspaces | None = None

    @classmethod
    def configure(cls, settings: Mapping[str, object]) -> Self:
        return cls(read_settings(settings))

    async def run(self, service: BotService) -> None:
        """Run until cancelled. Raises BadConfig for an invalid token."""
        settings = self._settings
        async with ClientSession() as session:
            base = settings.api.rstrip("/") + "/"
            client = AsyncWebClient(base_url=base, timeout=CALL_S, retry_handlers=[], session=session)
            housekeeping = SlackHousekeeping(service)
            self.workspaces = workspaces = Workspaces(settings, client, service, self._limiter, housekeeping.refresh)
            await _until_done(workspaces.open, "slack.away")
            app = _app(settings, client, SlackReceiver(workspaces, housekeeping, service))
            self.web = Web(settings, app, workspaces, service)
            if settings.signing_secret or settings.client_id:
                await self.web.open()
            try:
                async with asyncio.TaskGroup() as tasks:
                    tasks.create_task(housekeeping.run(), name="slack housekeeping")
                    if settings.app_token:
                        listening = _until_done(lambda: _listen(app, settings, client), "slack.no_socket")
                        tasks.create_task(listening, name="slack socket")
            finally:
                await self.web.close()


def _app(settings: SlackSettings, client: AsyncWebClient, receiver: SlackReceiver) -> AsyncApp:
    """The Bolt app; `before_authorize` answers every request, so that no call to Slack precedes the commit."""

    async def never(**_: object) -> AuthorizeResult:
        raise AssertionError("before_authorize answers all")

    return AsyncApp(
        name="distributary",
        logger=logging.getLogger("slack_bolt"),
        signing_secret=settings.signing_secret or None,
        client=client,
        authorize=never,
        before_authorize=receiver.before_authorize,
        ssl_check_enabled=False,
        url_verification_enabled=False,
        request_verification_enabled=bool(settings.signing_secret),
    )


async def _listen(app: AsyncApp, settings: SlackSettings, client: AsyncWebClient) -> None:
    """Listen by Socket Mode; slack_sdk reconnects when Slack refreshes or cuts the connection."""
    handler = AsyncSocketModeHandler(app, settings.app_token, web_client=client, ping_interval=_PING_S)
    try:
        await handler.client.connect()  # type: ignore[no-untyped-call]
        log.info("slack.socket")
        await asyncio.Event().wait()
    finally:
        await handler.client.close()  # type: ignore[no-untyped-call]


async def _until_done(action: Callable[[], Awaitable[None]], event: str) -> None:
    """Repeat an action, however long Slack is unavailable. Raises BadConfig for an invalid token."""
    for wait_s in pauses():
        try:
            await action()
            return
        except ERRORS as error:
            if classify(error) is SlackProblem.CLOSED:
                raise bad_token() from None
            log.warning(event, extra={"error": type(error).__name__})
            await asyncio.sleep(wait_s)
