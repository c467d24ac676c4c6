"""`distributary serve` as an owner starts it: a configuration, a token in the environment, several bots."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

import pytest

from tests.bots.telegram.talk import ANN, LI
from tests.fakes.telegram import FakeTelegram
from tests.fakes.telegram.people import message
from tests.fakes.telegram.server import TOKEN
from tests.support.waiting import DEADLINE_S

pytestmark = pytest.mark.slow

OTHER = "7777:BBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBB"
CONFIG = """
[engine]
kind = "scripted"

[channels.acme]
title = "Acme Building"
bind = ["telegram:acme_bot"]

[channels.delta]
title = "Delta Tax"
bind = ["telegram:delta_bot"]

[bots.telegram]
token = "env:ACME_TOKEN"
api = "{api}"

[bots.second]
kind = "telegram"
token = "env:DELTA_TOKEN"
api = "{api}"
"""


async def _serve(config: Path, **environment: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "bots", "--config", str(config), "--home", str(config.parent / "home"), "serve"),
        env={**os.environ, **environment},
        stderr=asyncio.subprocess.PIPE,
    )


async def test_two_bots_are_served_and_end_by_sigterm(tmp_path: Path) -> None:
    async with FakeTelegram().open() as there:
        other = there.add_account(OTHER, "delta_bot")
        config = tmp_path / "config.toml"
        config.write_text(CONFIG.format(api=there.url))
        program = await _serve(config, ACME_TOKEN=TOKEN, DELTA_TOKEN=OTHER)
        await there.until(lambda: there.account.polling and other.polling, 60)
        there.says(ANN, "/start")
        there.update(token=OTHER, message=message(there.chat(LI.id), LI, 1, "/start"))
        await there.until(lambda: there.held(ANN.id) and "Acme Building" in there.held(ANN.id)[0].text)
        await there.until(lambda: there.held(LI.id) and "Delta Tax" in there.held(LI.id)[0].text)
        program.send_signal(signal.SIGTERM)
        async with asyncio.timeout(DEADLINE_S):
            _, said = await program.communicate()
        assert program.returncode == 0, said.decode()
        assert TOKEN not in said.decode()


async def test_a_wrong_token_is_told_with_the_way_out(tmp_path: Path) -> None:
    async with FakeTelegram().open() as there:
        config = tmp_path / "config.toml"
        config.write_text(CONFIG.format(api=there.url))
        program = await _serve(config, ACME_TOKEN=TOKEN, DELTA_TOKEN=OTHER)
        async with asyncio.timeout(DEADLINE_S):
            _, said = await program.communicate()
        assert program.returncode not in (0, None)
        assert "@BotFather" in said.decode()
        assert "BBBBBB" not in said.decode()
