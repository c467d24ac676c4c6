"""The HTTP server: events, and the two pages of an OAuth installation.

Unsigned requests get an empty 401. Headers are checked before Bolt sees them, since slack_sdk raises for a timestamp
that is no number and for text that is no UTF-8.
"""

import hmac
import html
import logging
import re
from collections.abc import Mapping
from urllib.parse import urlencode

from aiohttp import ClientError, web
from slack_bolt.adapter.aiohttp import to_aiohttp_response
from slack_bolt.app.async_app import AsyncApp
from slack_bolt.request.async_request import AsyncBoltRequest
from slack_sdk.errors import SlackApiError
from slack_sdk.signature import SignatureVerifier

from bots.shared.http import serve
from bots.shared.incoming import notice
from bots.slack.addresses import PLATFORM
from bots.slack.pages.manifest import SCOPES
from bots.slack.settings import SlackSettings
from bots.slack.workspaces import Workspaces
from core.errors import AppError
from core.i18n.messages import resolve, say
from core.platform import BotService
from core.types import Address

log = logging.getLogger(__name__)
EVENTS, INSTALL, REDIRECT = "/slack/events", "/slack/install", "/slack/oauth_redirect"
MAX_BYTES = 2_000_000
_COOKIE = "slack-install"
_TIME = re.compile(r"[0-9]{1,12}")
_SIGNATURE = re.compile(r"v0=[0-9a-f]{64}")
_LINK = re.compile(r"[A-Za-z0-9_-]{0,64}")
_PAGE = (
    '<!doctype html><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    '<title>{title}</title><body style="font:18px sans-serif;max-width:36em;margin:4em auto;padding:0 1em">'
    "<h1>{title}</h1><p>{text}</p>"
)


class Web:
    """The server of one app. With a signing secret it takes events, with a client id the app can be installed."""

    def __init__(self, settings: SlackSettings, app: AsyncApp, workspaces: Workspaces, service: BotService) -> None:
        self._settings, self._app, self._workspaces, self._service = settings, app, workspaces, service
        self._verifier = SignatureVerifier(settings.signing_secret) if settings.signing_secret else None
        self._runner: web.AppRunner | None = None

    @property
    def port(self) -> int:
        assert self._runner is not None
        return int(self._runner.addresses[0][1])

    async def open(self) -> None:
        """Raises BadConfig when the address cannot be bound."""
        served = web.Application(client_max_size=MAX_BYTES)
        if self._verifier is not None:
            served.router.add_post(EVENTS, self._events)
        if self._settings.client_id:
            served.router.add_get(INSTALL, self._install)
            served.router.add_get(REDIRECT, self._redirect)
        served.router.add_route("*", "/{path:.*}", _nobody)
        self._runner = await serve(served, *self._settings.host_and_port, "bots.slack")

    async def close(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()

    # --- events ---

    async def _events(self, request: web.Request) -> web.Response:
        body = await self._verified(request)
        if body is None:
            return web.Response(status=401)
        try:
            given = AsyncBoltRequest(body=body, query=request.query_string, headers=dict(request.headers))
            readable = isinstance(given.body, dict) and bool(given.body)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            readable = False
        if not readable:
            log.error("slack.unreadable", extra={"bytes": len(body)})
            await self._service.accept_dead(PLATFORM, "", request.headers["X-Slack-Signature"], body)
            return web.Response()
        return await to_aiohttp_response(await self._app.async_dispatch(given))

    async def _verified(self, request: web.Request) -> str | None:
        """The body of a request signed by Slack within the last five minutes, else None."""
        times = request.headers.getall("X-Slack-Request-Timestamp", [])
        signatures = request.headers.getall("X-Slack-Signature", [])
        if len(times) != 1 or len(signatures) != 1 or self._verifier is None:
            return None
        if not _TIME.fullmatch(times[0]) or not _SIGNATURE.fullmatch(signatures[0]):
            return None
        try:
            body = (await request.read()).decode("utf-8")
        except (UnicodeDecodeError, web.HTTPRequestEntityTooLarge):
            return None
        return body if self._verifier.is_valid(body, times[0], signatures[0]) else None

    # --- installing ---

    async def _install(self, request: web.Request) -> web.StreamResponse:
        """Redirect to Slack's authorize page. `?link=NAME` binds the workspace to the channel of that link."""
        link = request.query.get("link", "")
        if not _LINK.fullmatch(link):
            return _page(request, "install_failed", 400)
        try:
            state = await self._service.installations.begin(PLATFORM, link)
        except AppError as error:
            log.error("slack.not_stored", extra={"error": str(error)})
            return _page(request, "install_failed", 503)
        asked = {"client_id": self._settings.client_id, "scope": ",".join(SCOPES), "state": state}
        asked["redirect_uri"] = self._settings.url.rstrip("/") + REDIRECT
        there = self._settings.api.rstrip("/").removesuffix("api") + "oauth/v2/authorize"
        answer = web.Response(status=302, headers={"Location": f"{there}?{urlencode(asked)}"})
        secure = self._settings.url.startswith("https:")
        answer.set_cookie(_COOKIE, state, max_age=600, httponly=True, secure=secure, samesite="Lax", path=REDIRECT)
        return answer

    async def _redirect(self, request: web.Request) -> web.StreamResponse:
        """The OAuth redirect. The state is valid once, and only in the browser that started."""
        state, code = request.query.get("state", ""), request.query.get("code", "")
        given, began = (text.encode("utf-8", "surrogatepass") for text in (state, request.cookies.get(_COOKIE, "")))
        if not state or not hmac.compare_digest(given, began):
            return _page(request, "install_failed", 401)
        try:
            link = await self._service.installations.use(PLATFORM, state)
            if link is None:
                return _page(request, "install_failed", 401)
            if not code:
                return _page(request, "install_cancelled", 200)
            there = self._settings.url.rstrip("/") + REDIRECT
            answer = await self._workspaces.exchange(code=code, redirect_uri=there)
            account, name = await self._workspaces.add(answer, link)
            await self._welcome(account, answer)
        except (SlackApiError, ClientError, TimeoutError, OSError, AppError, KeyError) as error:
            log.warning("slack.install_failed", extra={"error": type(error).__name__})
            return _page(request, "install_failed", 400)
        return _page(request, "installed", 200, name=name)

    async def _welcome(self, account: str, answer: Mapping[str, object]) -> None:
        """Send the installing person one welcome DM, not again for a reinstallation."""
        who = answer.get("authed_user")
        user = str(who.get("id") or "") if isinstance(who, dict) else ""
        if user:
            at = Address(PLATFORM, account, user, f"@{user}")
            await self._service.accept(notice(at, user, f"welcome:{user}", "slack.welcome"))


async def _nobody(request: web.Request) -> web.Response:
    return web.Response(status=401)


def _page(request: web.Request, key: str, status: int, **fields: str) -> web.Response:
    language = resolve(request.headers.get("Accept-Language", "").partition(",")[0]) or "en"
    title, text = say(language, f"slack.{key}_title"), say(language, f"slack.{key}", **fields)
    shown = _PAGE.format(title=html.escape(title), text=html.escape(text))
    return web.Response(status=status, text=shown, content_type="text/html", headers={"Referrer-Policy": "no-referrer"})
