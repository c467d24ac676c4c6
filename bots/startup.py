"""What a start shows: the model's loading, then which bots and channels are ready."""

import asyncio
import logging
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, SpinnerColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

from core.channels import bindings
from core.config.schema import Config
from core.engine.protocol import EngineInfo
from core.model import demo
from core.model.demo import Progress
from core.storage.database import Database

log = logging.getLogger(__name__)
LOADING_EVERY_S = 15.0


def model_title(config: Config) -> str:
    return demo.TITLE if config.model.name == "demo" else Path(config.model.name).name


@contextmanager
def loading_progress(title: str) -> Iterator[Progress]:
    """Show that a model is loading, with seconds: a bar on a terminal's standard error, else lines in the log.

    The bar is removed at the end.
    """
    if sys.stderr.isatty():
        with _bar(title) as progress:
            yield progress
    else:
        with _log_lines(title) as progress:
            yield progress


@contextmanager
def _bar(title: str) -> Iterator[Progress]:
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(30),
        TaskProgressColumn(),
        TimeElapsedColumn(),
    )
    with Bars(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task(f"{title}: loading", total=None)

        def show(fraction: float, what: str) -> None:
            done = fraction >= 1  # converted or fetched; loading follows
            description = f"{title}: {'loading' if done else what}"
            bars.update(task, completed=0 if done else fraction, description=description)
            bars.tasks[0].total = None if done else 1.0  # update() reads None as "unchanged"

        yield show


@contextmanager
def _log_lines(title: str) -> Iterator[Progress]:
    """A line at the start, at each new step and quarter of a step, and every LOADING_EVERY_S seconds."""
    started, ended, steps = time.monotonic(), threading.Event(), set[tuple[str, int]]()

    def line(**fields: str | int) -> None:
        log.info("model.loading", extra={"model": title, "seconds": round(time.monotonic() - started), **fields})

    def show(fraction: float, what: str) -> None:
        step = (what, int(fraction * 4) * 25)
        if step not in steps:
            steps.add(step)
            line(what=what, percent=step[1])

    def repeat() -> None:
        while not ended.wait(LOADING_EVERY_S):
            line()

    line()
    ticker = threading.Thread(target=repeat, name="loading", daemon=True)
    ticker.start()
    try:
        yield show
    finally:
        ended.set()
        ticker.join()


class Announcer:
    """Logs that the program is ready: the model and its device once, then each account with its channels."""

    def __init__(self, database: Database, tasks: asyncio.TaskGroup) -> None:
        self._database, self._tasks = database, tasks

    def started(self, info: EngineInfo, bots: tuple[str, ...], metrics: str) -> None:
        fields = {"model": info.model, "device": info.description, "context": info.context, "bots": ",".join(bots)}
        log.info("serve.ready", extra={**fields, "metrics": f"http://{metrics}/metrics" if metrics else "off"})

    def registered(self, platform: str, account: str) -> None:
        """To be called when a bot has connected as an account."""
        self._tasks.create_task(self._log_account(platform, account), name="ready")

    async def _log_account(self, platform: str, account: str) -> None:
        channels = await self._database.read(lambda tx: bindings.channels_of_account(tx, platform, account))
        fields = {"platform": platform, "account": account}
        if channels:
            log.info("bot.ready", extra={**fields, "channels": ",".join(channels)})
        else:
            bind = f'bind = ["{platform}:{account}"] in [channels.NAME], or /channel set bind={platform}:{account}'
            log.warning("bot.unbound", extra={**fields, "do": bind})
