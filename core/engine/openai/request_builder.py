"""Requests as an OpenAI-compatible server gets them: rendered, salted, with the adapter loaded.

Prompts are rendered by the base model's own tokenizer and template and sent as token ids: the same ids that the local
engine would run and that training saw. An adapter's model id at the server is its sha256.
"""

import asyncio
import logging
import secrets
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack

from cachetools import LRUCache

from core.config.sections import RemoteSettings
from core.engine.openai.client import NotServed, OpenAIServer, ServerRefused
from core.engine.openai.sse import Chunk, CompletionRequest
from core.engine.protocol import Request, prompt_limit
from core.errors import AdapterUnusable, EngineError, PromptTooLong
from core.model.base import ModelFiles
from core.model.chat_format import RenderedPrompt, render
from core.types import AdapterRef

log = logging.getLogger(__name__)

SALTS = 10_000  # conversations whose prefixes can be reused at the server
LOADS = 2  # loads of an adapter per request: a router may send the next call to another replica
TOO_LONG = ("context length", "max_model_len")


class RequestBuilder:
    """Builds and begins requests to one server. `base` is the base model's id there."""

    def __init__(
        self, server: OpenAIServer, settings: RemoteSettings, files: ModelFiles, base: str, context: int
    ) -> None:
        self.server, self.settings, self.files = server, settings, files
        self.base, self.context = base, context
        self.adapters: set[str] = set()  # adapters that have answered
        self._salts: LRUCache[tuple[str, str], str] = LRUCache(SALTS)

    async def render(self, request: Request, workers: ThreadPoolExecutor) -> RenderedPrompt:
        limit = prompt_limit(request, self.context)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(workers, render, request.messages, self.files.tokenizer, limit)

    def build(self, request: Request, prompt: tuple[int, ...]) -> CompletionRequest:
        return CompletionRequest(
            model=self.base if request.adapter is None else request.adapter.sha256,
            prompt=prompt,
            sampling=request.sampling,
            max_tokens=min(request.sampling.max_tokens, self.context - len(prompt)),
            stop_ids=tuple(sorted(self.files.eos_ids)),
            salt=self._salt(request),
        )

    async def begin(
        self, stack: AsyncExitStack, completion: CompletionRequest, ref: AdapterRef | None
    ) -> AsyncIterator[Chunk]:
        """The answer's chunks; an adapter unknown to the server is loaded first."""
        loads = 0
        while True:
            try:
                chunks = await stack.enter_async_context(self.server.stream(completion))
            except NotServed as error:
                if ref is None:
                    raise
                if loads == LOADS:
                    raise _unusable(ref, error.detail) from error
                await self._load(ref)
                loads += 1
            except ServerRefused as error:
                if any(words in error.message for words in TOO_LONG):
                    raise PromptTooLong(tokens=len(completion.prompt), limit=self.context) from error
                if ref is not None and ref.sha256 in error.message:
                    raise _unusable(ref, error.detail) from error
                raise
            else:
                self.adapters.update([ref.sha256] if ref else [])
                return chunks

    def count(self, text: str) -> int:
        """Tokens of a text that the server did not count."""
        return len(self.files.tokenizer.encode(text, add_special_tokens=False))

    def forget(self, channel: str, conversation: str) -> None:
        """Forget the salts of a conversation, or of all of the channel's, so that the server's prefixes are never found
        again.
        """
        for key in [key for key in self._salts if key[0] == channel and conversation in ("", key[1])]:
            del self._salts[key]

    def _salt(self, request: Request) -> str:
        """Key of the server's prefix cache: no other conversation can hit this one's prefix."""
        scope = request.scope
        fresh = secrets.token_hex(16)
        if not scope.conversation:
            return fresh
        return self._salts.setdefault((scope.channel, scope.conversation), fresh)

    async def _load(self, ref: AdapterRef) -> None:
        if all(model.id != self.base for model in await self.server.models()):
            raise EngineError(detail=f"{self.server} no longer serves {self.base}: it was started anew with another")
        there = self.settings.adapters_there
        path = f"{there.rstrip('/')}/{ref.sha256}" if there else str(ref.folder.absolute())
        try:
            await self.server.load_adapter(ref.sha256, path)
        except NotServed as error:
            hint = "start it with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1, and let it see the adapters"
            raise _unusable(ref, f"{error.detail}; it does not load {path}: {hint}") from error
        except ServerRefused as error:
            raise _unusable(ref, f"{error.detail}; it was asked to load {path}") from error
        log.info("remote.adapter_loaded", extra={"adapter": ref.label or ref.sha256[:12]})


def _unusable(ref: AdapterRef, detail: str) -> AdapterUnusable:
    label = ref.label or ref.sha256[:12]
    return AdapterUnusable(detail=f"adapter {label}: {detail}", label=label)
