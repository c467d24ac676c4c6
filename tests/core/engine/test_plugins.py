"""Engines by name: built-in ones, and those of other packages."""

from __future__ import annotations

from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path

import pytest

from core.config.sections import ModelSettings, RemoteSettings
from core.engine.plugins import EngineContext, make_engine
from core.engine.protocol import Engine
from core.engine.scripted import ScriptedEngine
from core.errors import BadConfig

CONTEXT = EngineContext(ModelSettings(), RemoteSettings(url="http://localhost:1"), Path())


class EchoEngine(ScriptedEngine):
    def __init__(self, context: EngineContext) -> None:
        super().__init__(context=context.settings.max_context)


def half(context: EngineContext) -> object:
    return object()


def broken(context: EngineContext) -> Engine:
    raise RuntimeError("no licence")


@pytest.fixture(autouse=True)
def _installed(monkeypatch: pytest.MonkeyPatch) -> None:
    here = EchoEngine.__module__
    names = {"echo": f"{here}:EchoEngine", "half": f"{here}:half", "broken": f"{here}:broken", "gone": "no.such:thing"}
    found = EntryPoints(EntryPoint(name, value, "distributary.engines") for name, value in names.items())
    monkeypatch.setattr("core.engine.plugins.entry_points", lambda group: found.select(group=group))


def test_a_built_in_engine_is_made_by_name(tmp_path: Path) -> None:
    assert type(make_engine("remote", CONTEXT)).__name__ == "RemoteEngine"
    script = tmp_path / "answers.toml"
    script.write_text('hi = "yo"')
    engine = make_engine("scripted", EngineContext(ModelSettings(), RemoteSettings(), Path(), script=str(script)))
    assert isinstance(engine, ScriptedEngine)
    assert engine.answers == {"hi": "yo"}


async def test_an_installed_engine_gets_its_settings_and_answers() -> None:
    async with make_engine("echo", CONTEXT) as engine:
        assert engine.info.context == CONTEXT.settings.max_context


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("ecko", "installed engines: local, remote, scripted, echo.*did you mean echo"),
        ("half", "has no info, submit"),
        ("broken", "RuntimeError: no licence"),
        ("gone", "ModuleNotFoundError"),
    ],
)
def test_an_engine_that_cannot_be_used_is_refused_with_the_reason(kind: str, reason: str) -> None:
    with pytest.raises(BadConfig) as refused:
        make_engine(kind, CONTEXT)
    assert refused.match("engine.kind")
    assert refused.match(reason)
