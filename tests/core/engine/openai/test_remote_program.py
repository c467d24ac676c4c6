"""The program as a process, with its model on a fake vLLM: the reply is the server's and is charged."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path

import pytest

from core.model.base import BaseModel
from tests.fakes.openai import FakeOpenAI
from tests.support.paths import ROOT

pytestmark = pytest.mark.slow

CONFIG = """
[model]
name = "{folder}"
[engine]
kind = "remote"
url = "{url}/v1"
api_key = "env:MODEL_KEY"
"""


async def _run(home: Path, *arguments: str, typed: str = "") -> tuple[int | None, str, str]:
    environment = {**os.environ, "LANG": "C.UTF-8", "PYTHONPATH": str(ROOT), "MODEL_KEY": "k3y-for-the-model"}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "bots", "--home", str(home), *arguments),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=environment,
    )
    out, err = await asyncio.wait_for(process.communicate(typed.encode()), 240)
    return process.returncode, out.decode(), err.decode()


async def test_a_question_is_answered_by_the_server_and_charged(base: BaseModel, tmp_path: Path) -> None:
    fake = FakeOpenAI(base.tokenizer, api_key="k3y-for-the-model")
    async with fake.open():
        (tmp_path / "config.toml").write_text(CONFIG.format(folder=base.folder, url=fake.url), encoding="utf-8")
        status, out, err = await _run(tmp_path, "chat", typed="hello\n")
        assert (status, err) == (0, "")
        assert out.strip()
        usage = json.loads((await _run(tmp_path, "usage", "--json"))[1])
        shown = (await _run(tmp_path, "config", "show"))[1]
    assert len(fake.asked) == 2  # one at the start, to see what the server is
    charged = [(row["replies"], row["tokens_in"], row["tokens_out"]) for row in usage]
    assert charged == [(1, len(fake.asked[1]["prompt"]), fake.counted[1])]
    assert "k3y-for-the-model" not in shown


async def test_a_server_that_is_not_there_is_one_clear_line(base: BaseModel, tmp_path: Path) -> None:
    text = CONFIG.format(folder=base.folder, url="http://127.0.0.1:9")
    (tmp_path / "config.toml").write_text(text, encoding="utf-8")
    status, out, err = await _run(tmp_path, "chat", typed="hello\n")
    assert (status, out) == (1, "")
    assert "the server at 127.0.0.1:9 cannot be reached" in err
    assert "Traceback" not in err
