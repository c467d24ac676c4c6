"""Bounded benchmark of an engine through its protocol.

The same requests run with one row, with all rows, and with all rows and an adapter each (where the engine reads
adapters from folders). Speeds are generated tokens per second from the first submit to the last token, prompts
included.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from core.engine.protocol import Delta, Engine, EngineStats, Finished, Request, Scope
from core.types import AdapterRef, Message, Role, Sampling

if TYPE_CHECKING:
    from core.engine.lora.adapter_files import AdapterTarget

TOKENS = 48  # per answer
MAX_ROWS, MAX_ADAPTERS = 32, 8
DEADLINE_S = 30.0  # per part; a slower machine is measured by the tokens until then
QUESTION = "Question {number}: tell me, in as many words as you like, where rivers come from and where they go."


@dataclass(frozen=True, slots=True)
class Speed:
    """`roofline_fraction` is 0 where the engine cannot measure it; times are those of the events at the reader."""

    rows: int
    adapters: int
    tokens_per_s: float
    first_token_p50_s: float
    first_token_p95_s: float
    inter_token_p50_s: float
    inter_token_p95_s: float
    roofline_fraction: float
    padding_waste: float


@dataclass(frozen=True, slots=True)
class Benchmark:
    bandwidth: float  # bytes/s; 0 is unknown
    one: Speed
    many: Speed
    adapted: Speed | None


async def measure(engine: Engine, rows: int, adapters: Sequence[AdapterRef] = ()) -> Benchmark:
    """Warm up, then measure. Raises the requests' errors."""
    rows = min(rows, MAX_ROWS)
    await _speed(engine, 1, adapters[:1], tokens=4)
    one, many = await _speed(engine, 1), await _speed(engine, rows)
    adapted = await _speed(engine, rows, adapters) if adapters else None
    return Benchmark(engine.stats().bandwidth, one, many, adapted)


def random_adapters(folder: Path, base: AdapterTarget, rank: int, count: int = MAX_ADAPTERS) -> list[AdapterRef]:
    """Adapters of a fine-tune's size whose small weights hardly change the answers."""
    import torch
    from safetensors.torch import save_file

    from core.engine.lora.adapter_files import CONFIG, WEIGHTS

    refs = []
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": "all-linear"}
    inner = {name: shape for name, shape in base.shapes.items() if name != base.head}
    for number in range(count):
        made = folder / f"{number}"
        made.mkdir()
        torch.manual_seed(number)
        tensors = {}
        for name, (outputs, inputs) in inner.items():
            tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(rank, inputs) * 0.01
            tensors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(outputs, rank) * 0.01
        save_file(tensors, made / WEIGHTS, metadata={"format": "pt"})
        (made / CONFIG).write_text(json.dumps(config), encoding="utf-8")
        refs.append(AdapterRef(f"trial{number}", made, f"trial@{number + 1}"))
    return refs


async def _speed(engine: Engine, rows: int, adapters: Sequence[AdapterRef] = (), *, tokens: int = TOKENS) -> Speed:
    before, began = engine.stats(), time.perf_counter()
    requests = [_request(row, adapters[row % len(adapters)] if adapters else None, tokens) for row in range(rows)]
    heard = await asyncio.gather(*(_hear(engine, one, began) for one in requests))
    seconds = time.perf_counter() - began
    passes = stats_between(before, engine.stats())
    firsts = [first for first, _, _ in heard]
    gaps = [gap for _, found, _ in heard for gap in found]
    return Speed(
        rows=rows,
        adapters=len(adapters),
        tokens_per_s=sum(made for _, _, made in heard) / seconds,
        first_token_p50_s=_quantile(firsts, 0.5),
        first_token_p95_s=_quantile(firsts, 0.95),
        inter_token_p50_s=_quantile(gaps, 0.5),
        inter_token_p95_s=_quantile(gaps, 0.95),
        roofline_fraction=passes.roofline_fraction,
        padding_waste=passes.padding_waste,
    )


def _request(row: int, adapter: AdapterRef | None, tokens: int) -> Request:
    """Rows differ in their first word, so that none can reuse another's prefix."""
    messages = (Message(Role.USER, QUESTION.format(number=row)),)
    scope = Scope("trial", f"trial {row}")
    return Request(f"trial {row}", messages, Sampling(max_tokens=tokens), adapter, scope, deadline_s=DEADLINE_S)


async def _hear(engine: Engine, request: Request, began: float) -> tuple[float, list[float], int]:
    """Seconds to the first text, then between texts, and the number of tokens."""
    times: list[float] = []
    tokens = 0
    async for event in engine.submit(request):
        if isinstance(event, Delta):
            times.append(time.perf_counter() - began)
        elif isinstance(event, Finished):
            tokens = event.usage.completion_tokens
    return (times or [0.0])[0], [b - a for a, b in pairwise(times)], tokens


def stats_between(before: EngineStats, after: EngineStats) -> EngineStats:
    """The passes between two readings, for the shares that EngineStats computes."""
    return replace(
        after,
        positions_read=after.positions_read - before.positions_read,
        positions_held=after.positions_held - before.positions_held,
        decode_s=after.decode_s - before.decode_s,
        decode_bytes=after.decode_bytes - before.decode_bytes,
    )


def _quantile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))] if values else 0.0
