"""The application: builds the parts in the order of their dependencies, and runs bots on them until a signal comes.

open_store    locks the home and opens the database
open_parts    adds engine, deliveries, fine-tunes and the service
run_program   opens the parts, runs the bots, drains
"""

import asyncio
import logging
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager
from dataclasses import asdict, dataclass
from itertools import chain, repeat
from pathlib import Path

from prometheus_client.core import Metric

from bots import control, metrics
from bots.plugins import find_bots
from bots.provisioning import DESK, differences, seed
from bots.shared.render import printable
from bots.startup import Announcer, loading_progress, model_title
from core.adapters import registry
from core.channels.training_permission import declare, set_exceptions
from core.chat.service import Service, ServiceSettings
from core.config.keys import nearest
from core.config.loader import bad_config, examine_file
from core.config.schema import BotTable, Config, GenerationDefaults
from core.delivery.deliveries import Deliveries
from core.engine import plugins
from core.engine.plugins import EngineContext
from core.engine.protocol import Engine
from core.errors import BadConfig, StorageError
from core.jobs.supervisor import JobSupervisor
from core.jobs.worker import TrainingSettings, WorkerContext
from core.model.demo import Progress
from core.platform import Bot
from core.storage import state
from core.storage.cipher import Cipher
from core.storage.clock import IS_RIGHT, Clock
from core.storage.database import Database
from core.storage.home import Home, Lock
from core.types import Sampling
from core.usage import ledger

log = logging.getLogger(__name__)
_CHECKED_AT_START = 64 * 2**20  # bytes: about a second
_RESTART_S = (1.0, 5.0, 15.0, 60.0)


@dataclass(frozen=True, slots=True)
class Parts:
    """The parts of a running program. `open_parts` builds them, and closes them in the opposite order."""

    config: Config
    home: Home
    database: Database
    engine: Engine
    deliveries: Deliveries
    training: JobSupervisor
    service: Service
    unchecked: bool = False  # the last stop was unclean, and the database is large: check it while serving

    async def probe(self) -> None:
        """Commit a write. Raises AppError where the store cannot."""
        await self.database.write(state.probe)

    async def metrics(self) -> list[Metric]:
        """What a scrape reports."""
        return await metrics.collect(self.config, self.database, self.engine, self.service, self.deliveries.orphans)


@asynccontextmanager
async def open_store(config: Config, home: Home) -> AsyncIterator[Database]:
    """Lock the home, open its database for writing, and create the configuration's channels if they are missing.

    Raises HomeBusy with the process that owns the home, StorageError (also for a key that is not the home's, and for a
    key whose database is gone).
    """
    home.create()
    with Lock(home):
        key = key_file(config, home)
        home.check_complete()
        cipher = Cipher.open(key, create=not home.database.exists())
        time = Clock()
        async with Database(home.database, cipher, clock=time) as database:
            await database.write(lambda tx: state.check_key(tx, key))
            await database.write(lambda tx: time.resume(tx, is_right=os.environ.get(IS_RIGHT) == "1"))
            await database.write(lambda tx: seed(tx, config))
            await database.write(lambda tx: set_exceptions(tx, config.finetune.allow_training_on))
            yield database


@asynccontextmanager
async def open_parts(config: Config, home: Home, progress: Progress | None = None) -> AsyncIterator[Parts]:
    """Open the store, load the model, build the service. Raises what open_store raises, ModelLoadFailed, BadConfig."""
    async with open_store(config, home) as database, make_engine(config, home, progress) as engine:
        await _report_differences(database, config)
        unclean = await database.write(state.mark_open)
        checked_later = unclean and home.database.stat().st_size > _CHECKED_AT_START
        if unclean and not checked_later:
            await check_books(database)
        deliveries = Deliveries(database)
        await database.write(lambda tx: registry.keep_base(tx, engine.info.fingerprint))
        finetune = config.finetune
        settings = TrainingSettings(finetune.hyper, config.finetune_presets, finetune.threads, finetune.nice)
        workers = WorkerContext(database, home, deliveries, engine.info, settings, load=lambda: asked(engine))
        training = JobSupervisor(workers)
        service = Service(database, home, engine, deliveries, training, service_settings(config))
        yield Parts(config, home, database, engine, deliveries, training, service, checked_later)
        await database.write(state.mark_closed)


async def check_books(database: Database) -> None:
    """Check the file and the ledger, as doctor does. Raises StorageError with what is broken."""
    broken = await database.read(ledger.check)
    if broken:
        raise StorageError("error.books_broken", "; ".join(broken), rules="; ".join(broken)[:500])
    log.info("books.checked")


async def _report_differences(database: Database, config: Config) -> None:
    """Report what the file sets otherwise than the database, on standard error and, without the values, in the log."""
    for one in await database.read(lambda tx: differences(tx, config)):
        log.info("config.differs", extra={"target": f"{one.group} {one.name}", "setting": one.key})
        sys.stderr.write(printable(f"distributary: {one.render('differs')}\n"))


def asked(engine: Engine) -> int:
    """Requests that run or wait."""
    stats = engine.stats()
    return stats.running + stats.waiting


def make_engine(config: Config, home: Home, progress: Progress | None) -> Engine:
    """The engine that `engine.kind` names. Raises BadConfig."""
    context = EngineContext(config.model, config.engine, home.models, progress, config.engine.script)
    return plugins.make_engine(config.engine.kind, context)


def key_file(config: Config, home: Home) -> Path:
    return Path(config.privacy.key_file).expanduser() if config.privacy.key_file else home.key_file


