"""HTTP client of one OpenAI-compatible server: models, adapters, completions as streams.

Prompts are sent as token ids, so the server renders and tokenizes nothing. Server failures become core.errors here; the
detail names the server and what it did, and never quotes an answer.
"""

import asyncio
import logging
import math
import random
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any

import httpx2

from core.config.sections import RemoteSettings
from core.engine.openai import sse
from core.engine.openai.sse import OPTIONAL_FIELDS, Chunk, CompletionRequest
from core.errors import AppError, EngineError, Overloaded

log = logging.getLogger(__name__)

RETRY_S = (0.2, 1.0)  # before the second and third attempt
BUSY, RETRIED = (429, 503), (429, 502, 503)
BUSY_S = 5.0  # if a busy server sends no Retry-After
MAX_BUSY_S = 3600.0
MAX_RETRY_WAIT_S = 2.0  # longest Retry-After that is waited for here
LOAD_S = 120.0  # an adapter may come from a network disk
MAX_BODY = 2**22


class ServerRefused(EngineError):
    """The server answered with an error: its status and message."""

    def __init__(self, detail: str, status: int, message: str) -> None:
        super().__init__(detail=detail)
        self.status, self.message = status, message


class NotServed(ServerRefused):
    """404: the server has no model (or adapter) of that name, or no such path."""


@dataclass(frozen=True, slots=True)
class ServedModel:
    """One entry of /v1/models; adapters have a parent. `context` is 0 where the server does not tell."""

    id: str
    parent: str = ""
    context: int = 0
    owner: str = ""


