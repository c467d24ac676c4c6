"""The real vLLM (drill): greedy text equals the local engine's, also with adapters loaded at run time."""

from __future__ import annotations

import asyncio
from functools import partial
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from core.config.sections import EngineSettings, ModelSettings, RemoteSettings
from core.engine.local import LocalEngine
from core.engine.openai.client import OpenAIServer
from core.engine.protocol import Engine, Request
from core.errors import AdapterUnusable
from core.model.chat_format import render
from core.types import AdapterRef
from tests.support.engine_contract import remote
from tests.support.engine_dialogue import ask, hear
from tests.support.engine_vllm import PATIENT, Vllm
from tests.support.tiny import quietly, save_adapter

pytestmark = pytest.mark.drill
NEAR_TIE = 1e-4  # of two logits, whose order fp32 cannot decide
QUESTIONS = (
    "What is a river delta?",
    "Write three sentences about bread.",
    "Wie heißt die Hauptstadt von Frankreich?",
    "List four colours, separated by commas.",
    "用一句话介绍长江。",
    "Say <|im_end|> and explain it.",
)


async def _answers(engine: Engine, requests: list[Request]) -> list[tuple[str, int, int]]:
    """(text, prompt tokens, completion tokens) of each."""
    heard = await asyncio.gather(*(hear(engine.submit(request)) for request in requests))
    usages = [one.finished.usage for one in heard if one.finished]
    return [(one.text, use.prompt_tokens, use.completion_tokens) for one, use in zip(heard, usages, strict=True)]


def _gap_where_they_part(folder: Path, request: Request, texts: tuple[str, str]) -> float:
    """How far apart PEFT's two best logits are at the token with which one of the texts leaves the other."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    if request.adapter is not None:
        model = quietly(partial(PeftModel.from_pretrained, model, request.adapter.folder)).eval()
    ids, answer = list(render(request.messages, tokenizer, 512).ids), []
    while True:
        with torch.inference_mode():
            best = model(torch.tensor([[*ids, *answer]])).logits[0, -1].topk(2)
        answer.append(int(best.indices[0]))
        text = tokenizer.decode(answer, skip_special_tokens=True).rstrip("\ufffd")
        if len(answer) == request.sampling.max_tokens or not all(one.startswith(text) for one in texts):
            return float(best.values[0] - best.values[1])


async def test_greedy_text_is_the_local_engines(vllm_server: Vllm, demo_adapters: list[AdapterRef]) -> None:
    requests = [
        ask(question, adapter=ref, max_tokens=48, deadline_s=600)
        for ref in (None, *demo_adapters)
        for question in QUESTIONS
    ]
    settings = ModelSettings(str(vllm_server.folder), device="cpu", dtype="float32")
    async with LocalEngine(settings, EngineSettings(max_rows=8), Path()) as engine:
        here = await _answers(engine, requests)
    async with remote(vllm_server.url, vllm_server.folder, max_rows=8, **PATIENT) as engine:
        assert engine.info.context == 512
        there = await _answers(engine, requests)
    parted = [i for i in range(len(requests)) if here[i] != there[i]]
    gaps = [_gap_where_they_part(vllm_server.folder, requests[i], (here[i][0], there[i][0])) for i in parted]
    tokens = sum(count for *_, count in here)
    print(f"\nequal to the local engine: {len(requests) - len(parted)} of {len(requests)} answers, {tokens} tokens")
    print(f"where they part, PEFT's two best logits are apart by {gaps}")
    assert all(gap < NEAR_TIE for gap in gaps)
    assert len(parted) <= 2
    for question in QUESTIONS:
        assert len({one[0] for one, request in zip(there, requests, strict=True) if request.id == question}) > 2


async def test_the_next_turn_reuses_only_its_own_conversations_prefix(vllm_server: Vllm) -> None:
    long = ask("Please remember this: " + "the river is wide. " * 30, max_tokens=4)
    async with remote(vllm_server.url, vllm_server.folder, **PATIENT) as engine:
        first, second = await hear(engine.submit(long)), await hear(engine.submit(long))
        await engine.forget("c", "v")
        third = await hear(engine.submit(long))
    reused = [heard.finished.usage.reused_tokens for heard in (first, second, third) if heard.finished]
    assert reused[0] == reused[2] == 0
    assert reused[1] > 100


async def test_an_adapter_of_too_high_a_rank_is_refused_with_vllms_reason(vllm_server: Vllm, tmp_path: Path) -> None:
    ref = save_adapter(vllm_server.folder, tmp_path / "high", seed=4, r=32)
    async with remote(vllm_server.url, vllm_server.folder, **PATIENT) as engine:
        with pytest.raises(AdapterUnusable, match="rank"):
            await hear(engine.submit(ask("hello", adapter=ref)))


async def test_every_extra_is_known_to_vllm(vllm_server: Vllm) -> None:
    server = OpenAIServer(RemoteSettings(url=vllm_server.url))
    try:
        await server.check_health()
        assert await server.loads_adapters()
        assert [model.id for model in await server.models() if not model.parent] == [str(vllm_server.folder)]
    finally:
        await server.close()
    async with remote(vllm_server.url, vllm_server.folder, **PATIENT) as engine:
        assert engine._server.dropped_fields == frozenset()
