"""The fake server: models, adapters loaded at run time, completions as server-sent events, and every fault of them.

Its answers are made from the model's name, the prompt's ids and, unless greedy, the seed. It counts what runs, and
notices when a client hangs up.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aiohttp import web

from tests.fakes.openai.rules import Refused, check_completion

ALPHABET = "abcdefghijklmnop   .,\n" + "é界🐟ß" + "\u2028\x85"  # the last two end a line for str.splitlines
SHORT, ENDLESS = 40, "long"  # characters of an answer; a prompt with this word is answered without end


@dataclass
class Answer:
    """What the server is about to say, token by token."""

    ids: list[int]
    finish: str
    stop_reason: str | int | None = None


@dataclass
class FakeOpenAI:
    """`faults` are used up one by completion, oldest first:

    a number is the status of a refusal ("503:7" with Retry-After: 7); drop: the connection ends before an answer;
    hang, hang_midway; cut, cut_cleanly: the stream ends midway; garbage, html; error_event; no_usage; wrong_model;
    wrong_prompt_count, wrong_count; abort: a finish_reason of vLLM's own.
    """

    tokenizer: Any
    base: str = "acme/base"
    context: int = 512
    api_key: str = ""
    token_s: float = 0.001
    loads: bool = True  # VLLM_ALLOW_RUNTIME_LORA_UPDATING
    resolves: Path | None = None  # VLLM_LORA_RESOLVER_CACHE_DIR
    refuses: set[str] = field(default_factory=set)
    faults: list[str] = field(default_factory=list)
    adapters: dict[str, str] = field(default_factory=dict)  # name -> path
    port: int = 0
    url: str = ""
    asked: list[dict[str, Any]] = field(default_factory=list)
    counted: list[int] = field(default_factory=list)  # tokens of the answers that came to their end
    loaded: list[str] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)
    running: int = 0
    most_running: int = 0
    hung_up: int = 0
    healthy: bool = True

    @asynccontextmanager
    async def open(self) -> AsyncIterator[FakeOpenAI]:
        app = web.Application()
        app.router.add_get("/health", self._health)
        app.router.add_get("/v1/models", self._guarded(self._models))
        app.router.add_post("/tokenize", self._tokenize)
        app.router.add_post("/v1/completions", self._guarded(self._completions))
        if self.loads:
            app.router.add_post("/v1/load_lora_adapter", self._guarded(self._load))
        runner = web.AppRunner(
            app, access_log=None, handle_signals=False, shutdown_timeout=0.1, handler_cancellation=True
        )
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", self.port)
        await site.start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        try:
            yield self
        finally:
            await runner.cleanup()

    # --- routes

    def _guarded(self, handler: Any) -> Any:
        async def guarded(request: web.Request) -> web.StreamResponse:
            try:
                if self.api_key and request.headers.get("Authorization") != f"Bearer {self.api_key}":
                    raise Refused(401, "Unauthorized")
                return await handler(request)
            except Refused as refused:
                if refused.status in (400, 422):
                    self.violations.append(refused.message)
                return _error(refused.status, refused.message)

        return guarded

    async def _health(self, request: web.Request) -> web.Response:
        return web.Response(status=200 if self.healthy else 503)

    async def _models(self, request: web.Request) -> web.Response:
        base = {"id": self.base, "object": "model", "owned_by": "vllm", "root": self.base, "parent": None}
        cards = [{**base, "max_model_len": self.context}]
        cards += [{**base, "id": name, "root": path, "parent": self.base} for name, path in self.adapters.items()]
        return web.json_response({"object": "list", "data": cards})

    async def _tokenize(self, request: web.Request) -> web.Response:
        body = await request.json()
        ids = self.tokenizer.encode(body["prompt"], add_special_tokens=body["add_special_tokens"])
        return web.json_response({"count": len(ids), "max_model_len": self.context, "tokens": ids})

    async def _load(self, request: web.Request) -> web.Response:
        body = await request.json()
        name, path = body["lora_name"], body["lora_path"]
        if name in self.adapters:
            raise Refused(400, f"The lora adapter '{name}' has already been loaded.")
        if not (Path(path) / "adapter_config.json").is_file():
            raise Refused(404, f"Loading lora {name} failed: No adapter found for {path}")
        try:
            json.loads((Path(path) / "adapter_config.json").read_text())
        except ValueError as error:
            raise Refused(500, f"Loading lora {name} failed: {error}") from None
        self.adapters[name] = path
        self.loaded.append(name)
        return web.Response(text=f"Success: LoRA adapter '{name}' added successfully.")

    async def _completions(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.asked.append(body)
        fault = self.faults.pop(0) if self.faults else ""
        if fault.partition(":")[0].isdecimal():
            status, _, after = fault.partition(":")
            return _error(int(status), "not now", {"Retry-After": after} if after else {})
        if fault == "drop":
            assert request.transport is not None
            request.transport.abort()
            raise asyncio.CancelledError
        if fault == "html":
            return web.Response(text="<html>please log in</html>", content_type="text/html")
        check_completion(body, self.refuses, len(self.tokenizer))
        self._find(body["model"])
        if len(body["prompt"]) + body["max_tokens"] > self.context:
            raise Refused(400, f"This model's maximum context length is {self.context} tokens.")
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            return await self._stream(request, body, fault)
        except (asyncio.CancelledError, ConnectionError):
            self.hung_up += 1
            raise
        finally:
            self.running -= 1

    def _find(self, model: str) -> None:
        if model == self.base or model in self.adapters:
            return
        if self.resolves is not None and (self.resolves / model / "adapter_config.json").is_file():
            self.adapters[model] = str(self.resolves / model)
            return
        raise Refused(404, f"The model `{model}` does not exist. Valid aliases: {self.base}.")

    # --- completions

    async def _stream(self, request: web.Request, body: dict[str, Any], fault: str) -> web.StreamResponse:
        if fault == "hang":
            await asyncio.sleep(3600)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        await response.prepare(request)
        options = body.get("stream_options", {})
        usage = options.get("include_usage", False) and fault != "no_usage"
        said = done = 0
        text = ""
        answer = self._answer(body)
        for done in range(1, len(answer.ids) + 1):
            await asyncio.sleep(self.token_s)
            last = done == len(answer.ids)
            if done == 4 and fault in FAULTS_MIDWAY:
                await self._break(request, response, fault)
                return response
            whole = self.tokenizer.decode(answer.ids[:done], skip_special_tokens=True)
            text, said = whole[said:].rstrip("\ufffd"), len(whole.rstrip("\ufffd"))
            if not text and not last:
                continue
            event = self._event(body, fault)
            choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": None, "stop_reason": None}
            if last:
                choice |= {"finish_reason": answer.finish, "stop_reason": answer.stop_reason}
                choice |= {"finish_reason": "abort"} if fault == "abort" else {}
            event["choices"] = [choice]
            if usage and options.get("continuous_usage_stats"):
                event["usage"] = self._usage(body, done, fault)
            await _send(response, event)
        if usage:
            await _send(response, {**self._event(body, fault), "choices": [], "usage": self._usage(body, done, fault)})
        await response.write(b"data: [DONE]\n\n")
        self.counted.append(done)
        return response

    def _event(self, body: dict[str, Any], fault: str) -> dict[str, Any]:
        model = "other/model" if fault == "wrong_model" else body["model"]
        return {"id": "cmpl-1", "object": "text_completion", "created": 1, "model": model}

    def _usage(self, body: dict[str, Any], done: int, fault: str) -> dict[str, int]:
        prompt = len(body["prompt"]) + (fault == "wrong_prompt_count")
        done = body["max_tokens"] + 1 if fault == "wrong_count" else done
        return {"prompt_tokens": prompt, "completion_tokens": done, "total_tokens": prompt + done}

    async def _break(self, request: web.Request, response: web.StreamResponse, fault: str) -> None:
        if fault == "hang_midway":
            await asyncio.sleep(3600)
        if fault == "garbage":
            await response.write(b"data: {]\n\n")
        if fault == "error_event":
            await _send(response, {"error": {"message": "EngineCore died", "type": "InternalServerError", "code": 500}})
            await response.write(b"data: [DONE]\n\n")
        if fault == "cut":
            assert request.transport is not None
            request.transport.abort()

    def _answer(self, body: dict[str, Any]) -> Answer:
        """Pseudo-random characters, cut as vLLM cuts: the stop string that is complete first."""
        seed = body["seed"] if body["temperature"] > 0 else 0
        digest = hashlib.sha256(json.dumps([body["model"], body["prompt"], seed]).encode()).hexdigest()
        draw = random.Random(digest)
        endless = ENDLESS in self.tokenizer.decode(body["prompt"])
        count = body["max_tokens"] if endless else min(SHORT, body["max_tokens"])
        ids = self.tokenizer.encode("".join(draw.choice(ALPHABET) for _ in range(count)), add_special_tokens=False)
        eos = sorted(body.get("stop_token_ids", []))[-1:]
        ids = ids if endless else ids + eos
        stops = body.get("stop", [])
        for done in range(1, min(len(ids), body["max_tokens"]) + 1):
            text = self.tokenizer.decode(ids[:done], skip_special_tokens=True)
            found = [stop for stop in stops if stop in text]
            if found:
                keep = done if body.get("include_stop_str_in_output") else done - len(found[0].encode())
                return Answer(ids[:keep], "stop", found[0])
        if len(ids) <= body["max_tokens"]:
            return Answer(ids, "stop")
        return Answer(ids[: body["max_tokens"]], "length")


FAULTS_MIDWAY = {"hang_midway", "garbage", "error_event", "cut", "cut_cleanly"}


async def _send(response: web.StreamResponse, event: dict[str, Any]) -> None:
    await response.write(f"data: {json.dumps(event, ensure_ascii=False)}\n\n".encode())


def _error(status: int, message: str, headers: dict[str, str] | None = None) -> web.Response:
    error = {"message": message, "type": "Error", "param": None, "code": status}
    return web.json_response({"error": error}, status=status, headers=headers)
