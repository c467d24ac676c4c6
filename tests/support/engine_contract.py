"""Engines for the contract tests: local, scripted, remote over the fake server, remote over the real vLLM."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from core.config.sections import EngineSettings, ModelSettings, RemoteSettings
from core.engine.local import LocalEngine
from core.engine.openai.remote import RemoteEngine
from core.engine.protocol import Engine, Request
from core.engine.scripted import ScriptedEngine
from core.model.base import BaseModel
from core.types import AdapterRef
from tests.fakes.openai import FakeOpenAI
from tests.support.engine_dialogue import ask
from tests.support.waiting import DEADLINE_S

LONG = "Tell me a long story about a river and its branches."  # an answer to it does not end by itself


@dataclass
class Subject:
    """`open` takes max_rows and max_waiting. Without `adapters` the engine takes any, unseen.

    `running_there` is what a server behind the engine runs.
    """

    name: str
    open: Callable[..., AbstractAsyncContextManager[Engine]]
    adapters: list[AdapterRef] = field(default_factory=list)
    running_there: Callable[[], Awaitable[int]] | None = None

    def long(self, **options: Any) -> Request:
        return ask(LONG, **{"max_tokens": 300, "deadline_s": 600.0, **options})


def local(model: BaseModel, adapters: list[AdapterRef]) -> Subject:
    endless = dataclasses.replace(model, eos_ids=frozenset())

    def make(**settings: Any) -> LocalEngine:
        return LocalEngine(ModelSettings(), EngineSettings(**settings), Path(), model=endless)

    return Subject("local", make, adapters)


def scripted() -> Subject:
    def answer(request: Request) -> str:
        return " ".join(f"{request.messages[-1].text[:4]}{i}" for i in range(1000))

    return Subject("scripted", lambda **settings: ScriptedEngine(answer, delay_s=0.002, **settings))


def over_fake(model: BaseModel, adapters: list[AdapterRef]) -> Subject:
    fake = FakeOpenAI(model.tokenizer)

    @asynccontextmanager
    async def make(**settings: Any) -> AsyncIterator[RemoteEngine]:
        async with fake.open(), remote(fake.url, model.folder, **settings) as engine:
            yield engine
        assert fake.violations == []

    async def running_there() -> int:
        return fake.running

    return Subject("remote", make, adapters, running_there)


def remote(url: str, folder: Path, **settings: Any) -> RemoteEngine:
    return RemoteEngine(ModelSettings(str(folder), device="cpu"), RemoteSettings(url=url, **settings), folder)


async def eventually(condition: Callable[[], Awaitable[bool]], limit_s: float = DEADLINE_S) -> None:
    async with asyncio.timeout(limit_s):
        while not await condition():  # noqa: ASYNC110 - the engine tells nobody
            await asyncio.sleep(0.005)
