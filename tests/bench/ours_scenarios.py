"""What our engine promises of single moments, measured through its protocol on the demo model, fp32.

turn_10      first token of a conversation's tenth turn, beside that of a first turn with as many new tokens
long_prompt  the longest gap of 16 running rows while a prompt of 2,000 tokens comes in, beside one chunk alone
scale        1,000 requests over 64 adapters with room for 16, beside the same over 16; memory
flood        waits of five calm partners beside one that floods 100 to 1 through 50 channels
"""

from __future__ import annotations

import asyncio
import dataclasses
import random
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from itertools import pairwise
from pathlib import Path
from statistics import harmonic_mean, median
from typing import Any

from core.config.sections import EngineSettings, ModelSettings
from core.engine.diagnostics.benchmark import random_adapters
from core.engine.local import LocalEngine
from core.engine.protocol import Delta, Finished, Request, Scope, Started
from core.engine.runtime.loading import load_for_serving
from core.errors import Overloaded
from core.model.base import BaseModel
from core.model.chat_format import render
from core.types import AdapterRef, Message, Role, Sampling
from tests.bench.worker import Case, Spec, serve

QUESTION = "And what happens to the river after that, when the snow melts and the rain comes down from the hills?"


@dataclasses.dataclass
class Heard:
    """Seconds from submit to the row and to the first text; the text; tokens of prompt and answer."""

    wait_s: float = 0.0
    first_s: float = 0.0
    text: str = ""
    prompt: int = 0
    reused: int = 0
    answer: int = 0


async def hear(engine: LocalEngine, request: Request) -> Heard:
    began, heard = time.perf_counter(), Heard()
    async for event in engine.submit(request):
        now = time.perf_counter() - began
        if isinstance(event, Started):
            heard.wait_s, heard.prompt, heard.reused = now, event.prompt_tokens, event.reused_tokens
        elif isinstance(event, Delta):
            heard.first_s, heard.text = heard.first_s or now, heard.text + event.text
        elif isinstance(event, Finished):
            heard.answer = event.usage.completion_tokens
    return heard


def ask(text: str | list[Message], scope: Scope, tokens: int, adapter: AdapterRef | None = None) -> Request:
    messages = (Message(Role.USER, text),) if isinstance(text, str) else tuple(text)
    return Request("", messages, Sampling(max_tokens=tokens), adapter, scope, deadline_s=600.0)