def service_settings(config: Config) -> ServiceSettings:
    return ServiceSettings(
        retention=config.privacy.retention,
        sampling=_sampling(config.generation),
        deadline_s=config.generation.deadline_s,
    )


def _sampling(given: GenerationDefaults) -> Sampling:
    values = asdict(given)
    values.pop("deadline_s")
    return Sampling(**values)


def load_all(file: Path | None, environment: Mapping[str, str]) -> tuple[Config, dict[str, Bot]]:
    """The configuration and its bots. Raises BadConfig with every mistake of the file and of the bots' tables."""
    config, problems = examine_file(file, environment)
    try:
        plugins.check(config.engine.kind)
    except BadConfig as error:
        problems.append(error.detail)
    named = {line.split(".")[1] for line in problems if line.startswith("bots.")}  # of a variable that is not set
    bots, wrong = examine_bots({name: table for name, table in config.bots.items() if name not in named})
    if problems := [*problems, *wrong]:
        raise bad_config(file, problems)
    return config, bots


def examine_bots(tables: Mapping[str, BotTable]) -> tuple[dict[str, Bot], list[str]]:
    """The configured bots by name, and the problems of those that cannot run."""
    broken: dict[str, str] = {}
    found = find_bots(broken, wanted={table.kind for table in tables.values()})
    bots: dict[str, Bot] = {}
    problems: list[str] = []
    for name, table in tables.items():
        if table.kind in broken:
            problems.append(f"[bots.{name}]: {broken[table.kind]}")
        elif table.kind not in found:
            installed = sorted(find_bots())
            problems.append(
                f"[bots.{name}]: no bot {table.kind!r} is installed; there are {', '.join(installed)}"
                f"{nearest(table.kind, installed)}"
            )
        else:
            try:
                bots[name] = found[table.kind].configure(table.settings)
            except BadConfig as error:
                text = str(error.fields.get("problems", error.detail or error))
                problems += text.replace(f"bots.{table.kind}", f"bots.{name}").splitlines()
    return bots, problems


# --- running ---


async def run_program(
    config: Config,
    home: Home,
    make_bots: Callable[[Parts], Awaitable[Mapping[str, Bot]]],
    *,
    drain_s: float,
    restart: bool,
) -> int:
    """Open the parts, make the bots, run them; the exit status."""
    with ExitStack() as loading:
        progress = loading.enter_context(loading_progress(model_title(config)))
        async with open_parts(config, home, progress) as parts:
            loading.close()
            return await run_bots(parts, await make_bots(parts), drain_s=drain_s, restart=restart)


async def run_bots(parts: Parts, bots: Mapping[str, Bot], *, drain_s: float, restart: bool) -> int:
    """Run until every bot has ended or a signal comes; the exit status. A second signal ends the process at once.

    With `restart` a bot that fails is started again, and the others go on; else its error ends the program.
    """
    signals = _Signals()
    runner = control.CommandRunner(parts.database, parts.home, parts.engine, parts.training)
    for bot in bots.values():
        await parts.database.write(lambda tx, bot=bot: declare(tx, bot.platform, allowed=bot.training_allowed))  # type: ignore[misc]
    parts.deliveries.register(DESK.platform, DESK.account, control.NullSink())
    async with asyncio.TaskGroup() as tasks:
        if restart:
            announcer = Announcer(parts.database, tasks)
            parts.deliveries.on_register = announcer.registered
            announcer.started(parts.engine.info, tuple(bots), parts.config.metrics.listen)
        background = [
            tasks.create_task(parts.service.run(), name="service"),
            tasks.create_task(control.serve(runner), name="control"),
        ]
        if isinstance(parts.database.clock, Clock):
            background.append(tasks.create_task(parts.database.clock.watch(), name="clock"))
        if parts.unchecked:  # its error ends the program
            background.append(tasks.create_task(check_books(parts.database), name="books"))
        if restart and parts.config.metrics.listen:
            from bots import metrics_server  # a chat in the terminal needs no HTTP

            serving = metrics_server.serve(parts.config.metrics.listen, parts.metrics, parts.probe)
            background.append(tasks.create_task(serving, name="metrics"))
        listening = [
            tasks.create_task(_keep_running(name, bot, parts.service) if restart else bot.run(parts.service), name=name)
            for name, bot in bots.items()
        ]
        stop = tasks.create_task(signals.wait(), name="signals")
        ended = tasks.create_task(_all_ended(listening), name="ended")
        await asyncio.wait({ended, stop}, return_when=asyncio.FIRST_COMPLETED)
        await parts.service.drain(drain_s)  # the bots still accept updates: those wait for the next start
        for task in [*listening, ended, stop, *background]:
            task.cancel()
    return 130 if signals.number == signal.SIGINT else 0


class _Signals:
    def __init__(self) -> None:
        self.number = 0
        self._came = asyncio.Event()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            asyncio.get_running_loop().add_signal_handler(number, self._take, number)

    def _take(self, number: int) -> None:
        if self.number:
            os._exit(128 + number)  # the second signal: unfinished work is done at the next start
        self.number = number
        self._came.set()

    async def wait(self) -> None:
        await self._came.wait()


async def _all_ended(tasks: Sequence[asyncio.Task[None]]) -> None:
    await asyncio.wait(tasks)


async def _keep_running(name: str, bot: Bot, service: Service) -> None:
    for delay_s in chain(_RESTART_S, repeat(_RESTART_S[-1])):
        try:
            await bot.run(service)
            return
        except BadConfig:
            raise
        except Exception:  # the outermost handler of a bot
            log.exception("bot.failed", extra={"bot": name, "again_in_s": delay_s})
        await asyncio.sleep(delay_s)
