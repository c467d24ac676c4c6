"""Data sets and adapters from the command line: into a home that nobody runs, and into one that somebody does."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from bots import control
from bots.app import open_store
from bots.provisioning import DESK, owner, seed
from core.commands.parser import parse
from core.config.loader import read_config
from core.config.schema import Config
from core.errors import BadInput, StorageError, UnknownThing
from core.i18n.messages import say
from core.storage.cipher import Cipher
from core.storage.database import Database
from core.storage.home import Home
from tests.bots.terminal.test_terminal import Program, read_line
from tests.support.database import write_now
from tests.support.fake_trainer import COMMAND
from tests.support.running_jobs import WAIT_S, running_jobs

pytestmark = pytest.mark.slow

ROW = b'{"word": "", "q": "a question", "a": "an answer"}\n'


@pytest.fixture
def program(tmp_path: Path) -> Program:
    made = Program(tmp_path, extra='[channels.acme]\ntitle = "Acme"\n')
    (tmp_path / "my faq.jsonl").write_bytes(ROW)
    adapter = tmp_path / "mine"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 1}))
    header = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    (adapter / "adapter_model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 4)
    return made


@contextmanager
def serving(program: Program) -> Iterator[subprocess.Popen[bytes]]:
    process = program.start("chat")
    assert process.stdin is not None
    process.stdin.write(b"hello\n")
    process.stdin.flush()
    read_line(process)
    yield process
    process.communicate(timeout=30)


def test_what_is_ordered_in_a_home_that_nobody_runs_waits_for_the_next_start(program: Program) -> None:
    ran = program.run("finetune", "my faq.jsonl", "licence=CC0", "--channel", "acme")
    assert (ran.returncode, ran.stderr) == (0, "")
    assert "my faq.jsonl" in ran.stdout
    assert say("en", "terminal.later") in ran.stdout
    assert "my faq.jsonl" in program.run("finetune", "status", "--channel", "acme").stdout
    assert "CC0" in program.run("finetune", "data").stdout
    assert program.run("finetune", "status").stdout.strip() == say("en", "training.none")
    with serving(program) as process:
        until = time.monotonic() + WAIT_S
        while "no base model" not in (told := program.run("finetune", "status", "--channel", "acme").stdout):
            assert time.monotonic() < until, told  # the scripted engine has no model: that is how far it can come
            time.sleep(0.1)
        assert process.poll() is None


def test_paths_are_those_of_who_asks_and_the_owner_of_the_home_does_it(program: Program) -> None:
    with serving(program):
        refused = program.run("adapter", "import", "mine", "--channel", "acme")
        assert refused.returncode == 2
        assert "data set" in refused.stderr
        ran = program.run("adapter", "import", "mine", "my faq.jsonl", "--channel", "acme")
        assert (ran.returncode, ran.stderr) == (0, "")
        assert "acme@1" in ran.stdout
        assert say("en", "terminal.later") not in ran.stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["adapter", "import", "nowhere.zip", "my faq.jsonl"], "nowhere.zip"),
        (["finetune", "nowhere.jsonl"], "nowhere.jsonl"),
        (["finetune", "statsu"], "/finetune status"),
        (["adapter", "list", "--channel", "acmee"], "acmee"),
        (["adapter", "compare", "acme@1", "a question"], "needs a chat"),
    ],
)
def test_what_cannot_be_done_is_said_and_the_status_is_2(program: Program, words: list[str], said: str) -> None:
    ran = program.run(*words)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert said in ran.stderr
    assert "Traceback" not in ran.stderr


async def test_a_job_from_the_command_line_is_asked_about_started_and_promoted_there(tmp_path: Path) -> None:
    (tmp_path / "faq.jsonl").write_bytes(ROW)
    async with running_jobs(tmp_path / "home", command=COMMAND) as it:
        await it.database.write(lambda tx: seed(tx, read_config({}, {})))
        it.deliveries.register(DESK.platform, DESK.account, control.NullSink())
        desk = control.CommandRunner(it.database, it.home, training=it.training)

        async def until(text: str, said: str) -> str:
            deadline = time.monotonic() + WAIT_S
            while said not in (told := (await desk.run(text, "acme")).text):
                assert time.monotonic() < deadline, told
            return told

        await desk.run(f"/finetune {tmp_path / 'faq.jsonl'}", "acme")
        asked = await until("/finetune status", "/finetune start 1")
        assert "10 of 12" in asked
        await desk.run("/finetune start 1", "acme")
        await until("/finetune status", say("en", "training.verdict_passed", label="acme@1", champion="base"))
        assert "acme@1" in (await desk.run("/adapter promote acme@1", "acme")).text
        assert not it.bot.opened


def test_the_command_line_speaks_for_the_channel_that_was_named(tmp_path: Path) -> None:
    home = Home(tmp_path)
    home.create()
    with Database(home.database, Cipher(b"k" * 32)) as database:
        config = read_config({"channels": {"acme": {}}}, {})
        write_now(database, lambda tx: seed(tx, config))
        first, second = (write_now(database, lambda tx, name=name: owner(tx, name)) for name in ("terminal", "acme"))
        assert (first.user, first.channel.name) == (second.user, "terminal")
        assert second.channel.name == "acme"
        assert first.conversation_id != second.conversation_id
        with pytest.raises(UnknownThing):
            write_now(database, lambda tx: owner(tx, "nobody"))
        write_now(database, lambda tx: tx.run("UPDATE channel SET archived_ms = 1 WHERE name = 'acme'"))
        with pytest.raises(BadInput):
            write_now(database, lambda tx: owner(tx, "acme"))
    assert parse("/adapter compare acme@1 why?").key in control._NEEDS_A_CHAT


async def test_a_home_is_not_opened_without_its_own_key(tmp_path: Path) -> None:
    home = Home(tmp_path)
    async with open_store(Config(), home):
        pass
    key = home.key_file.read_text()
    home.key_file.unlink()
    for written, expected in (("", "error.key_unreadable"), ("ab" * 32, "error.key_other")):
        if written:
            home.key_file.write_text(written)
        with pytest.raises(StorageError) as refused:
            async with open_store(Config(), home):
                pass
        assert (refused.value.key, refused.value.fields["path"]) == (expected, str(home.key_file))
    home.key_file.write_text(key)
    async with open_store(Config(), home):
        pass
