"""The installations of one Slack app, and the rotation of their tokens."""

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from aiohttp import ClientError
from cachetools import LRUCache
from slack_sdk.errors import SlackApiError
from slack_sdk.web.async_client import AsyncWebClient

from bots.shared.errors import bad_config
from bots.slack.addresses import PLATFORM
from bots.slack.sending.api import SlackApi, bearer
from bots.slack.sending.rate_limits import SlackRateLimiter
from bots.slack.sending.sink import SlackSink
from bots.slack.settings import SlackSettings
from core.errors import BadConfig, Overloaded, StorageError
from core.observability.logs import register_secret
from core.platform import BotService

log = logging.getLogger(__name__)
_RENEW_S = 2 * 3600  # before a token expires; rotated ones are valid for twelve hours
_PEOPLE = 20_000


@dataclass(slots=True)
class Workspace:
    """One installation. `kept` has its token, refresh_token, expires_s, since_s and bot_user.

    `languages` maps a person to the language of their Slack and the one of the bot's replies.
    """

    account: str
    kept: dict[str, str]
    sink: SlackSink = field(init=False)
    api: SlackApi = field(init=False)
    renewing: asyncio.Lock = field(default_factory=asyncio.Lock)
    unsaved: bool = False  # renewed tokens are not stored yet
    languages: LRUCache[str, tuple[str, str]] = field(default_factory=lambda: LRUCache(_PEOPLE))


class Workspaces:
    """The installations by account. `on_dm` is called after a reply in a DM."""

    def __init__(
        self,
        settings: SlackSettings,
        client: AsyncWebClient,
        service: BotService,
        limiter: Callable[[], SlackRateLimiter],
        on_dm: Callable[[Workspace, str], None],
    ) -> None:
        self._settings, self._client, self._service = settings, client, service
        self._limiter, self._on_dm = limiter, on_dm
        self._known: dict[str, Workspace] = {}

    def get(self, account: str) -> Workspace | None:
        return self._known.get(account)

    async def open(self) -> None:
        """Register the stored installations, and the workspace whose token is in the configuration."""
        if self._settings.token:
            answer = (await self._client.api_call("auth.test", headers=bearer(self._settings.token))).data
            assert isinstance(answer, dict)
            of_org = answer.get("is_enterprise_install") and answer.get("enterprise_id")
            kept = {"token": self._settings.token, "bot_user": str(answer.get("user_id", ""))}
            self._register(str(of_org or answer["team_id"]), kept)
        for account, kept in (await self._service.installations.all(PLATFORM)).items():
            if account not in self._known:
                self._register(account, kept)
        log.info("slack.workspaces", extra={"count": len(self._known)})

    async def add(self, answer: Mapping[str, object], link: str) -> tuple[str, str]:
        """Store the response of oauth.v2.access and register the workspace; its account and name."""
        team, org = (value if isinstance(value := answer.get(key), dict) else {} for key in ("team", "enterprise"))
        of_org = bool(answer.get("is_enterprise_install"))
        account = str((org if of_org else team)["id"])
        kept = {**_tokens(answer), "bot_user": str(answer.get("bot_user_id", "")), "since_s": str(int(time.time()))}
        await self._service.installations.keep(PLATFORM, account, kept, link)
        self._register(account, kept)
        log.info("slack.installed", extra={"account": account})
        return account, str((org if of_org else team).get("name") or account)

    async def exchange(self, **given: str) -> dict[str, object]:
        """Call oauth.v2.access with a code or a refresh token. Raises SlackApiError."""
        secrets = {"client_id": self._settings.client_id, "client_secret": self._settings.client_secret}
        answer = (await self._client.api_call("oauth.v2.access", data={**secrets, **given})).data
        assert isinstance(answer, dict)
        return answer

    async def drop(self, account: str, at_s: float) -> None:
        """Delete the tokens of an app that was uninstalled at `at_s`, before the event is acknowledged.

        A late event from before the present installation is ignored.
        """
        known = self._known.get(account)
        if known is None or known.kept.get("token") == self._settings.token:
            return
        if at_s and at_s < float(known.kept.get("since_s") or 0):
            log.info("slack.uninstalled_before", extra={"account": account})
            return
        await self._service.installations.drop(PLATFORM, account)
        del self._known[account]
        known.kept = {}
        log.info("slack.uninstalled", extra={"account": account})

    def _register(self, account: str, kept: dict[str, str]) -> None:
        _hide(kept)
        known = self._known.get(account)
        if known is not None:
            known.kept = kept
            return
        made = self._known[account] = Workspace(account, kept)
        made.api = SlackApi(self._client, lambda: self._token(made), self._limiter())
        made.sink = SlackSink(made.api, transport=self._settings.transport, on_dm=lambda user: self._on_dm(made, user))
        self._service.register(PLATFORM, account, made.sink)

    async def _token(self, of: Workspace) -> str:
        """The current token. One that expires soon is renewed first, by one caller."""
        async with of.renewing:
            left_s, refresh = float(of.kept.get("expires_s") or 0) - time.time(), of.kept.get("refresh_token", "")
            if refresh and left_s < _RENEW_S:
                try:
                    await self._renew(of, refresh)
                except (SlackApiError, ClientError, TimeoutError, OSError) as error:
                    log.error("slack.not_renewed", extra={"account": of.account, "error": type(error).__name__})
                    if left_s <= 0:
                        raise
            if of.unsaved:
                await self._save(of)
            return of.kept.get("token", "")

    async def _renew(self, of: Workspace, refresh: str) -> None:
        answer = await self.exchange(grant_type="refresh_token", refresh_token=refresh)
        of.kept = {**of.kept, **_tokens(answer)}
        of.unsaved = True
        _hide(of.kept)
        log.info("slack.token_renewed", extra={"account": of.account})

    async def _save(self, of: Workspace) -> None:
        """Store renewed tokens; after a failure again with the next call, since the old refresh token is invalid."""
        try:
            await self._service.installations.keep(PLATFORM, of.account, of.kept)
            of.unsaved = False
        except (StorageError, Overloaded) as error:
            log.error("slack.not_stored", extra={"account": of.account, "error": str(error)})


def bad_token() -> BadConfig:
    return bad_config(
        "slack", "Slack does not know the token of [bots.slack]: copy it from OAuth & Permissions of your app"
    )


def _tokens(answer: Mapping[str, object]) -> dict[str, str]:
    found = {"token": str(answer["access_token"])}
    if answer.get("refresh_token"):
        found["refresh_token"] = str(answer["refresh_token"])
        found["expires_s"] = str(time.time() + float(str(answer.get("expires_in") or 43_200)))
    return found


def _hide(kept: Mapping[str, str]) -> None:
    for key in ("token", "refresh_token"):
        if kept.get(key):
            register_secret(kept[key])
