"""Calls of one workspace to Slack's Web API: paced, refusals told apart, sent once. Knows no answer and no event.

slack_sdk repeats a request whose connection broke, which can post twice; here no request is repeated by itself.
"""

from __future__ import annotations

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

from bots.slack.sending.rate_limits import SlackRateLimiter
from core.errors import AppError, BadInput
from core.platform import Unreachable

log = logging.getLogger(__name__)
CALL_S = 15
PATIENCE_S = 3600.0
MAX_FILE_BYTES = 200 * 10**6
_PAUSES_S = (0.5, 1.0, 2.0, 4.0, 8.0, 15.0)
# These refuse JSON (invalid_arguments): what reads, and what has to do with files.
_BY_FORM = frozenset(("files.completeUploadExternal", "files.getUploadURLExternal", "files.info", "users.info"))
ERRORS = (SlackApiError, ClientError, TimeoutError, OSError)
Token = Callable[[], Awaitable[str]]


class SlackProblem(Enum):
    """What a refusal means for whoever writes."""

    WAIT = auto()  # 429: this one was not done
    AWAY = auto()  # network, server: outcome unknown
    ENDED = auto()  # the stream is not open any more
    OPEN = auto()  # the stream is still open
    GONE = auto()  # the message is not there any more
    CLOSED = auto()  # nobody can be reached there
    OTHER = auto()  # refused for what it says


_MEANINGS = {
    SlackProblem.WAIT: ("ratelimited", "rate_limited"),
    SlackProblem.AWAY: ("internal_error", "fatal_error", "service_unavailable", "request_timeout", "team_added_to_org"),
    SlackProblem.ENDED: ("message_not_in_streaming_state",),
    SlackProblem.OPEN: ("streaming_state_conflict",),
    SlackProblem.GONE: ("message_not_found", "cant_update_message", "thread_not_found"),
    SlackProblem.CLOSED: (
        "account_inactive",
        "channel_not_found",
        "invalid_auth",
        "invalid_refresh_token",
        "is_archived",
        "not_allowed_token_type",
        "not_authed",
        "not_in_channel",
        "restricted_action",
        "token_expired",
        "token_revoked",
        "user_not_found",
    ),
}
_BY_ERROR = {error: meaning for meaning, errors in _MEANINGS.items() for error in errors}


def trouble(error: Exception) -> SlackProblem:
    """What went wrong, from what Slack said."""
    if not isinstance(error, SlackApiError):
        return SlackProblem.AWAY
    response = error.response
    if getattr(response, "status_code", 200) == 429:
        return SlackProblem.WAIT
    said = response.get("error") if hasattr(response, "get") else None
    return _BY_ERROR.get(str(said), SlackProblem.OTHER) if said else SlackProblem.AWAY


def name_of(error: Exception) -> str:
    """What Slack calls it; else what it is."""
    if isinstance(error, SlackApiError) and hasattr(error.response, "get"):
        return str(error.response.get("error"))
    return type(error).__name__


class Unsure(AppError):
    """Whether it was done is not known, and it may not be repeated."""


