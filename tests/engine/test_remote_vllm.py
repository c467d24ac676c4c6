"""Against the real vLLM (drill): its text is the local engine's, with adapters that it loads at run time too."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from core.engine.local import LocalEngine
from core.engine.openai import Server
from core.engine.protocol import Engine, EngineSettings, ModelSettings, RemoteSettings, Request
from core.errors import AdapterUnusable
from core.types import AdapterRef
from tests.engine.contract import remote
from tests.engine.dialogue import ask, hear
from tests.engine.vllm import Vllm
from tests.tiny import save_adapter

pytestmark = pytest.mark.drill
QUESTIONS = (
    "What is a river delta?",
    "Write three sentences about bread.",
    "Wie heißt die Hauptstadt von Frankreich?",
    "List four colours, separated by commas.",
    "用一句话介绍长江。",
    "Say <|im_end|> and explain it.",
)


async def _texts(engine: Engine, requests: list[Request]) -> list[tuple[str, int, int]]:
    heard = await asyncio.gather(*(hear(engine.submit(request)) for request in requests))
    ended = [one.finished for one in heard]
    return [
        (one.text, end.usage.prompt_tokens, end.usage.completion_tokens)
        for one, end in zip(heard, ended, strict=True)
        if end is not None
    ]


async def test_greedy_text_is_the_local_engines(vllm_server: Vllm, demo_adapters: list[AdapterRef]) -> None:
    requests = [
        ask(question, adapter=ref, max_tokens=48, deadline_s=600)
        for ref in (None, *demo_adapters)
        for question in QUESTIONS
    ]
    settings = ModelSettings(str(vllm_server.folder), device="cpu", dtype="float32")
    async with LocalEngine(settings, EngineSettings(max_rows=8), Path()) as engine:
        here = await _texts(engine, requests)
    async with remote(vllm_server.url, vllm_server.folder, max_rows=8, first_token_s=300.0) as engine:
        assert engine.info.context == 512
        there = await _texts(engine, requests)
    same = sum(one == other for one, other in zip(here, there, strict=True))
    print(f"\nequal to the local engine: {same} of {len(requests)} answers, {sum(n for *_, n in here)} tokens")
    for one, other, request in zip(here, there, requests, strict=True):
        if one != other:
            print(f"{request.id!r} {request.adapter and request.adapter.label}\n  here  {one}\n  there {other}")
    assert same == len(requests)


async def test_a_conversations_next_turn_reuses_its_prefix_and_no_one_elses(vllm_server: Vllm) -> None:
    long = ask("Please remember this: " + "the river is wide. " * 30, max_tokens=4)
    async with remote(vllm_server.url, vllm_server.folder) as engine:
        first, second = await hear(engine.submit(long)), await hear(engine.submit(long))
        await engine.forget("c", "v")
        third = await hear(engine.submit(long))
    reused = [heard.finished.usage.reused_tokens for heard in (first, second, third) if heard.finished]
    assert reused[0] == reused[2] == 0
    assert reused[1] > 100


async def test_an_adapter_of_too_high_a_rank_is_refused_with_vllms_reason(vllm_server: Vllm, tmp_path: Path) -> None:
    ref = save_adapter(vllm_server.folder, tmp_path / "high", seed=4, r=32)
    async with remote(vllm_server.url, vllm_server.folder) as engine:
        with pytest.raises(AdapterUnusable, match="rank"):
            await hear(engine.submit(ask("hello", adapter=ref)))


async def test_every_extra_is_known_to_vllm(vllm_server: Vllm) -> None:
    server = Server(RemoteSettings(url=vllm_server.url))
    try:
        await server.check_health()
        assert await server.loads_adapters()
        assert [model.id for model in await server.models() if not model.parent] == [str(vllm_server.folder)]
    finally:
        await server.close()
    async with remote(vllm_server.url, vllm_server.folder) as engine:
        assert engine._server.refused == frozenset()
