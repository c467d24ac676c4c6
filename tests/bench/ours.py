"""Our engine through its protocol: requests submitted at once, events timed as they come."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from core.config.sections import EngineSettings, ModelSettings
from core.engine.diagnostics.benchmark import stats_between
from core.engine.local import LocalEngine
from core.engine.protocol import Delta, Request, Scope, Started
from core.engine.runtime.loading import load_for_serving
from core.types import AdapterRef, Message, Role, Sampling
from tests.bench.worker import Case, Spec, serve


def make(spec: Spec):
    settings = ModelSettings(name=spec.folder, device="cpu", quantization=os.environ.get("QUANTIZATION", "none"))
    # On a thread that ends, see LocalEngine.__aenter__.
    with ThreadPoolExecutor(1) as loader:
        model = loader.submit(load_for_serving, settings, Path(spec.folder), threads=spec.threads).result()
    model = dataclasses.replace(model, eos_ids=frozenset())  # every answer has 64 tokens
    refs = [AdapterRef(sha256=str(i), folder=Path(folder), label=f"a{i}@1") for i, folder in enumerate(spec.adapters)]
    loop = asyncio.new_event_loop()
    bounds = EngineSettings(max_rows=32, max_context=1024, threads=spec.threads)
    engine = loop.run_until_complete(LocalEngine(settings, bounds, Path(spec.folder), model=model).__aenter__())

    def request(row: int, case: Case) -> Request:
        return Request(
            id=str(row),
            messages=(Message(Role.USER, spec.texts[row]),),
            sampling=Sampling(max_tokens=spec.new_tokens),
            adapter=refs[row % case["adapters"]] if case["adapters"] else None,
            scope=Scope(partner=str(row), channel=str(row)),
        )

    async def one(row: int, case: Case, began: float) -> tuple[float, list[float]]:
        first, gaps, last = 0.0, [], 0.0
        async for event in engine.submit(request(row, case)):
            now = time.perf_counter()
            if isinstance(event, Started):
                assert event.prompt_tokens == len(spec.prompts[row])
            if isinstance(event, Delta):
                if last:
                    gaps.append(now - last)
                first, last = first or now - began, now
        return first, gaps

    async def all_rows(case: Case) -> dict[str, Any]:
        before, began = engine.stats(), time.perf_counter()
        heard = await asyncio.gather(*(one(row, case, began) for row in range(case["rows"])))
        seconds = time.perf_counter() - began
        gaps = sorted(gap for _, found in heard for gap in found)
        firsts = sorted(first for first, _ in heard)
        return {
            "seconds": seconds,
            "ttft_p50_s": round(firsts[len(firsts) // 2], 4),
            "ttft_p95_s": round(firsts[len(firsts) * 95 // 100], 4),
            "gap_p50_s": round(gaps[len(gaps) // 2], 4),
            "gap_p95_s": round(gaps[len(gaps) * 95 // 100], 4),
            "padding_waste": round(stats_between(before, engine.stats()).padding_waste, 3),
        }

    return lambda case: loop.run_until_complete(all_rows(case))


if __name__ == "__main__":
    serve(make)