class SlackApi:
    """Writes for one workspace. `token` gives the token of this moment: it may rotate."""

    def __init__(
        self, client: AsyncWebClient, token: Token, pace: SlackRateLimiter, patience_s: float = PATIENCE_S
    ) -> None:
        self._client, self._token, self.pace, self._patience_s = client, token, pace, patience_s

    async def once(self, method: str, **body: Any) -> dict[str, Any]:
        """One request now, booked but not waited for. Raises what Slack says; `trouble` tells what it means."""
        channel = str(body.get("channel", ""))
        self.pace.take(method, channel)
        try:
            async with asyncio.timeout(CALL_S):
                token = await self._token()
                headers = {"Authorization": f"Bearer {token}"}
                answer = await self._client.api_call(method, headers=headers, **_encoded(method, body))
        except SlackApiError as error:
            if trouble(error) is SlackProblem.WAIT:
                self.pace.refused(method, channel, _retry_after_s(error))
            raise
        if not isinstance(answer.data, dict):
            raise ClientError("no JSON in the answer")
        return answer.data

    def free(self, method: str, channel: str = "") -> bool:
        """Whether the rate lets this call go out now."""
        return self.pace.wait_s(method, channel) <= 0

    async def turn(self, method: str, channel: str = "") -> None:
        """Wait until the rate lets this call go out."""
        while (wait_s := self.pace.wait_s(method, channel)) > 0:  # noqa: ASYNC110 - others take what is free meanwhile
            await asyncio.sleep(wait_s)

    async def write(self, method: str, **body: Any) -> dict[str, Any]:
        """A request that must be done: waits for its turn, through 429 and through a Slack that is away.

        Only for what may be repeated. Raises what Slack says otherwise; Unreachable where nobody is.
        """
        return await self._patiently(method, body, repeatable=True)

    async def post(self, **body: Any) -> dict[str, Any]:
        """chat.postMessage: goes out again only where it was not done for certain. Raises like `write`, and Unsure."""
        return await self._patiently("chat.postMessage", body, repeatable=False)

    async def _patiently(self, method: str, body: dict[str, Any], *, repeatable: bool) -> dict[str, Any]:
        try:
            async with asyncio.timeout(self._patience_s):
                return await self._write(method, body, repeatable=repeatable)
        except TimeoutError as error:
            raise AppError(detail=f"Slack did not take {method} for too long") from error

    async def _write(self, method: str, body: dict[str, Any], *, repeatable: bool) -> dict[str, Any]:
        tries, channel = 0, str(body.get("channel", ""))
        while True:
            await self.turn(method, channel)
            try:
                return await self.once(method, **body)
            except ERRORS as error:
                meaning = trouble(error)
                if meaning is SlackProblem.CLOSED:
                    raise Unreachable(detail=type(error).__name__) from error
                if meaning is SlackProblem.AWAY:
                    log.warning("slack.away", extra={"method": method, "error": type(error).__name__})
                    if not repeatable and not isinstance(error, ClientConnectorError):  # it had a connection
                        raise Unsure(detail=type(error).__name__) from error
                    await asyncio.sleep(_PAUSES_S[min(tries, len(_PAUSES_S) - 1)])
                    tries += 1
                elif meaning is not SlackProblem.WAIT:
                    raise

    async def upload(self, path: Path) -> str:
        """Hand a file to Slack, shared with nobody yet; its id."""
        data = await asyncio.to_thread(path.read_bytes)
        ticket = await self.write("files.getUploadURLExternal", filename=path.name, length=len(data))
        async with (
            ClientSession(timeout=ClientTimeout(total=120)) as session,
            session.post(ticket["upload_url"], data=data) as answer,
        ):
            answer.raise_for_status()
        await self.write("files.completeUploadExternal", files=[{"id": ticket["file_id"], "title": path.name}])
        return str(ticket["file_id"])

    async def download(self, file_id: str, name: str, size_bytes: int = 0) -> AsyncIterator[bytes]:
        """The bytes of a file that a person shared. Raises BadInput for one that is too large or not there."""
        if size_bytes > MAX_FILE_BYTES:
            raise BadInput("slack.file_too_large", name=name, limit=MAX_FILE_BYTES // 10**6)
        try:
            file = (await self.once("files.info", file=file_id))["file"]
            headers = {"Authorization": f"Bearer {await self._token()}"}
            url, whole_s = file["url_private_download"], ClientTimeout(total=300)
            async with (
                ClientSession(timeout=whole_s) as session,
                # a redirect leads to a login page, and a token goes nowhere else
                session.get(url, headers=headers, allow_redirects=False) as got,
            ):
                if got.status != 200:
                    raise BadInput("slack.file_gone", detail=f"status {got.status}", name=name)
                async for chunk in got.content.iter_chunked(1 << 16):
                    yield chunk
        except (SlackApiError, ClientError, TimeoutError, KeyError) as error:
            raise BadInput("slack.file_gone", detail=type(error).__name__, name=name) from None


def _encoded(method: str, body: Mapping[str, Any]) -> dict[str, Any]:
    given = {key: value for key, value in body.items() if value is not None}
    if method not in _BY_FORM:
        return {"json": given}
    return {"data": {key: value if isinstance(value, str) else json.dumps(value) for key, value in given.items()}}


def _retry_after_s(error: SlackApiError) -> float:
    headers = getattr(error.response, "headers", {}) or {}
    found = next((value for key, value in headers.items() if key.lower() == "retry-after"), "1")
    try:
        return max(float(found), 0.1)
    except ValueError:
        return 1.0
