"""Web API calls of one workspace: rate limited, with errors classified.

slack_sdk's own retries are off: they repeat a request whose connection broke, which can post twice.
"""

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from enum import Enum, auto
from pathlib import Path
from typing import Any

from aiohttp import ClientConnectorError, ClientError, ClientSession, ClientTimeout
from slack_sdk.errors import SlackApiError
from slack_sdk.web.async_client import AsyncWebClient

from bots.shared.errors import OutcomeUnknown
from bots.slack.sending.rate_limits import SlackRateLimiter
from core.errors import BadInput
from core.platform import Unreachable

log = logging.getLogger(__name__)
CALL_S = 15
MAX_FILE_BYTES = 200 * 10**6
# Methods that refuse JSON with invalid_arguments.
_BY_FORM = frozenset(("files.completeUploadExternal", "files.getUploadURLExternal", "files.info", "users.info"))
ERRORS = (SlackApiError, ClientError, TimeoutError, OSError)
Token = Callable[[], Awaitable[str]]


class SlackProblem(Enum):
    """What an error means for the message that was being written."""

    WAIT = auto()  # 429, not executed
    AWAY = auto()  # network or server failure, outcome unknown
    ENDED = auto()  # the stream has ended
    OPEN = auto()  # the stream is still open
    GONE = auto()  # the message was deleted
    CLOSED = auto()  # nobody can be reached there
    OTHER = auto()  # the content is refused


_MEANINGS = {
    SlackProblem.WAIT: "ratelimited rate_limited",
    SlackProblem.AWAY: "internal_error fatal_error service_unavailable request_timeout team_added_to_org",
    SlackProblem.ENDED: "message_not_in_streaming_state",
    SlackProblem.OPEN: "streaming_state_conflict",
    SlackProblem.GONE: "message_not_found cant_update_message thread_not_found",
    SlackProblem.CLOSED: "account_inactive channel_not_found invalid_auth invalid_refresh_token is_archived"
    " not_allowed_token_type not_authed not_in_channel restricted_action token_expired token_revoked user_not_found",
}
_BY_ERROR = {error: meaning for meaning, errors in _MEANINGS.items() for error in errors.split()}


def classify(error: Exception) -> SlackProblem:
    """The problem behind an exception of slack_sdk or aiohttp."""
    if not isinstance(error, SlackApiError):
        return SlackProblem.AWAY
    if getattr(error.response, "status_code", 200) == 429:
        return SlackProblem.WAIT
    name = error.response.get("error") if hasattr(error.response, "get") else None
    return _BY_ERROR.get(str(name), SlackProblem.OTHER) if name else SlackProblem.AWAY


def error_name(error: Exception) -> str:
    """Slack's error code, else the exception's type."""
    if isinstance(error, SlackApiError) and hasattr(error.response, "get"):
        return str(error.response.get("error"))
    return type(error).__name__


class SlackApi:
    """The calls of one workspace. `token` returns the current token, which may rotate."""

    def __init__(self, client: AsyncWebClient, token: Token, limiter: SlackRateLimiter) -> None:
        self._client, self._token, self.limiter = client, token, limiter

    async def once(self, method: str, **body: Any) -> dict[str, Any]:
        """One request now, counted by the rate limiter. Raises one of ERRORS; see `classify`."""
        channel = str(body.get("channel", ""))
        self.limiter.take(method, channel)
        try:
            async with asyncio.timeout(CALL_S):
                headers = bearer(await self._token())
                answer = await self._client.api_call(method, headers=headers, **_encoded(method, body))
        except SlackApiError as error:
            if classify(error) is SlackProblem.WAIT:
                self.limiter.refused(method, channel, _retry_after_s(error))
            raise
        if not isinstance(answer.data, dict):
            raise ClientError("no JSON in the answer")
        return answer.data

    def free(self, method: str, channel: str = "") -> bool:
        """Whether the rate lets this call go out now."""
        return self.limiter.wait_s(method, channel) <= 0

    async def turn(self, method: str, channel: str = "") -> None:
        """Wait until the rate lets this call go out."""
        while (wait_s := self.limiter.wait_s(method, channel)) > 0:  # noqa: ASYNC110 - other callers may take the token meanwhile
            await asyncio.sleep(wait_s)

    async def write(self, method: str, *, repeatable: bool = True, **body: Any) -> dict[str, Any]:
        """One request, after the rate limits and any Retry-After.

        Raises SlackApiError, Unreachable where nobody can be reached, and, unless `repeatable`, OutcomeUnknown for a
        response that was lost.
        """
        channel = str(body.get("channel", ""))
        while True:
            await self.turn(method, channel)
            try:
                return await self.once(method, **body)
            except ERRORS as error:
                problem = classify(error)
                if problem is SlackProblem.CLOSED:
                    raise Unreachable(detail=type(error).__name__) from error
                if problem is SlackProblem.AWAY:
                    log.warning("slack.away", extra={"method": method, "error": type(error).__name__})
                    if not repeatable and not isinstance(error, ClientConnectorError):
                        raise OutcomeUnknown(detail=type(error).__name__) from error
                if problem is not SlackProblem.WAIT:
                    raise

    async def upload(self, path: Path) -> str:
        """Upload a file without sharing it; its id."""
        data = await asyncio.to_thread(path.read_bytes)
        upload = await self.write("files.getUploadURLExternal", filename=path.name, length=len(data))
        async with (
            ClientSession(timeout=ClientTimeout(total=120)) as session,
            session.post(upload["upload_url"], data=data) as answer,
        ):
            answer.raise_for_status()
        await self.write("files.completeUploadExternal", files=[{"id": upload["file_id"], "title": path.name}])
        return str(upload["file_id"])

    async def download(self, file_id: str, name: str, size_bytes: int = 0) -> AsyncIterator[bytes]:
        """Stream a file that a person shared. Raises BadInput for one that is too large or no longer there."""
        if size_bytes > MAX_FILE_BYTES:
            raise BadInput("slack.file_too_large", name=name, limit=MAX_FILE_BYTES // 10**6)
        try:
            file = (await self.once("files.info", file=file_id))["file"]
            url, headers = file["url_private_download"], bearer(await self._token())
            async with (
                ClientSession(timeout=ClientTimeout(total=300)) as session,
                # a redirect leads to a login page, and a token goes nowhere else
                session.get(url, headers=headers, allow_redirects=False) as got,
            ):
                if got.status != 200:
                    raise BadInput("slack.file_gone", detail=f"status {got.status}", name=name)
                async for chunk in got.content.iter_chunked(1 << 16):
                    yield chunk
        except (SlackApiError, ClientError, TimeoutError, KeyError) as error:
            raise BadInput("slack.file_gone", detail=type(error).__name__, name=name) from None


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def _encoded(method: str, body: Mapping[str, Any]) -> dict[str, Any]:
    given = {key: value for key, value in body.items() if value is not None}
    if method not in _BY_FORM:
        return {"json": given}
    return {"data": {key: value if isinstance(value, str) else json.dumps(value) for key, value in given.items()}}


def _retry_after_s(error: SlackApiError) -> float:
    headers = getattr(error.response, "headers", {}) or {}
    found = next((value for key, value in headers.items() if key.lower() == "retry-after"), "1")
    return max(float(found), 0.1) if found.replace(".", "", 1).isdecimal() else 1.0
