"""KV slots: lazily allocated memory, and few reallocations."""

from __future__ import annotations

import asyncio
import dataclasses
import sys
from pathlib import Path

import pytest
import torch

from core.engine.cpu.lazy_zeros import lazy_zeros, lazy_zeros_available
from core.engine.runtime.kv_cache import FIRST_LENGTH, SlotCache
from core.model.base import BaseModel
from tests.support.engine_dialogue import ask, hear, is_blank, running

MIB = 2**20
PAGE = 4096


def resident() -> int:
    """Bytes of memory that this process holds."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * PAGE


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux hands out memory so")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lazy_zeros_use_only_written_memory_and_free_it(dtype: torch.dtype) -> None:
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


def test_more_than_the_system_overcommits_is_a_memory_error() -> None:
    with pytest.raises(MemoryError):
        lazy_zeros((2**46,), torch.float32)


def test_a_reallocation_grows_rows_and_length_at_once_with_spare_capacity() -> None:
    cache = SlotCache(1, max_rows=8, max_length=4096)
    for _ in range(2):
        cache.used[cache.add_row(101)] = 100
    version = cache.version
    cache.used[cache.add_row(2000)] = 1999
    assert cache.version == version + 1
    cache.reserve(2001)
    cache.add_row()
    assert cache.version == version + 1
    assert cache.capacity == (4, 2048)
    assert 2000 % FIRST_LENGTH


@pytest.mark.skipif(not lazy_zeros_available(), reason="slots grow here")
async def test_a_long_prompt_beside_running_rows_reallocates_nothing(base: BaseModel) -> None:
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
        assert is_blank(cache)
