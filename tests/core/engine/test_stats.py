"""The engine's statistics against plain arithmetic."""

from __future__ import annotations

import asyncio
import dataclasses

import pytest
import torch
from torch import nn

from core.engine.cpu.compiled import compiled
from core.engine.cpu.int8 import Int8Linear, quantize
from core.engine.protocol import EngineStats, Scope
from core.engine.runtime.kv_cache import LENGTH_STEP
from core.engine.runtime.roofline import bandwidth, weight_bytes
from core.engine.scheduling.stats import TimeHistogram
from core.errors import BadInput
from core.model.base import BaseModel
from core.types import AdapterRef
from tests.support.engine_dialogue import ask, hear, running
from tests.support.tiny import load_tiny


@pytest.fixture
def endless(base: BaseModel) -> BaseModel:
    return dataclasses.replace(base, eos_ids=frozenset())


async def test_every_token_is_counted_once(endless: BaseModel) -> None:
    async with running(endless) as engine:
        heard = await asyncio.gather(*(hear(engine.submit(ask("x" * i, max_tokens=5 + i))) for i in range(4)))
        with pytest.raises(BadInput):
            await hear(engine.submit(ask("x", max_tokens=0)))
        stats = engine.stats()
    usages = [one.finished.usage for one in heard if one.finished]
    assert stats.generated_tokens == sum(usage.completion_tokens for usage in usages) == 26
    assert stats.prompt_tokens + stats.reused_tokens == sum(usage.prompt_tokens for usage in usages)
    assert stats.ended == {"length": 4, "BadInput": 1}
    assert stats.waited_s.count == stats.first_token_s.count == 4
    assert stats.inter_token_s.count == 26 - 4
    assert 0 < stats.waited_s.total_s <= stats.first_token_s.total_s


async def test_tokens_of_an_earlier_turn_count_as_reused(endless: BaseModel) -> None:
    scope = Scope("p", "c", "u", "v")
    async with running(endless) as engine:
        await hear(engine.submit(ask("hello there", scope=scope)))
        before = engine.stats()
        again = await hear(engine.submit(ask("hello there", scope=scope)))
        stats = engine.stats()
    assert again.started is not None
    assert stats.reused_tokens == again.started.reused_tokens > 0
    assert stats.prompt_tokens - before.prompt_tokens == again.started.prompt_tokens - again.started.reused_tokens


async def test_padding_waste_is_the_share_of_keys_read_in_vain(endless: BaseModel) -> None:
    """One prompt alone, then its tokens one by one. Passes read up to the next multiple of the step; compiled operators
    read each row as far as it goes."""
    async with running(endless) as engine:
        heard = await hear(engine.submit(ask("hello", max_tokens=60)))
        stats = engine.stats()
        assert (engine.thread.runner.layers is not None) is (compiled() is not None)
    assert heard.started is not None
    lengths = range(heard.started.prompt_tokens, heard.started.prompt_tokens + 60)  # after each pass
    padded = [-(-length // LENGTH_STEP) * LENGTH_STEP for length in lengths]
    read = sum(padded if compiled() is None else lengths)
    assert (stats.positions_held, stats.positions_read) == (sum(lengths), read)
    assert stats.padding_waste == pytest.approx(1 - sum(lengths) / read)


async def test_the_roofline_counts_weights_adapters_and_keys(endless: BaseModel, adapters: list[AdapterRef]) -> None:
    config = endless.module.config
    head_dim = config.hidden_size // config.num_attention_heads
    position = 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim * 4
    async with running(endless) as engine:
        heard = await hear(engine.submit(ask("hello", adapter=adapters[0], max_tokens=6)))
        stats = engine.stats()
        adapter = engine._adapters.get(adapters[0]).result().nbytes
    assert heard.started is not None
    held = [heard.started.prompt_tokens + i for i in range(1, 6)]  # the first token comes with the prompt
    assert stats.decode_bytes == 5 * (weight_bytes(endless.module) + adapter) + position * sum(held)
    assert stats.bandwidth == bandwidth(endless.device, torch.get_num_threads()) > 1e8
    assert 0 < stats.roofline_fraction < 1


@pytest.mark.parametrize("tied", [True, False])
def test_weights_are_counted_once_and_embeddings_only_as_a_head(tmp_path, tied: bool) -> None:
    module = load_tiny(tmp_path, tie_word_embeddings=tied).module
    embedding = module.get_input_embeddings().weight.nbytes  # type: ignore[operator, union-attr]
    whole = sum(parameter.nbytes for parameter in module.parameters())
    assert weight_bytes(module) == (whole if tied else whole - embedding)


def test_int8_weights_count_a_byte_each() -> None:
    module = nn.Sequential(nn.Linear(8, 4, bias=False), nn.Linear(4, 3, bias=False))
    quantize(module)
    assert isinstance(module[0], Int8Linear)
    assert weight_bytes(module) == 8 * 4 + 4 * 3


def test_empty_stats_have_no_waste_and_no_speed() -> None:
    assert (EngineStats().padding_waste, EngineStats().roofline_fraction) == (0.0, 0.0)


def test_times_fall_into_the_first_bucket_that_holds_them() -> None:
    times = TimeHistogram((0.1, 1.0))
    for seconds in (0.05, 0.1, 0.5, 1.0, 7.0):
        times.add(seconds)
    assert times.snapshot().counts == (2, 2, 1)
    assert times.snapshot().total_s == pytest.approx(8.65)
