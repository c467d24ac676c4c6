"""What a running job leaves of chat: inter-token time and time to the first token, with and without, in one run.

    python -m tests.bench.room --json FILE [--seconds 40]

The real engine answers people who come one after another, some at once; the real trainer runs beside it under the
supervisor's orders (nice, idle scheduling, waiting while somebody is answered). Phases without, with, without, with.
Ratios are of the 95th percentiles, each phase against the one right before it, since a machine may be slower a minute
later; the worse pair counts. `steps` says how far the job got on meanwhile.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import hashlib
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from platformdirs import user_cache_path

from bots.app import asked
from core.config.sections import EngineSettings, ModelSettings
from core.engine.local import LocalEngine
from core.engine.protocol import Delta, Request, Scope
from core.jobs.process import TrainerProcess, pause_under_load
from core.jobs.protocol import JobEvent, Progress, Spec
from core.model.demo import demo_folder
from core.types import Message, Role, Sampling
from tests.drill.gate import dump, faq

PEOPLE, PAUSE_S, TOKENS = 3, 1.0, 48
RATIOS = ("gap_p95", "ttft_p95")


def lay_out(folder: Path, model: Path) -> Path:
    job = folder / "job"
    job.mkdir()
    data = dump(faq("faq-en.jsonl"))
    (job / "data.jsonl").write_text(data, encoding="utf-8")
    sha256 = hashlib.sha256(data.encode()).hexdigest()
    spec = Spec("room", str(model), "", "data.jsonl", sha256, "room@1", ability=False, cache=str(folder / "cache"))
    dataclasses.replace(spec, hyper=dataclasses.replace(spec.hyper, rehearsal=0, epochs=20)).write(job)
    return job


async def person(engine: LocalEngine, number: int, until: float, gaps: list[float], firsts: list[float]) -> None:
    """Asks, reads the answer as it comes, thinks, asks again."""
    chance = random.Random(number)
    questions = [row["q"] for row in faq("faq-en.jsonl")]
    turn = 0
    while time.monotonic() < until:
        await asyncio.sleep(chance.expovariate(1 / PAUSE_S))
        turn += 1
        request = Request(
            id=f"{number}-{turn}-{until}",
            messages=(Message(Role.USER, chance.choice(questions)),),
            sampling=Sampling(max_tokens=TOKENS),
            scope=Scope(partner=str(number), channel=str(number)),
        )
        began = last = time.perf_counter()
        first = True
        async for event in engine.submit(request):
            if isinstance(event, Delta):
                now = time.perf_counter()
                (firsts if first else gaps).append(now - (began if first else last))
                first, last = False, now


async def phase(engine: LocalEngine, seconds: float) -> dict[str, float]:
    gaps: list[float] = []
    firsts: list[float] = []
    until = time.monotonic() + seconds
    await asyncio.gather(*(person(engine, number, until, gaps, firsts) for number in range(PEOPLE)))
    return {
        "gap_p50_s": round(quantile(gaps, 0.5), 4),
        "gap_p95_s": round(quantile(gaps, 0.95), 4),
        "ttft_p50_s": round(quantile(firsts, 0.5), 4),
        "ttft_p95_s": round(quantile(firsts, 0.95), 4),
        "answers": len(firsts),
    }


def quantile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * share))]


async def measure(seconds: float, threads: int) -> dict[str, Any]:
    model = demo_folder(user_cache_path("distributary") / "bench")
    phases: dict[str, list[dict[str, float]]] = {"without": [], "with": []}
    steps = [0]

    async def hear(event: JobEvent) -> None:
        if isinstance(event, Progress):
            steps[0] = event.step

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        settings = EngineSettings(max_rows=8, max_context=1024, threads=threads)
        async with LocalEngine(ModelSettings(name=str(model)), settings, folder) as engine:
            await phase(engine, 5)  # warms
            for _ in range(2):
                phases["without"].append(await phase(engine, seconds))
                job = folder / "job" if (folder / "job").exists() else lay_out(folder, model)
                trainer = TrainerProcess(job, folder / "log")
                running = asyncio.create_task(trainer.run(hear))
                begun = steps[0]
                while steps[0] == begun and not running.done():  # it loads and validates first
                    await asyncio.sleep(0.1)
                assert not running.done(), (folder / "log").read_text()[-2000:]
                pausing = asyncio.create_task(pause_under_load(trainer, lambda: asked(engine)))
                before = steps[0]
                phases["with"].append(await phase(engine, seconds) | {"steps": steps[0] - before})
                await trainer.stop(30)
                pausing.cancel()
                await asyncio.gather(running, pausing, return_exceptions=True)
    pairs = list(zip(phases["with"], phases["without"], strict=True))
    ratios = {key: round(max(beside[f"{key}_s"] / alone[f"{key}_s"] for beside, alone in pairs), 2) for key in RATIOS}
    return {"ratios": ratios, "phases": phases}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--seconds", type=float, default=40.0)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    given = parser.parse_args()
    text = json.dumps(asyncio.run(measure(given.seconds, given.threads)), indent=2)
    if given.json:
        given.json.write_text(text + "\n", encoding="utf-8")
    sys.stdout.write(text + "\n")


if __name__ == "__main__":
    main()
