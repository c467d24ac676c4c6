"""Every request of any mix equals PEFT's `set_adapter` and greedy `generate`, token for token."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch

from core.config.sections import EngineSettings, ModelSettings
from core.engine.local import LocalEngine
from core.engine.runtime.loading import load_for_serving
from core.model.base import BaseModel
from core.model.chat_format import render
from core.types import AdapterRef, Message, Role
from tests.support.engine_dialogue import Heard, ask, hear, is_blank, running
from tests.support.tiny import peft_answers, save_adapter

pytestmark = pytest.mark.slow

N = 24


def prompts(base: BaseModel, texts: list[str]) -> list[tuple[int, ...]]:
    return [render([Message(Role.USER, text)], base.tokenizer, 400).ids for text in texts]


def text_of(base: BaseModel, ids: list[int]) -> str:
    ids = [i for i in ids if i not in base.eos_ids]
    return str(base.tokenizer.decode(ids, skip_special_tokens=True)).rstrip("\ufffd")


def spy_answers(engine: LocalEngine) -> dict[str, list[int]]:
    """The ids of every answer by request id, as the model thread draws them."""
    answers: dict[str, list[int]] = {}
    accept = engine.thread._emit_token

    def show(state: Any, token: int) -> Any:
        answers.setdefault(state.request.id, []).append(token)
        return accept(state, token)

    engine.thread._emit_token = show  # type: ignore[method-assign]
    return answers


async def test_any_mix_arriving_at_any_time_equals_peft_one_by_one(base: BaseModel, adapters: list[AdapterRef]) -> None:
    refs: list[AdapterRef | None] = [None, *adapters, adapters[0], None, *adapters]
    texts = [f"{i} " + "long question " * (7 * i % 15) for i in range(len(refs))]
    expected = peft_answers(base, refs, prompts(base, texts), N)
    async with running(base, max_rows=4) as engine:
        engine.thread.chunk = 50  # prompts take several steps, and share some
        answers = spy_answers(engine)
        async with asyncio.TaskGroup() as group:
            tasks = []
            for ref, text in zip(refs, texts, strict=True):
                tasks.append(group.create_task(hear(engine.submit(ask(text, adapter=ref, max_tokens=N)))))
                await asyncio.sleep(0.01)  # join while others are in the middle
        assert [answers[text] for text in texts] == expected
        assert [task.result().text for task in tasks] == [text_of(base, ids) for ids in expected]
        assert is_blank(engine.thread.runner.cache)
    assert len({tuple(ids) for ids in expected}) == len(expected)  # the adapters do change the answers


async def test_an_answer_does_not_depend_on_other_rows(base: BaseModel, adapters: list[AdapterRef]) -> None:
    """Canaries: one request alone, and the same among floods of every other adapter."""
    async with running(base, max_rows=8, reuse_mib=0) as engine:
        for canary in (None, adapters[1]):
            alone = await hear(engine.submit(ask("canary", adapter=canary, max_tokens=N)))
            crowd = [engine.submit(ask(f"crowd {i}", adapter=adapters[i % 4], max_tokens=N)) for i in range(7)]
            among = await hear(engine.submit(ask("canary", adapter=canary, max_tokens=N)))
            await asyncio.gather(*map(hear, crowd))
            assert among == Heard(alone.text, among.deltas, alone.started, alone.finished)


async def test_more_adapters_than_rows_come_and_go(base: BaseModel, adapters: list[AdapterRef]) -> None:
    texts = [f"turn {i}" for i in range(10)]
    refs: list[AdapterRef | None] = [adapters[i * 3 % 4] for i in range(10)]
    expected = peft_answers(base, refs, prompts(base, texts), 8)
    async with running(base, max_rows=2, adapters_in_memory=2) as engine:
        answers = spy_answers(engine)
        requests = [ask(text, adapter=ref, max_tokens=8) for text, ref in zip(texts, refs, strict=True)]
        await asyncio.gather(*(hear(engine.submit(request)) for request in requests))
        assert [answers[text] for text in texts] == expected
        assert engine.stats().resident_adapters <= 2


async def test_base_with_adapters_resident_is_the_base_bit_for_bit(base: BaseModel, adapters: list[AdapterRef]) -> None:
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.inference_mode():
        before = base.module(input_ids=ids).logits
        async with running(base) as engine:
            await asyncio.gather(*(hear(engine.submit(ask("x", adapter=ref))) for ref in adapters))
            assert engine.thread.runner.lora.stacks
            assert torch.equal(base.module(input_ids=ids).logits, before)
        assert torch.equal(base.module(input_ids=ids).logits, before)


async def test_a_seed_gives_the_same_text_alone_and_in_a_batch(base: BaseModel, adapters: list[AdapterRef]) -> None:
    async with running(base) as engine:
        request = ask("dice", adapter=adapters[0], temperature=1.0, top_p=0.9, seed=11)
        alone = await hear(engine.submit(request))
        crowd = [engine.submit(ask(f"{i}", adapter=adapters[i % 4], temperature=1.0, seed=i)) for i in range(7)]
        assert (await hear(engine.submit(request))).text == alone.text
        await asyncio.gather(*map(hear, crowd))


@pytest.mark.timeout(120)
async def test_the_demo_model_with_an_adapter_equals_peft(tmp_path: Path, demo_cache: Path) -> None:
    model = load_for_serving(ModelSettings(), demo_cache)
    ref = save_adapter(model, tmp_path / "small", seed=1, std=0.02, r=4, target_modules=["q_proj", "down_proj"])
    texts = ["What is a river?", "Name three colours."]
    expected = peft_answers(model, [ref, None], prompts(model, texts), 8)
    async with LocalEngine(ModelSettings(), EngineSettings(), demo_cache, model=model) as engine:
        answers = spy_answers(engine)
        requests = [ask(texts[0], adapter=ref, max_tokens=8), ask(texts[1], max_tokens=8)]
        await asyncio.gather(*(hear(engine.submit(request)) for request in requests))
    assert [answers[text] for text in texts] == expected
