"""Engines by name: ours, and those that other packages install as entry points of the group `distributary.engines`.

An entry point names a callable from `EngineContext` to a core.engine.protocol.Engine that is not yet entered.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.metadata import entry_points
from pathlib import Path

from core.config.sections import ModelSettings, RemoteSettings
from core.engine.protocol import Engine
from core.errors import BadConfig
from core.model.demo import Progress
from core.model.onednn import keep_few_kernels

GROUP = "distributary.engines"
METHODS = ("info", "submit", "forget", "stats", "drain", "__aenter__", "__aexit__")


@dataclass(frozen=True, slots=True)
class EngineContext:
    """What an engine is built from: the tables [model] and [engine] of the configuration.

    `cache` is a folder for converted or downloaded models. `progress` is called from any thread with the fraction done
    and what is being done.
    """

    model: ModelSettings
    settings: RemoteSettings
    cache: Path
    progress: Progress | None = None
    script: str = ""


EngineFactory = Callable[[EngineContext], Engine]


def check(kind: str) -> None:
    """Raises BadConfig if no engine of that name is installed."""
    names = [*BUILT_IN, *(entry.name for entry in entry_points(group=GROUP))]
    if kind not in names:
        near = get_close_matches(kind, names, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise BadConfig(detail=f"engine.kind = {kind!r} is not one of the installed engines: {', '.join(names)}{hint}")


def make_engine(kind: str, context: EngineContext) -> Engine:
    """The engine of that name. torch is imported only if the engine needs it.

    Raises BadConfig if no engine of that name is installed, or an installed one cannot be loaded.
    """
    check(kind)
    if kind in BUILT_IN:
        return BUILT_IN[kind](context)
    installed = {entry.name: entry for entry in entry_points(group=GROUP)}
    try:
        factory: EngineFactory = installed[kind].load()
        engine = factory(context)
    except BadConfig:
        raise
    except Exception as error:  # third-party code may raise anything
        why = f"{type(error).__name__}: {error}"
        raise BadConfig(detail=f"engine.kind = {kind!r}: {installed[kind].value} cannot be used: {why}") from error
    if missing := [name for name in METHODS if name not in dir(engine)]:
        raise BadConfig(detail=f"engine.kind = {kind!r}: {installed[kind].value} has no {', '.join(missing)}")
    return engine


def _local(context: EngineContext) -> Engine:
    keep_few_kernels()  # read when torch is imported
    from core.engine.local import LocalEngine

    return LocalEngine(context.model, context.settings, context.cache, progress=context.progress)


def _remote(context: EngineContext) -> Engine:
    from core.engine.openai.remote import RemoteEngine

    return RemoteEngine(context.model, context.settings, context.cache, progress=context.progress)


def _scripted(context: EngineContext) -> Engine:
    from core.engine.scripted import ScriptedEngine

    return ScriptedEngine.from_file(Path(context.script)) if context.script else ScriptedEngine()


BUILT_IN: Mapping[str, EngineFactory] = {"local": _local, "remote": _remote, "scripted": _scripted}
