"""Slack on 127.0.0.1: workspaces, messages, streams with expiry by a movable clock, files, OAuth, both ways of events.

What it refuses, Slack refuses. Everything that was ever written is kept, so that a test can see what was doubled.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import secrets
from collections import Counter, defaultdict, deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlencode

from aiohttp import ClientError, ClientSession, WSMsgType, web
from slack_sdk.signature import SignatureVerifier

from tests.fakes.slack import rules

SIGNING, APP_TOKEN, CLIENT, CLIENT_SECRET = "s1gning-s3cret", "xapp-1-A1-test", "11.22", "cl13nt-s3cret"
STREAM_S = 300.0


@dataclass
class Workspace:
    team: str
    token: str
    bot: str
    name: str = ""
    enterprise: str = ""
    alive: bool = True
    refresh: str = ""


@dataclass
class Held:
    """One message as Slack holds it."""

    team: str
    channel: str
    ts: str
    thread: str
    text: str = ""
    blocks: list[dict[str, Any]] = field(default_factory=list)
    streaming: bool = False
    streamed: bool = False
    started: float = 0.0
    files: list[str] = field(default_factory=list)
    history: list[str] = field(default_factory=list)

    @property
    def said(self) -> str:
        """What a person reads as the message itself."""
        marked = "".join(block["text"] for block in self.blocks if block["type"] == "markdown")
        return marked or self.text

    @property
    def buttons(self) -> list[dict[str, Any]]:
        found = [(block, one) for block in self.blocks if "elements" in block for one in block["elements"]]
        return [{**one, "block_id": block.get("block_id", "")} for block, one in found if one["type"] != "plain_text"]

    @property
    def labels(self) -> list[str]:
        return [one["text"]["text"] for one in self.buttons if one["type"] == "button"]


@dataclass
class Call:
    method: str
    token: str
    body: dict[str, Any]


class FakeSlack:
    def __init__(self) -> None:
        self.workspaces: dict[str, Workspace] = {}
        self.messages: dict[tuple[str, str], Held] = {}
        self.calls: list[Call] = []
        self.files: dict[str, bytes] = {}
        self.homes: dict[tuple[str, str], dict[str, Any]] = {}
        self.codes: dict[str, Workspace] = {}
        self.limits = False
        self.early = 0
        self.now = 1_700_000_000.0
        self.faults: defaultdict[str, deque[str]] = defaultdict(deque)
        self.acks: list[tuple[str, object]] = []
        self.retries: Counter[str] = Counter()
        self.sockets: list[web.WebSocketResponse] = []
        self.url = ""
        self.events_url = ""
        self.changed = asyncio.Condition()
        self._sent: defaultdict[int, dict[str, asyncio.Future[object]]] = defaultdict(dict)
        self._tick = itertools.count(1)
        self._used: defaultdict[str, list[float]] = defaultdict(list)
        self._closed: dict[str, float] = {}
        self._session: ClientSession | None = None

    # --- people and workspaces ---

    def workspace(self, team: str = "T1", **more: Any) -> Workspace:
        made = Workspace(team, f"xoxb-{team}-secret", f"B{team}", more.pop("name", f"Space {team}"), **more)
        self.workspaces[team] = made
        return made

    def ts(self) -> str:
        return f"{int(self.now)}.{next(self._tick):06d}"

    def event(self, team: str, event: dict[str, Any], *, event_id: str = "") -> dict[str, Any]:
        space = self.workspaces[team]
        return {
            "type": "event_callback",
            "team_id": team,
            "api_app_id": "A1",
            "event_id": event_id or f"Ev{next(self._tick)}",
            "event_time": int(self.now),
            "authorizations": [
                {
                    "team_id": team,
                    "enterprise_id": space.enterprise or None,
                    "user_id": space.bot,
                    "is_bot": True,
                    "is_enterprise_install": bool(space.enterprise),
                }
            ],
            "event": event,
        }

    def message(self, user: str, text: str, *, team: str = "T1", channel: str = "", **more: Any) -> dict[str, Any]:
        """An event of somebody who writes: into the DM with the bot, unless a channel is named."""
        place = channel or f"D{user}"
        kind = "im" if place[0] == "D" else "channel"
        event = {"type": "message", "channel_type": kind, "channel": place, "user": user, "text": text, "team": team}
        return self.event(team, {**event, "ts": more.pop("ts", "") or self.ts(), **more})

    def command(self, user: str, text: str, *, team: str = "T1", channel: str = "C1") -> dict[str, Any]:
        return {
            "command": "/distributary",
            "text": text,
            "team_id": team,
            "user_id": user,
            "channel_id": channel,
            "trigger_id": f"trigger.{next(self._tick)}",
            "response_url": f"{self.url}/response",
            "api_app_id": "A1",
        }

    def press(self, user: str, held: Held, label: str, *, value: str = "") -> dict[str, Any]:
        """Somebody presses a button, or a thumb ("+" or "-")."""
        if label in "+-":
            (pressed,) = [one for one in held.buttons if one["type"] == "feedback_buttons"]
            chosen = pressed["positive_button" if label == "+" else "negative_button"]
            value = value or chosen["value"]
        else:
            pressed = next(one for one in held.buttons if one["type"] == "button" and one["text"]["text"] == label)
            value = value or pressed.get("value", "")
        action = {"action_id": pressed["action_id"], "block_id": pressed["block_id"], "action_ts": self.ts()}
        return {
            "type": "block_actions",
            "team": {"id": held.team},
            "user": {"id": user, "team_id": held.team},
            "channel": {"id": held.channel},
            "message": {"ts": held.ts, **({"thread_ts": held.thread} if held.thread else {})},
            "container": {"type": "message", "message_ts": held.ts, "channel_id": held.channel},
            "trigger_id": f"trigger.{next(self._tick)}",
            "actions": [{**action, "type": pressed["type"], "value": value}],
        }

    # --- delivering events ---

    async def deliver(self, payload: dict[str, Any], *, tries: int = 4) -> object:
        """As Slack does it: until it is acknowledged, with the headers of a retry; the body of the acknowledgement."""
        for attempt in range(tries):
            answer = await self.send(payload, attempt)
            if answer is not None:
                return answer
            self.retries[payload.get("event_id", "")] += 1
            await asyncio.sleep(0.02)
        raise AssertionError(f"not acknowledged: {payload.get('type') or payload.get('command')}")

    async def send(self, payload: dict[str, Any], attempt: int = 0) -> object | None:
        """Once; None where it was not acknowledged."""
        if self.events_url:
            status, body = await self.post(*signed(payload, attempt))
            return body if status == 200 else None
        return await self._send_by_socket(payload, attempt)

    async def post(self, body: bytes | str, headers: dict[str, str]) -> tuple[int, object]:
        assert self._session is not None
        try:
            async with self._session.post(self.events_url, data=body, headers=headers) as answer:
                text = await answer.text()
                is_json = answer.content_type == "application/json" and text
                return answer.status, json.loads(text) if is_json else text
        except (ClientError, ConnectionError):
            return 0, ""

    async def _send_by_socket(self, payload: dict[str, Any], attempt: int) -> object | None:
        await self.until(lambda: any(not one.closed for one in self.sockets))
        socket = next(one for one in reversed(self.sockets) if not one.closed)
        envelope = f"env-{next(self._tick)}"
        kind = "events_api" if "event" in payload else "slash_commands" if "command" in payload else "interactive"
        waiting = self._sent[id(socket)][envelope] = asyncio.get_running_loop().create_future()
        message = {"envelope_id": envelope, "type": kind, "payload": payload, "accepts_response_payload": True}
        if attempt:
            message |= {"retry_attempt": attempt, "retry_reason": "timeout"}
        with suppress(ConnectionError):
            await socket.send_str(json.dumps(message))
        done, _ = await asyncio.wait({waiting}, timeout=3.0 if attempt else 1.0)
        return waiting.result() if done else None

    async def refresh(self, reason: str = "refresh_requested") -> None:
        """Slack lets a connection end and expects a new one."""
        for socket in [one for one in self.sockets if not one.closed]:
            await socket.send_str(json.dumps({"type": "disconnect", "reason": reason}))

    async def cut(self) -> None:
        """Every socket is gone without a word."""
        for socket in self.sockets:
            transport = socket._req.transport if socket._req else None
            if transport is not None:
                transport.abort()

    async def until(self, condition: Callable[[], object], seconds: float = 20.0) -> None:
        async with asyncio.timeout(seconds), self.changed:
            await self.changed.wait_for(condition)

    async def _tell(self) -> None:
        async with self.changed:
            self.changed.notify_all()

    # --- what is held ---

    def held(self, channel: str) -> list[Held]:
        return [one for one in self.messages.values() if one.channel == channel]

    def called(self, method: str) -> list[Call]:
        return [call for call in self.calls if call.method == method]

    def later(self, seconds: float) -> None:
        """Move the clock. Streams that have been open too long are ended by Slack."""
        self.now += seconds
        for one in self.messages.values():
            if one.streaming and self.now - one.started >= STREAM_S:
                one.streaming = False

    # --- serving ---

    @asynccontextmanager
    async def open(self, port: int = 0) -> AsyncIterator[FakeSlack]:
        app = web.Application(client_max_size=50_000_000)
        app.router.add_post("/api/{method}", self._api)
        app.router.add_get("/socket", self._socket)
        app.router.add_post("/upload/{id}", self._upload)
        app.router.add_get("/files/{id}", self._download)
        runner = web.AppRunner(app, access_log=None, handle_signals=False, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", port).start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        async with ClientSession() as self._session:
            try:
                yield self
            finally:
                for socket in self.sockets:
                    await socket.close()
                await runner.cleanup()

    async def _socket(self, request: web.Request) -> web.StreamResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        await socket.send_str(json.dumps({"type": "hello", "num_connections": 1}))
        self.sockets.append(socket)
        await self._tell()
        mine = self._sent[id(socket)]
        async for message in socket:
            if message.type == WSMsgType.TEXT:
                answer = json.loads(message.data)
                waiting = mine.pop(answer["envelope_id"], None)
                if waiting is not None and not waiting.done():
                    waiting.set_result(answer.get("payload") or "")
        for waiting in self._sent.pop(id(socket)).values():  # what was not acknowledged comes again
            if not waiting.done():
                waiting.set_result(None)
        return socket

    async def _upload(self, request: web.Request) -> web.Response:
        self.files[request.match_info["id"]] = await request.read()
        return web.Response(text="OK")

    async def _download(self, request: web.Request) -> web.Response:
        tokens = {f"Bearer {one.token}" for one in self.workspaces.values() if one.alive}
        if request.headers.get("Authorization") not in tokens:
            return web.Response(status=302, headers={"Location": "/login"})
        return web.Response(body=self.files[request.match_info["id"]])

    async def _api(self, request: web.Request) -> web.Response:
        method = request.match_info["method"]
        if request.content_type == "application/json":
            body = await request.json()
        else:
            body = dict(await request.post())
        token = request.headers.get("Authorization", "").removeprefix("Bearer ")
        self.calls.append(Call(method, token, body))
        fault = self.faults[method].popleft() if self.faults[method] else ""
        if fault == "cut":
            assert request.transport is not None
            request.transport.abort()
            return web.Response()
        if fault.isdigit():
            return web.Response(status=int(fault), text="busy", content_type="text/html")
        if fault.startswith("wait"):
            wait_s = float(fault[4:])
            self._closed[f"{token} {method}"] = self._loop_time() + wait_s
            return web.json_response(
                {"ok": False, "error": "ratelimited"}, status=429, headers={"Retry-After": fault[4:]}
            )
        if fault and fault != "lost":
            return web.json_response({"ok": False, "error": fault})
        if self._loop_time() < self._closed.get(f"{token} {method}", 0):
            self.early += 1
        if self.limits and (wait := self._over(token, method, body)):
            return web.json_response(
                {"ok": False, "error": "ratelimited"}, status=429, headers={"Retry-After": str(wait)}
            )
        answer = self._answer(method, token, body)
        await self._tell()
        if fault == "lost":  # done, and nobody is told
            assert request.transport is not None
            request.transport.abort()
        return web.json_response(answer)

    @staticmethod
    def _loop_time() -> float:
        return asyncio.get_running_loop().time()

    def _over(self, token: str, method: str, body: dict[str, Any]) -> int:
        most = rules.PER_MINUTE.get(method)
        if most is None:
            return 0
        key = f"{token} {method}" + (f" {body.get('channel')}" if method == "chat.postMessage" else "")
        now = self._loop_time()
        self._used[key] = [one for one in self._used[key] if now - one < 60]
        self._used[key].append(now)
        return 5 if len(self._used[key]) > most else 0

    def _answer(self, method: str, token: str, body: dict[str, Any]) -> dict[str, Any]:
        if method not in rules.REQUIRED:
            return no("unknown_method")
        if any(not body.get(key) and body.get(key) != 0 for key in rules.REQUIRED[method]):
            return no("invalid_arguments")
        if method == "apps.connections.open":
            return (
                {"ok": True, "url": self.url.replace("http", "ws") + "/socket"}
                if token == APP_TOKEN
                else no("invalid_auth")
            )
        if method == "oauth.v2.access":
            return self._oauth(body)
        space = next((one for one in self.workspaces.values() if one.token == token and one.alive), None)
        if space is None:
            return no("invalid_auth")
        handler = getattr(self, "_" + method.replace(".", "_"), None)
        return handler(space, body) if handler else {"ok": True}

    # --- methods ---

    def _auth_test(self, space: Workspace, body: dict[str, Any]) -> dict[str, Any]:
        org = {"is_enterprise_install": True, "enterprise_id": space.enterprise} if space.enterprise else {}
        return {"ok": True, "team_id": space.team, "user_id": space.bot, "bot_id": f"b{space.bot}", **org}

    def _oauth(self, body: dict[str, Any]) -> dict[str, Any]:
        if (body["client_id"], body["client_secret"]) != (CLIENT, CLIENT_SECRET):
            return no("bad_client_secret")
        if body.get("grant_type") == "refresh_token":
            space = next((one for one in self.workspaces.values() if one.refresh == body.get("refresh_token")), None)
            if space is None:
                return no("invalid_refresh_token")
            space.token, space.refresh = f"xoxe.xoxb-{secrets.token_hex(8)}", f"xoxe-{secrets.token_hex(8)}"
            return {"ok": True, "access_token": space.token, "refresh_token": space.refresh, "expires_in": 43200}
        space = self.codes.pop(str(body.get("code")), None)
        if space is None:
            return no("invalid_code")
        space.alive = True
        rotated = {"refresh_token": space.refresh, "expires_in": 43200} if space.refresh else {}
        return {
            "ok": True,
            "access_token": space.token,
            "token_type": "bot",
            "bot_user_id": space.bot,
            "team": {"id": space.team, "name": space.name},
            "enterprise": {"id": space.enterprise, "name": space.name} if space.enterprise else None,
            "is_enterprise_install": bool(space.enterprise),
            **rotated,
        }

    def _chat_postMessage(self, space: Workspace, body: dict[str, Any]) -> dict[str, Any]:
        wrong = self._wrong(body)
        if wrong:
            return no(wrong)
        if body.get("unfurl_links") is not False or body.get("unfurl_media") is not False:
            return no("would_unfurl")  # not Slack's: this app never wants it
        channel = f"D{body['channel']}" if body["channel"][0] == "U" else body["channel"]
        held = Held(space.team, channel, self.ts(), body.get("thread_ts") or "")
        self.messages[channel, held.ts] = held
        self._set(held, body)
        return {"ok": True, "channel": channel, "ts": held.ts}

    def _chat_update(self, space: Workspace, body: dict[str, Any]) -> dict[str, Any]:
        held = self._mine(space, body)
        if held is None:
            return no("message_not_found")
        if held.streaming:
            return no("streaming_state_conflict")
        wrong = self._wrong(body)
        if wrong:
            return no(wrong)
        self._set(held, body)
        held.files = list(body.get("file_ids") or held.files)
        return {"ok": True, "channel": held.channel, "ts": held.ts}

    def _chat_startStream(self, space: Workspace, body: dict[str, Any]) -> dict[str, Any]:
        if body["channel"][0] != "D" and not body.get("recipient_user_id"):
            return no("missing_recipient_user_id")
        if body["channel"][0] != "D" and not body.get("recipient_team_id"):
            return no("missing_recipient_team_id")
        held = Held(space.team, body["channel"], self.ts(), body["thread_ts"], streaming=True, streamed=True)
        held.started = self.now
        self.messages[held.channel, held.ts] = held
        held.text = streamed_text(body)
        return {"ok": True, "channel": held.channel, "ts": held.ts}

    def _chat_appendStream(self, space: Workspace, body: dict[str, Any]) -> dict[str, Any]:
        held, text = self._mine(space, body), streamed_text(body)
        if held is None:
            return no("message_not_found")
        if not held.streaming:
            return no("message_not_in_streaming_state")
        if not text:
            return no("no_text")
        if len(text) > rules.MARKDOWN:
            return no("msg_too_long")
        held.text += text
        held.history.append(held.text)
        return {"ok": True, "channel": held.channel, "ts": held.ts}

    def _chat_stopStream(self, space: Workspace, body: dict[str, Any]) -> dict[str, Any]:
        held, text = self._mine(space, body), streamed_text(body)
        if held is None:
            return no("message_not_found")
        if not held.streaming:
            return no("message_not_in_streaming_state")
        if len(text) > rules.MARKDOWN:
            return no("msg_too_long")
        if "blocks" in body and (wrong := rules.wrong_blocks(body["blocks"])):
            return no(wrong)
        held.text += text
        held.blocks = body.get("blocks") or []
        held.streaming = False
        held.history.append(held.text)
        return {"ok": True, "channel": held.channel, "ts": held.ts}

    def _views_publish(self, space: Workspace, body: dict[str, Any]) -> dict[str, Any]:
        if body["view"]["type"] != "home" or len(body["view"]["blocks"]) > 100:
            return no("invalid_arguments")
        wrong = rules.wrong_blocks(body["view"]["blocks"])
        if wrong:
            return no(wrong)
        self.homes[space.team, body["user_id"]] = body["view"]
        return {"ok": True}

    def _files_info(self, space: Workspace, body: dict[str, Any]) -> dict[str, Any]:
        if body["file"] not in self.files:
            return no("file_not_found")
        return {"ok": True, "file": {"id": body["file"], "url_private_download": f"{self.url}/files/{body['file']}"}}

    def _files_getUploadURLExternal(self, space: Workspace, body: dict[str, Any]) -> dict[str, Any]:
        made = f"F{next(self._tick)}"
        return {"ok": True, "file_id": made, "upload_url": f"{self.url}/upload/{made}"}

    def _mine(self, space: Workspace, body: dict[str, Any]) -> Held | None:
        held = self.messages.get((body["channel"], body["ts"]))
        return held if held is not None and held.team == space.team else None

    def _wrong(self, body: dict[str, Any]) -> str:
        if body.get("markdown_text") and (body.get("blocks") or body.get("text")):
            return "markdown_text_conflict"
        if not (body.get("text") or body.get("blocks") or body.get("markdown_text")):
            return "no_text"
        if len(body.get("text") or "") > rules.TEXT:
            return "msg_too_long"
        return rules.wrong_blocks(body["blocks"]) if "blocks" in body else ""

    def _set(self, held: Held, body: dict[str, Any]) -> None:
        held.text, held.blocks = body.get("text", ""), body.get("blocks") or []
        held.history.append(held.said)


def streamed_text(body: dict[str, Any]) -> str:
    chunks = body.get("chunks") or []
    return (body.get("markdown_text") or "") + "".join(one.get("text", "") for one in chunks)


def no(error: str) -> dict[str, Any]:
    return {"ok": False, "error": error}


def signed(payload: dict[str, Any], attempt: int = 0, secret: str = SIGNING) -> tuple[str, dict[str, str]]:
    """A request as Slack makes it: events as JSON, commands and presses as forms."""
    if "event" in payload or payload.get("type") == "url_verification":
        body, kind = json.dumps(payload), "application/json"
    elif "command" in payload:
        body, kind = urlencode(payload), "application/x-www-form-urlencoded"
    else:
        body, kind = urlencode({"payload": json.dumps(payload)}), "application/x-www-form-urlencoded"
    headers = sign(body, secret) | {"Content-Type": kind}
    if attempt:
        headers |= {"X-Slack-Retry-Num": str(attempt), "X-Slack-Retry-Reason": "http_error"}
    return body, headers


def sign(body: str, secret: str = SIGNING, at: int = 0) -> dict[str, str]:
    verifier = SignatureVerifier(secret)
    stamp = str(at or int(verifier.clock.now()))
    signature = verifier.generate_signature(timestamp=stamp, body=body)
    assert signature is not None
    return {"X-Slack-Request-Timestamp": stamp, "X-Slack-Signature": signature}
