"""`distributary doctor --bench`: measures how fast the configured model answers, as findings and as numbers.

It loads the model itself and locks the home meanwhile: beside a running `serve` both would be slow.
"""

import asyncio
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from bots.app import make_engine
from bots.cli.doctor.findings import Finding, Level, Setup
from bots.control import sentence
from bots.startup import loading_progress, model_title
from core.config.schema import Config
from core.engine.diagnostics.benchmark import MAX_ADAPTERS, Benchmark, Speed, measure, random_adapters
from core.engine.protocol import Engine
from core.errors import AppError, HomeBusy
from core.storage.home import Lock
from core.types import AdapterRef

_SLOW = 0.25  # share of the roofline for one reply; below it something else uses the machine


def benchmark(setup: Setup) -> tuple[list[Finding], Benchmark | None]:
    """Load the model and measure it: the findings, and the numbers if the measurement succeeded."""
    config = setup.config
    if config is None:
        return [], None
    try:
        setup.home.create()
        with Lock(setup.home):
            numbers, name = asyncio.run(_measure(setup, config))
    except HomeBusy as busy:
        where = config.metrics.listen or "[metrics] listen"
        return [setup.finding(Level.WARNING, "speed", "bench_busy", pid=busy.fields["pid"], where=where)], None
    except AppError as error:
        return [setup.finding(Level.BAD, "speed", "bench_failed", error=sentence(error))], None
    return list(_findings(setup, numbers, name)), numbers


async def _measure(setup: Setup, config: Config) -> tuple[Benchmark, str]:
    with ExitStack() as loading, tempfile.TemporaryDirectory() as folder:
        progress = loading.enter_context(loading_progress(model_title(config)))
        async with make_engine(config, setup.home, progress) as engine:
            loading.close()
            adapters = await asyncio.to_thread(_adapters, engine, config, Path(folder))
            numbers = await measure(engine, config.engine.max_rows, adapters)
            return numbers, f"{engine.info.model}, {engine.info.description}"


def _adapters(engine: Engine, config: Config, folder: Path) -> list[AdapterRef]:
    """Random adapters to measure with; none for an engine that does not run on this machine."""
    base = getattr(engine, "base", None)
    count = min(config.engine.max_rows, MAX_ADAPTERS)
    return [] if base is None else random_adapters(folder, base, config.finetune.rank, count)


def _findings(setup: Setup, numbers: Benchmark, name: str) -> Iterator[Finding]:
    if numbers.bandwidth:
        gb = f"{numbers.bandwidth / 1e9:.1f}"
        yield setup.finding(Level.GOOD, "memory", "bench_memory", gb=gb)
    speeds = {"one": f"{numbers.one.tokens_per_s:.0f}", "many": f"{numbers.many.tokens_per_s:.0f}"}
    yield setup.finding(Level.GOOD, "model", "bench_model", name=name, rows=numbers.many.rows, **speeds)
    slow = 0 < numbers.one.roofline_fraction < _SLOW
    yield _speed(setup, numbers.one, "bench_slow" if slow else "bench_one")
    yield _speed(setup, numbers.many, "bench_many")
    if numbers.adapted is not None:
        less = 1 - numbers.adapted.tokens_per_s / numbers.many.tokens_per_s
        yield _speed(setup, numbers.adapted, "bench_adapted", adapters=numbers.adapted.adapters, less=round(100 * less))


def _speed(setup: Setup, speed: Speed, key: str, **more: int) -> Finding:
    return setup.finding(
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
