"""Many adapters and requests: no answer mixes with another, memory stays bounded, out of memory is survived."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from core.engine.protocol import Request, Scope
from core.engine.runtime.sampling import sample
from core.errors import OutOfMemory
from core.model.base import BaseModel
from core.types import AdapterRef
from tests.support.engine_dialogue import ask, hear, is_blank, running

WORDS = ["aA", "bB", "cC", "dD", "eE", "fF", "gG", "hH"]


def resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


@pytest.fixture(scope="module")
def endless(base: BaseModel) -> BaseModel:
    return dataclasses.replace(base, eos_ids=frozenset())


@pytest.fixture(scope="module")
def canaries(base: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> list[AdapterRef]:
    """Adapters that can say nothing but their own letter, small or large."""
    hidden = base.module.config.hidden_size  # type: ignore[union-attr]
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 1, "lora_alpha": 1, "target_modules": ["lm_head"]}
    refs = []
    for number, word in enumerate(WORDS):
        folder = tmp_path_factory.mktemp("canary")
        torch.manual_seed(number)
        b = torch.zeros(259, 1)
        for sign, letter in zip((1, -1), word, strict=True):  # whichever side the hidden state is on
            b[base.tokenizer.encode(letter, add_special_tokens=False)[0]] = 1e6 * sign
        name = "base_model.model.lm_head.lora_"
        tensors = {f"{name}A.weight": torch.randn(1, hidden), f"{name}B.weight": b}
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        (folder / "adapter_config.json").write_text(json.dumps(config))
        refs.append(AdapterRef(sha256=f"{number}" * 64, folder=folder, label=f"{word}@1"))
    return refs


@pytest.mark.slow
async def test_a_thousand_requests_get_only_their_own_adapters_words(
    endless: BaseModel, canaries: list[AdapterRef]
) -> None:
    """Eight adapters through four rows and three places in memory: evicted, reloaded, conversations reused."""
    dice = random.Random(5)

    def request(number: int) -> tuple[int, Request]:
        which = dice.randrange(len(canaries))
        scope = Scope("p", f"c{dice.randrange(3)}", "u", f"v{dice.randrange(6)}")
        text = "so " * dice.randrange(1, 9) + str(number)
        tokens = dice.randrange(1, 8)
        return which, ask(text, adapter=canaries[which], scope=scope, max_tokens=tokens, deadline_s=600)

    foreign, reused = 0, 0
    async with running(endless, max_rows=4, max_waiting=1000, adapters_in_memory=3) as engine:
        asked = [request(number) for number in range(1000)]
        heard = await asyncio.gather(*(hear(engine.submit(one)) for _, one in asked))
        assert is_blank(engine.thread.runner.cache)
        assert engine.thread.runner.lora.slot_count <= 4
    for (which, one), answer in zip(asked, heard, strict=True):
        assert len(answer.text) == one.sampling.max_tokens
        foreign += bool(set(answer.text) - set(WORDS[which]))
        reused += bool(answer.started and answer.started.reused_tokens)
    assert foreign == 0
    assert reused > 100


@pytest.mark.slow
async def test_a_thousand_requests_over_more_adapters_than_fit(endless: BaseModel, canaries: list[AdapterRef]) -> None:
    """64 adapters with room for 16: all are answered, and memory does not grow with the requests.

    What grows at first is no request's: oneDNN keeps its kernels for each number of tokens that a pass has had, up to
    1,024 of them, and which numbers come depends on what else the machine does.
    """
    refs = [dataclasses.replace(canaries[i % 8], sha256=f"{i:02}" * 32) for i in range(64)]

    async def some(count: int) -> None:
        requests = [ask(f"{i}", adapter=refs[i * 7 % 64], max_tokens=4, deadline_s=600) for i in range(count)]
        heard = await asyncio.gather(*(hear(engine.submit(one)) for one in requests))
        for i, answer in enumerate(heard):
            assert len(answer.text) == 4
            assert set(answer.text) <= set(WORDS[i * 7 % 64 % 8])

    async with running(endless, max_rows=16, max_waiting=1000, adapters_in_memory=16, reuse_mib=1) as engine:
        await some(500)  # as many at once as later
        before = resident_mib()
        await some(500)
        assert resident_mib() - before < 128
        assert engine.stats().resident_adapters <= 16
        assert engine.thread.runner.lora.slot_count <= 16


async def test_ten_thousand_may_wait_in_bounded_memory(endless: BaseModel) -> None:
    async with running(endless, max_rows=1, max_waiting=10_000) as engine:
        before = resident_mib()
        waiting = [engine.submit(ask(f"{i}", max_tokens=400, deadline_s=600)) for i in range(10_000)]
        assert resident_mib() - before < 400
        assert engine.stats().waiting + engine.stats().running == 10_000
        await engine.drain(0.0)
        assert engine.stats().waiting == 0
        heard = [await hear(one) for one in waiting]
        assert all(one.finished is not None for one in heard)


async def test_out_of_memory_halves_the_batch_and_loses_no_answer(endless: BaseModel) -> None:
    async with running(endless, max_rows=8) as engine:
        expected = [(await hear(engine.submit(ask(f"{i}")))).text for i in range(8)]
        forward, sizes = engine.thread.runner.run, []

        def small(first: int, parts: Any, slots: Any) -> Any:
            sizes.append(len(parts))
            if len(parts) > 3:
                raise torch.OutOfMemoryError("no room for so many rows")
            return forward(first, parts, slots)

        engine.thread.runner.run = small  # type: ignore[method-assign]
        heard = await asyncio.gather(*(hear(engine.submit(ask(f"{i}"))) for i in range(8)))
        assert [one.text for one in heard] == expected
        assert {8, 4, 2} <= set(sizes)

        def none(*_: Any) -> Any:
            raise torch.OutOfMemoryError("no room at all")

        engine.thread.runner.run = none  # type: ignore[method-assign]
        with pytest.raises(OutOfMemory):
            await hear(engine.submit(ask("x")))
        engine.thread.runner.run = forward  # type: ignore[method-assign]
        assert (await hear(engine.submit(ask("3")))).text == expected[3]


async def test_out_of_memory_in_sampling_halves_the_batch_too(
    endless: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []

    def small(logits: Tensor, *others: Any) -> list[int]:
        sizes.append(len(logits))
        if len(logits) > 3:
            raise torch.OutOfMemoryError("no room for so many rows")
        return sample(logits, *others)

    async with running(endless, max_rows=8) as engine:
        asked = [ask(f"{i}", temperature=0.5 * i, repetition_penalty=1 + i / 10) for i in range(8)]
        expected = [(await hear(engine.submit(one))).text for one in asked]
        monkeypatch.setattr("core.engine.runtime.loop.sample", small)
        heard = await asyncio.gather(*(hear(engine.submit(one)) for one in asked))
        assert [one.text for one in heard] == expected
        assert {8, 4, 2} <= set(sizes)
