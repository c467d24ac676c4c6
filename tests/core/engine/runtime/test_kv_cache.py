"""Slots of rows: memory that costs nothing until it is written, rows of unlike lengths, and few new layouts."""

from __future__ import annotations

import asyncio
import dataclasses
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from core.engine.cpu.lazy_zeros import lazy_zeros, lazy_zeros_available
from core.engine.runtime.kv_cache import FIRST_LENGTH, SlotCache
from core.engine.runtime.runner import Runner
from core.model.base import BaseModel
from tests.core.engine.runtime.test_fused import made
from tests.support.engine_dialogue import ask, hear, running

MIB = 2**20
PAGE = 4096


def resident() -> int:
    """Bytes of memory that this process holds."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * PAGE


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux hands out memory so")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_untouched_zeros_hold_what_was_written_and_give_it_back(dtype: torch.dtype) -> None:
    assert lazy_zeros_available()
    before = resident()
    zeros = lazy_zeros((64, 8 * MIB // dtype.itemsize), dtype)
    assert resident() - before < 16 * MIB
    zeros[3] = 1
    zeros[:, :7] = 2  # a little of each row
    assert 8 * MIB <= resident() - before < 24 * MIB
    part = zeros[3, 7:99]
    assert bool((part == 1).all())
    assert not zeros[2, 7:].any()
    del zeros
    assert bool((part == 1).all())  # a view keeps it
    del part
    assert resident() - before < 16 * MIB


def test_more_than_the_system_may_promise_is_a_memory_error() -> None:
    with pytest.raises(MemoryError):
        lazy_zeros((2**46,), torch.float32)


def rows_of(lengths: list[int], segment_cost: int | None) -> SlotCache:
    cache = SlotCache(1, max_rows=8, max_length=4096, segment_cost=segment_cost)
    for length in lengths:
        cache.used[cache.add_row(length + 1)] = length
    return cache


def cost_of(sizes: list[int], lengths: list[int], segment_cost: int) -> int:
    rest, cost = list(lengths), 0
    for size in sizes:
        cost += segment_cost + size * max(rest[:size])
        rest = rest[size:]
    return cost


def partitions(count: int) -> list[list[int]]:
    if not count:
        return [[]]
    return [[first, *rest] for first in range(1, count + 1) for rest in partitions(count - first)]


@given(
    st.lists(st.sampled_from([0, 1, 60, 64, 200, 2000]) | st.integers(0, 4000), min_size=1, max_size=7),
    st.sampled_from([0, 1, 500, 10_000]),
)
def test_no_other_segments_of_a_step_would_read_less(lengths: list[int], segment_cost: int) -> None:
    cache = rows_of(lengths, segment_cost)
    segments = cache.begin(0, [1] * len(lengths), torch.device("cpu"))
    sizes = [segment.rows for segment in segments]
    assert [segment.first for segment in segments] == [sum(sizes[:i]) for i in range(len(sizes))]
    assert sum(sizes) == len(lengths)
    least = min(cost_of(one, lengths, segment_cost) for one in partitions(len(lengths)))
    assert cost_of(sizes, lengths, segment_cost) == least


def test_one_long_row_is_read_apart() -> None:
    lengths = [100, 130, 2000, 90, 120]
    segments = rows_of(lengths, 512).begin(0, [1] * 5, torch.device("cpu"))
    assert [(segment.first, segment.rows, segment.length) for segment in segments] == [
        (0, 2, 144),
        (2, 1, 2016),
        (3, 2, 128),
    ]
    assert len(rows_of(lengths, None).begin(0, [1] * 5, torch.device("cpu"))) == 1


@torch.inference_mode()
def test_rows_read_apart_give_the_numbers_of_rows_read_together(tmp_path: Path) -> None:
    model = made("Qwen3", tmp_path)
    found = []
    for segment_cost in (None, 0):
        runner = Runner(model, max_rows=6, context=256)
        runner.cache.segment_cost = segment_cost
        for row, length in enumerate((20, 21, 200, 19, 90, 150)):
            runner.cache.add_row()
            runner.run(row, [[(3 + 7 * row + 5 * j) % 250 + 3 for j in range(length)]], [None])
        steps = [runner.run(0, [[9 + row + step] for row in range(6)], [None] * 6).clone() for step in range(3)]
        found.append(torch.stack(steps))
    together, apart = found
    assert float((apart - together).abs().max()) <= 1e-5 * float(together.abs().max())


def test_a_new_layout_is_made_for_rows_and_length_at_once_and_with_room_to_go_on() -> None:
    cache = rows_of([100, 100], None)
    version = cache.version
    cache.used[cache.add_row(2000)] = 1999
    assert cache.version == version + 1
    cache.reserve(2001)
    cache.add_row()
    assert cache.version == version + 1
    assert cache.capacity == (4, 2048)
    assert 2000 % FIRST_LENGTH


@pytest.mark.skipif(not lazy_zeros_available(), reason="slots grow here")
async def test_a_long_prompt_among_running_rows_lays_out_nothing_anew(base: BaseModel) -> None:
    endless = dataclasses.replace(base, eos_ids=frozenset())
    async with running(endless) as engine:
        cache = engine.thread.runner.cache
        others = [engine.submit(ask(f"{i}", max_tokens=400)) for i in range(3)]
        for one in others:
            await anext(one)
        laid_out, tensors = cache.version, [tensor.data_ptr() for tensor in cache._tensors()]
        heard = await hear(engine.submit(ask("word " * 60, max_tokens=2)))
        assert heard.finished is not None
        assert heard.finished.usage.prompt_tokens > FIRST_LENGTH
        assert engine.stats().running == 3
        assert cache.version == laid_out
        assert [tensor.data_ptr() for tensor in cache._tensors()] == tensors
        for one in others:
            one.cancel()
        await asyncio.gather(*(hear(one) for one in others))
        assert cache.is_blank()
