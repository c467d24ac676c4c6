"""Slack on 127.0.0.1: workspaces, messages, streams with expiry by a movable clock, files, OAuth, both ways of events.

What it refuses, Slack refuses. Everything that was ever written is kept, so that a test can see what was doubled.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter, defaultdict, deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any
from urllib.parse import urlencode

from aiohttp import ClientError, ClientSession, WSMsgType, web
from slack_sdk.signature import SignatureVerifier

from tests.fakes.slack import rules
from tests.fakes.slack.held import SIGNING, STREAM_S, Call, Held
from tests.fakes.slack.methods import Methods, no
from tests.support.waiting import DEADLINE_S


class FakeSlack(Methods):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.limits = False
        self.early = 0
        self.faults: defaultdict[str, deque[str]] = defaultdict(deque)
        self.down = False  # every request is cut
        self.before: dict[tuple[str, int], Callable[[], Awaitable[None]]] = {}  # the nth request of a method
        self.retries: Counter[str] = Counter()
        self.sockets: list[web.WebSocketResponse] = []
        self.events_url = ""
        self.changed = asyncio.Condition()
        self._sent: defaultdict[int, dict[str, asyncio.Future[object]]] = defaultdict(dict)
        self._used: defaultdict[str, list[float]] = defaultdict(list)
        self._closed: dict[str, float] = {}
        self._session: ClientSession | None = None

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

    async def until(self, condition: Callable[[], object], seconds: float = DEADLINE_S) -> None:
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
        by_json = request.content_type == "application/json"
        body = await request.json() if by_json else dict(await request.post())
        token = request.headers.get("Authorization", "").removeprefix("Bearer ")
        self.calls.append(Call(method, token, body))
        happens = self.before.pop((method, len(self.called(method))), None)
        if happens is not None:
            await happens()
        fault = self.faults[method].popleft() if self.faults[method] else ""
        if self.down or fault == "cut":
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
        refused = method in rules.BY_FORM and by_json
        answer = no("invalid_arguments") if refused else self.answer(method, token, body)
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
