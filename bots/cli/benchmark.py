"""`distributary doctor --bench`: how fast the configured model answers here, as findings and as numbers.

It loads the model by itself, so it takes the home for as long as it runs: beside a running `serve` it would measure
two halves of a machine, and slow people's answers.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from bots.app import loading_progress, make_engine, model_title
from bots.cli.doctor import Examined, Finding, Level
from bots.control import sentence
from core.config.schema import Config
from core.engine.diagnostics.benchmark import MAX_ADAPTERS, Benchmark, Speed, measure, random_adapters
from core.engine.protocol import Engine
from core.errors import AppError, HomeBusy
from core.storage.home import Lock
from core.types import AdapterRef

_SLOW = 0.25  # of what memory allows for one reply: less is a machine that does something else


def try_out(patient: Examined) -> tuple[list[Finding], Benchmark | None]:
    """Load the model and measure it; findings, and the numbers where there are any."""
    config = patient.config
    if config is None:
        return [], None
    try:
        patient.home.create()
        with Lock(patient.home):
            trial, name = asyncio.run(_measure(patient, config))
    except HomeBusy as busy:
        where = config.metrics.listen or "[metrics] listen"
        return [patient.finding(Level.WARNING, "speed", "bench_busy", pid=busy.fields["pid"], where=where)], None
    except AppError as error:
        return [patient.finding(Level.BAD, "speed", "bench_failed", error=sentence(error))], None
    return list(_findings(patient, trial, name)), trial


async def _measure(patient: Examined, config: Config) -> tuple[Benchmark, str]:
    with ExitStack() as loading, tempfile.TemporaryDirectory() as folder:
        progress = loading.enter_context(loading_progress(model_title(config)))
        async with make_engine(config, patient.home, progress) as engine:
            loading.close()
            adapters = await asyncio.to_thread(_adapters, engine, config, Path(folder))
            trial = await measure(engine, config.engine.max_rows, adapters)
            return trial, f"{engine.info.model}, {engine.info.description}"


def _adapters(engine: Engine, config: Config, folder: Path) -> list[AdapterRef]:
    """Only this machine's own engine reads adapters from any folder."""
    base = getattr(engine, "base", None)
    count = min(config.engine.max_rows, MAX_ADAPTERS)
    return [] if base is None else random_adapters(folder, base, config.finetune.rank, count)


def _findings(patient: Examined, trial: Benchmark, name: str) -> Iterator[Finding]:
    if trial.bandwidth:
        gb = f"{trial.bandwidth / 1e9:.1f}"
        yield patient.finding(Level.GOOD, "memory", "bench_memory", gb=gb)
    speeds = {"one": f"{trial.one.tokens_per_s:.0f}", "many": f"{trial.many.tokens_per_s:.0f}"}
    yield patient.finding(Level.GOOD, "model", "bench_model", name=name, rows=trial.many.rows, **speeds)
    slow = 0 < trial.one.roofline_fraction < _SLOW
    yield _speed(patient, trial.one, "bench_slow" if slow else "bench_one")
    yield _speed(patient, trial.many, "bench_many")
    if trial.adapted is not None:
        less = 1 - trial.adapted.tokens_per_s / trial.many.tokens_per_s
        yield _speed(patient, trial.adapted, "bench_adapted", adapters=trial.adapted.adapters, less=round(100 * less))


def _speed(patient: Examined, speed: Speed, key: str, **more: int) -> Finding:
    return patient.finding(
        Level.WARNING if key == "bench_slow" else Level.GOOD,
        "speed",
        key,
        rows=speed.rows,
        rate=f"{speed.tokens_per_s:.0f}",
        first=f"{speed.first_token_p50_s:.2f}",
        gap=round(1000 * speed.inter_token_p50_s),
        gap95=round(1000 * speed.inter_token_p95_s),
        floor=round(100 * speed.roofline_fraction),
        waste=round(100 * speed.padding_waste),
        **more,
    )
