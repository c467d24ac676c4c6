"""A start shows that the model is loading, and then what is ready and for whom."""

from __future__ import annotations

import asyncio
import io
from pathlib import Path

import pytest

from bots import startup
from bots.provisioning import seed
from bots.startup import Announcer, loading_progress
from core.config.loader import read_config
from core.engine.protocol import EngineInfo
from core.storage.cipher import Cipher
from core.storage.database import Database


def test_without_a_terminal_loading_is_lines_in_the_log(written: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(startup, "LOADING_EVERY_S", 0.01)
    with loading_progress("a-model") as progress:
        progress(0.3, "weights")
        progress(0.35, "weights")
        while written.getvalue().count("model.loading") < 4:
            pass
    assert written.getvalue().count("what=weights percent=25") == 1
    assert "model.loading model=a-model seconds=0" in written.getvalue()


def test_at_a_terminal_loading_is_a_bar_with_seconds_that_goes_away(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("sys.stderr", terminal)
    with loading_progress("a-model") as progress:
        progress(0.5, "weights")
        progress(1.0, "ready")
    shown = terminal.getvalue()
    assert "a-model: loading" in shown
    assert "0:00:00" in shown


async def test_serve_logs_the_model_and_each_account_with_its_channels(written: io.StringIO, tmp_path: Path) -> None:
    config = read_config({"channels": {"acme": {"bind": ["telegram:acme_bot", "telegram:acme_bot/start=x"]}}}, {})
    async with Database(tmp_path / "db", Cipher(b"k" * 32)) as database:
        await database.write(lambda tx: seed(tx, config))
        async with asyncio.TaskGroup() as tasks:
            announcer = Announcer(database, tasks)
            announcer.started(EngineInfo("tiny", "f", "CPU, 2 threads", 512), ("first",), "127.0.0.1:9464")
            announcer.registered("telegram", "acme_bot")
            announcer.registered("telegram", "other_bot")
    told = written.getvalue()
    assert 'serve.ready model=tiny device="CPU, 2 threads" context=512 bots=first' in told
    assert "metrics=http://127.0.0.1:9464/metrics" in told
    assert "bot.ready platform=telegram account=acme_bot channels=acme" in told
    assert "WARNING bot.unbound platform=telegram account=other_bot" in told
