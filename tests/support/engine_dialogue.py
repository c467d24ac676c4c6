"""Helpers for engine tests: make a request, read its events."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from core.config.sections import EngineSettings, ModelSettings
from core.engine.local import LocalEngine
from core.engine.protocol import Delta, Finished, Generation, Request, Scope, Started
from core.engine.runtime.kv_cache import SlotCache
from core.model.base import BaseModel
from core.types import AdapterRef, Message, Role, Sampling


@asynccontextmanager
async def running(model: BaseModel, **settings: Any) -> AsyncIterator[LocalEngine]:
    async with LocalEngine(ModelSettings(), EngineSettings(**settings), Path(), model=model) as engine:
        yield engine


def ask(
    text: str = "hello",
    *,
    adapter: AdapterRef | None = None,
    scope: Scope | None = None,
    deadline_s: float = 60.0,
    max_prompt_tokens: int = 0,
    **sampling: Any,
) -> Request:
    return Request(
        id=text,
        messages=(Message(Role.USER, text),),
        sampling=Sampling(**{"max_tokens": 24, **sampling}),
        adapter=adapter,
        scope=scope or Scope("p", "c", "u", "v"),
        deadline_s=deadline_s,
        max_prompt_tokens=max_prompt_tokens,
    )


@dataclass
class Heard:
    text: str = ""
    deltas: list[str] = field(default_factory=list)
    started: Started | None = None
    finished: Finished | None = None


async def hear(generation: Generation) -> Heard:
    heard = Heard()
    async for event in generation:
        match event:
            case Started():
                heard.started = event
            case Delta():
                heard.deltas.append(event.text)
                heard.text += event.text
            case Finished():
                heard.finished = event
    return heard


def is_blank(cache: SlotCache) -> bool:
    """Whether everything outside the used part of the running rows is zero."""
    rows, used = cache.rows, [*cache.used]
    return not any(
        bool(tensor[rows : cache.slots].any()) or any(bool(tensor[row, :, used[row] :].any()) for row in range(rows))
        for tensor in cache._tensors()
    )