class OpenAIServer:
    """`dropped_fields` are the OPTIONAL_FIELDS that the server refused during `probe`."""

    def __init__(self, settings: RemoteSettings) -> None:
        url = httpx2.URL(settings.url.rstrip("/").removesuffix("/v1"))
        self.address = f"{url.host}:{url.port or (443 if url.scheme == 'https' else 80)}"
        self.dropped_fields: frozenset[str] = frozenset()
        self._settings = settings
        # No proxies of the environment: prompts go to the configured machine and nowhere else.
        self._client = httpx2.AsyncClient(
            base_url=url,
            headers={"Authorization": f"Bearer {settings.api_key}"} if settings.api_key else {},
            timeout=httpx2.Timeout(None, connect=settings.connect_s),
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=settings.max_rows, keepalive_expiry=4),
            trust_env=False,
        )

    def __str__(self) -> str:
        return f"the server at {self.address}"

    async def close(self) -> None:
        await self._client.aclose()

    # --- models and adapters

    async def check_health(self) -> None:
        """Raises EngineError or Overloaded if the server cannot answer; one without /health is asked for its models."""
        try:
            await self._call("GET", "/health")
        except NotServed:
            await self.models()

    async def models(self) -> list[ServedModel]:
        found = (await self._call("GET", "/v1/models")).get("data")
        if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
            raise EngineError(detail=f"{self} does not list its models as an OpenAI-compatible server does")
        return [
            ServedModel(
                id=str(one.get("id", "")),
                parent=str(one.get("parent") or ""),
                context=sse.token_count(one.get("max_model_len")) or 0,
                owner=str(one.get("owned_by") or ""),
            )
            for one in found
        ]

    async def tokenize(self, model: str, text: str) -> list[int] | None:
        """Token ids of a text by the server's tokenizer; None if it has no such endpoint."""
        try:
            found = await self._call("POST", "/tokenize", {"model": model, "prompt": text, "add_special_tokens": False})
        except EngineError:
            return None
        tokens = found.get("tokens")
        return tokens if isinstance(tokens, list) else None

    async def loads_adapters(self) -> bool:
        """Whether the server loads adapters at run time."""
        try:
            await self._call("GET", "/v1/load_lora_adapter")
        except NotServed:
            return False
        except EngineError:  # 405: the path exists, but takes only POST
            return True
        return True

    async def load_adapter(self, name: str, path: str) -> None:
        """Have the server load an adapter's folder, at a path of its own file system. Raises EngineError with its
        message.
        """
        try:
            await self._call("POST", "/v1/load_lora_adapter", {"lora_name": name, "lora_path": path}, limit_s=LOAD_S)
        except ServerRefused as error:
            if "already" not in error.message:  # another request has loaded it meanwhile
                raise

    # --- completions

    @asynccontextmanager
    async def stream(self, completion: CompletionRequest) -> AsyncIterator[AsyncIterator[Chunk]]:
        """The answer's chunks. Leaving early closes the connection, on which the server drops the request.

        Nothing is retried once an answer has begun. Raises EngineError, NotServed, ServerRefused or Overloaded, on
        entering or out of the iteration.
        """
        by = asyncio.get_running_loop().time() + self._settings.first_token_s
        try:
            body = sse.body(completion, self.dropped_fields)
        except ValueError as error:
            raise EngineError(detail=f"{self} {error}") from None
        response = await self._send("POST", "/v1/completions", body, by)
        try:
            kind = response.headers.get("content-type", "").partition(";")[0]
            if kind != "text/event-stream":
                raise EngineError(detail=f"{self} answers with {kind[:60] or 'nothing'} in the place of a stream")
            async with (
                aclosing(response.aiter_bytes()) as parts,
                aclosing(sse.events(parts)) as events,
                aclosing(self._chunks(events, completion, by)) as chunks,
            ):
                yield chunks
        finally:
            await response.aclose()

    async def probe(self, completion: CompletionRequest) -> None:
        """Request one answer to learn which OPTIONAL_FIELDS the server takes. Raises as `stream` does."""
        while True:
            try:
                async with self.stream(completion) as chunks:
                    async for _ in chunks:
                        pass
                return
            except ServerRefused as error:
                left = [extra for extra in OPTIONAL_FIELDS if extra not in self.dropped_fields]
                drop = [extra for extra in left if extra in error.message] or left[:1]
                if error.status not in (400, 422) or not drop:
                    raise
                self.dropped_fields |= set(drop)
                log.warning("server.fields_dropped", extra={"server": self.address, "fields": ", ".join(drop)})

    async def _chunks(
        self, events: AsyncIterator[str], completion: CompletionRequest, by: float
    ) -> AsyncGenerator[Chunk]:
        loop = asyncio.get_running_loop()
        began = finished = False
        tokens: int | None = None
        while True:
            try:
                async with asyncio.timeout_at(by):
                    data = await anext(events, None)
                if data is None or data == "[DONE]":
                    break
                chunk = self._chunk(data, completion, tokens or 0)
            except TimeoutError:
                silence = self._settings.next_token_s if began else self._settings.first_token_s
                raise EngineError(detail=f"{self} said nothing for {silence:g} s") from None
            except (httpx2.HTTPError, httpx2.StreamError) as error:
                raise self._cut(tokens) from error
            except ValueError as error:
                raise EngineError(detail=f"{self} {error}") from None
            tokens = tokens if chunk.completion_tokens is None else chunk.completion_tokens
            began, finished = True, finished or bool(chunk.finish)
            by = loop.time() + self._settings.next_token_s
            yield chunk
        if not finished:
            raise self._cut(tokens)
        if tokens is None:
            raise EngineError(detail=f"{self} does not tell usage (stream_options.include_usage): it cannot be charged")

    def _chunk(self, data: str, completion: CompletionRequest, tokens: int) -> Chunk:
        event = sse.read_object(data)
        if error := event.get("error"):
            code = error.get("code") if isinstance(error, dict) else None
            raise self._failure(code if isinstance(code, int) else 500, sse.error_message(event), completion.model)
        return sse.read_chunk(event, completion, tokens)

    def _cut(self, tokens: int | None) -> EngineError:
        return EngineError(detail=f"{self} cut the stream in the middle of an answer, after {tokens or 0} tokens")

    # --- HTTP

    async def _call(
        self, method: str, path: str, body: Mapping[str, Any] | None = None, limit_s: float = 0.0
    ) -> dict[str, Any]:
        """A whole JSON response; {} where it is not an object."""
        by = asyncio.get_running_loop().time() + (limit_s or self._settings.next_token_s)
        response = await self._send(method, path, body, by)
        try:
            text = await self._read(response, by)
        finally:
            await response.aclose()
        return sse.read_object(text)

    async def _send(self, method: str, path: str, body: Mapping[str, Any] | None, by: float) -> httpx2.Response:
        """The response of status 200, its body unread, to be closed by the caller. Transient failures are retried."""
        waits = iter(RETRY_S)
        while True:
            try:
                async with asyncio.timeout_at(by):
                    request = self._client.build_request(method, path, json=body)
                    response = await self._client.send(request, stream=True)
            except TimeoutError:
                raise EngineError(detail=f"{self} did not answer {method} {path} in time") from None
            except httpx2.TransportError as error:
                failure: AppError = EngineError(detail=f"{self} cannot be reached: {_why(error)}")
                retry_after_s = 0.0
            else:
                if response.status_code == 200:
                    return response
                failure = await self._refusal(response, str((body or {}).get("model", path)), by)
                retry_after_s = _retry_after_s(response.headers) or 0.0
                if response.status_code not in RETRIED:
                    raise failure
            wait_s = next(waits, None)
            if wait_s is None or retry_after_s > MAX_RETRY_WAIT_S:
                raise failure
            log.info("server.retry", extra={"server": self.address, "why": failure.detail})
            await asyncio.sleep(max(retry_after_s, wait_s * random.uniform(0.75, 1.25)))  # noqa: S311 - spread, no secret

    async def _refusal(self, response: httpx2.Response, model: str, by: float) -> AppError:
        """The error for a response of another status than 200."""
        try:
            text = await self._read(response, by)
        finally:
            await response.aclose()
        message = sse.error_message(sse.read_object(text)) or " ".join(text.split())[: sse.MAX_MESSAGE]
        return self._failure(response.status_code, message, model, _retry_after_s(response.headers))

    async def _read(self, response: httpx2.Response, by: float) -> str:
        found = b""
        try:
            async with asyncio.timeout_at(by):
                async for part in response.aiter_bytes():
                    found += part
                    if len(found) > MAX_BODY:
                        raise EngineError(detail=f"{self} sent an answer longer than {MAX_BODY} bytes")
        except (TimeoutError, httpx2.HTTPError) as error:
            raise EngineError(detail=f"{self} cut an answer: {_why(error)}") from None
        return found.decode("utf-8", "replace")

    def _failure(self, status: int, message: str, model: str, retry_after_s: float | None = None) -> AppError:
        if status in BUSY:
            return Overloaded(detail=f"{self} is busy ({status}): {message}", retry_after_s=retry_after_s or BUSY_S)
        if status in (401, 403):
            return ServerRefused(f"{self} refuses the key ({status}): set engine.api_key", status, message)
        if status == 404:
            return NotServed(f"{self} does not serve {model[:80]!r}: {message}", status, message)
        return ServerRefused(f"{self} refused ({status}): {message}", status, message)


def _why(error: Exception) -> str:
    return str(error) or type(error).__name__


def _retry_after_s(headers: Mapping[str, str]) -> float | None:
    """Seconds of a Retry-After header, which may be a date (RFC 9110, 10.2.3)."""
    value = headers.get("retry-after", "")
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(value).timestamp() - time.time()
        except ValueError:
            return None
    return min(max(seconds, 1.0), MAX_BUSY_S) if math.isfinite(seconds) else None