def p95(values: list[float]) -> float:
    return sorted(values)[len(values) * 95 // 100]


class Scenarios:
    def __init__(self, spec: Spec, model: BaseModel) -> None:
        self.spec, self.model = spec, model

    @asynccontextmanager
    async def engine(self, **bounds: int) -> AsyncIterator[LocalEngine]:
        settings = EngineSettings(threads=self.spec.threads, **bounds)
        async with LocalEngine(ModelSettings(), settings, Path(self.spec.folder), model=self.model) as engine:
            await hear(engine, ask("warm", Scope(), 4))
            yield engine

    def text_of(self, tokens: int) -> str:
        """A message whose rendered prompt has as many tokens."""
        words, text = 0, "a"
        while (count := len(render([Message(Role.USER, text)], self.model.tokenizer, 4096).ids)) < tokens:
            words += max(1, (tokens - count) // 2)
            text = "a" + " river" * words
        assert count == tokens, (count, tokens)
        return text

    async def turn_10(self) -> dict[str, Any]:
        tenths, firsts = [], []
        async with self.engine(max_rows=2, max_context=2048) as engine:
            for number in range(7):
                said: list[Message] = []
                scope, before = Scope("p", "c", "u", f"talk {number}"), Heard()
                for turn in range(10):
                    said.append(Message(Role.USER, f"{number}.{turn} {QUESTION}"))
                    heard = await hear(engine, ask(said, scope, 32))
                    said.append(Message(Role.ASSISTANT, heard.text))
                    new, before = heard.prompt - before.prompt - before.answer, heard
                tenths.append(before.first_s)
                fresh = ask(self.text_of(new), Scope("p", "c", "u", f"first {number}"), 4)
                firsts.append((await hear(engine, fresh)).first_s)
        ratio = median(tenths) / median(firsts)
        return {
            "ratios": {"ttft_turn_10_vs_first": round(ratio, 2)},
            "turn_10_s": round(median(tenths), 4),
            "first_turn_s": round(median(firsts), 4),
            "new_tokens": new,
            "prompt_tokens": before.prompt,
            "taken_in": before.prompt - before.reused,
        }

    async def long_prompt(self) -> dict[str, Any]:
        text = self.text_of(2000)
        async with self.engine(max_rows=17, max_context=2176, reuse_mib=0) as engine:
            passes: list[tuple[float, int]] = []  # time of sampling, tokens of the longest part
            run, accept = engine.thread.runner.run, engine.thread._accept_logits
            size = 0

            def counted(first: int, parts: Any, slots: Any) -> Any:
                nonlocal size
                size, began = max(map(len, parts)), time.perf_counter()
                result = run(first, parts, slots)
                if len(parts) == 1:
                    alone.append((time.perf_counter() - began, size))
                return result

            def noted(jobs: Any, logits: Any) -> None:
                accept(jobs, logits)
                passes.append((time.perf_counter(), size))

            alone: list[tuple[float, int]] = []
            engine.thread.runner.run, engine.thread._accept_logits = counted, noted  # type: ignore[method-assign]
            await hear(engine, ask(text, Scope("alone"), 2))
            chunk = max(seconds for seconds, tokens in alone if tokens > 1)
            rows = [asyncio.create_task(hear(engine, ask(self.spec.texts[i], Scope(str(i)), 200))) for i in range(16)]
            while engine.stats().running < 16 or len(passes) < 40:
                await asyncio.sleep(0.01)
            passes.clear()
            await asyncio.sleep(1.0)
            quiet = len(passes)
            await hear(engine, ask(text, Scope("long"), 2))
            during = list(passes)
            for row in rows:
                row.cancel()
            await engine.drain(0.0)
        gaps = [b[0] - a[0] for a, b in pairwise(during)]
        step, worst = median(gaps[: quiet - 1]), max(gaps[quiet - 1 :])
        return {
            "ratios": {
                "worst_gap_vs_chunk": round(worst / chunk, 2),
                "worst_stretch_vs_chunk": round((worst - step) / chunk, 2),
            },
            "worst_gap_s": round(worst, 4),
            "step_of_16_s": round(step, 4),
            "chunk_alone_s": round(chunk, 4),
            "gaps_with_chunk": sum(tokens > 1 for _, tokens in during),
        }

    async def scale(self, requests: int) -> dict[str, Any]:
        """Quarters in turn, so that what else the machine does meets both alike; the first one of 64 reads them all."""
        rates: dict[int, list[float]] = {16: [], 64: []}
        resident = []
        bounds = {"max_rows": 16, "adapters_at_once": 16, "max_waiting": 1000, "max_context": 512}
        with tempfile.TemporaryDirectory() as folder:
            async with self.engine(**bounds) as engine:
                made = await asyncio.to_thread(random_adapters, Path(folder), engine.base, 8, 16)
                refs = [dataclasses.replace(made[i % 16], sha256=f"{i}") for i in range(64)]
                for _ in range(4):
                    for adapters in (16, 64):
                        rates[adapters].append(await self._many(engine, refs[:adapters], requests // 4))
                        resident.append(_resident_mib())
                stats = engine.stats()
        return {
            "ratios": {
                "scale_64_vs_16_adapters": round(harmonic_mean(rates[64]) / harmonic_mean(rates[16]), 2),
                "scale_memory_end_vs_first_quarter": round(resident[-1] / resident[1], 3),
            },
            "tokens_per_s_64": [round(rate, 1) for rate in rates[64]],
            "tokens_per_s_16": [round(rate, 1) for rate in rates[16]],
            "requests": requests,
            "answered": stats.ended["length"] - 1,  # by both
            "resident_mib": [round(one) for one in resident],
            "adapters_in_memory": stats.adapters_in_memory,
            "adapters_resident": stats.resident_adapters,
        }

    async def _many(self, engine: LocalEngine, refs: list[AdapterRef], count: int) -> float:
        """Tokens per second of so many requests, 64 tokens in, 16 out, over adapters by chance but alike each time."""
        dice, texts = random.Random(1), self.spec.texts
        began = time.perf_counter()
        requests = [
            ask(texts[i % len(texts)], Scope(f"p{i % 7}", f"c{i}"), 16, dice.choice(refs)) for i in range(count)
        ]
        heard = await asyncio.gather(*(hear(engine, one) for one in requests))
        return sum(one.answer for one in heard) / (time.perf_counter() - began)

    async def flood(self) -> dict[str, Any]:
        async with self.engine(max_rows=8, max_waiting=256, max_context=1024) as engine:
            alone = await self._calm(engine, None)
            beside = await self._calm(engine, self._flood)
            await engine.drain(0.0)
        bound = 2 * p95(alone) + 2
        return {
            "ratios": {"flood_p95_wait_vs_bound": round(p95(beside) / bound, 2)},
            "p95_wait_alone_s": round(p95(alone), 3),
            "p95_wait_beside_s": round(p95(beside), 3),
            "bound_s": round(bound, 3),
            "asked": len(beside),
        }

    async def _calm(
        self, engine: LocalEngine, flood: Callable[[LocalEngine, int], Awaitable[None]] | None
    ) -> list[float]:
        """Waits for a row of 25 requests by five partners, one a second; before each, a hundred of the flood."""
        tasks, others = [], []
        for number in range(25):
            others += [asyncio.create_task(flood(engine, number * 100 + i)) for i in range(100 if flood else 0)]
            await asyncio.sleep(1.0)
            scope = Scope(f"calm {number % 5}", "c", "u", f"{number}")
            tasks.append(asyncio.create_task(hear(engine, ask(f"Question {number}", scope, 16))))
        waits = [(await task).wait_s for task in tasks]
        for other in others:
            other.cancel()
        return waits

    async def _flood(self, engine: LocalEngine, number: int) -> None:
        with suppress(Overloaded):
            await hear(engine, ask(f"Flood {number}", Scope("flood", f"c{number % 50}", "u", f"f{number}"), 256))


def _resident_mib() -> float:
    return int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) * 4096 / 2**20


def make(spec: Spec):
    # On a thread that ends, see LocalEngine.__aenter__.
    with ThreadPoolExecutor(1) as loader:
        settings = ModelSettings(name=spec.folder, device="cpu")
        model = loader.submit(load_for_serving, settings, Path(spec.folder), threads=spec.threads).result()
    scenarios = Scenarios(spec, dataclasses.replace(model, eos_ids=frozenset()))
    loop = asyncio.new_event_loop()

    def run(case: Case) -> dict[str, Any]:
        more = {"requests": case["requests"]} if case["scenario"] == "scale" else {}
        told: dict[str, Any] = loop.run_until_complete(getattr(scenarios, case["scenario"])(**more))
        return told

    return run


if __name__ == "__main__":
    serve(make)
