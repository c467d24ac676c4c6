"""A bot of someone else, installed beside us, is found, configured and talked through like one of ours."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from bots.plugins import find_bots
from tests.bots.terminal.test_terminal import Program

pytestmark = pytest.mark.slow

MODULE = '''
"""A bot that reads messages from one file and writes replies into another."""

import asyncio
import json
from dataclasses import dataclass
from pathlib import Path

from core.errors import BadConfig
from core.types import Address, Handle, Incoming, Kind, Lane, Receipt


@dataclass
class FileOutlet:
    file: Path
    count: int = 0

    def split(self, body):
        return (body,)

    async def open(self, to):
        self.count += 1
        return Handle(json.dumps({"to": to.reply_to, "n": self.count}))

    async def show(self, handle, text):
        pass

    async def finish(self, handle, body):
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.loads(handle)["to"] + ": " + body.text + "\\n")
        return Receipt(handle)

    async def recover(self, handle):
        return handle

    async def fail(self, handle, body):
        await self.finish(handle, body)


class FileBot:
    platform = "file"
    training_allowed = True

    def __init__(self, inbox, outbox):
        self.inbox, self.outbox = Path(inbox), Path(outbox)

    @classmethod
    def configure(cls, settings):
        if set(settings) != {"inbox", "outbox"}:
            raise BadConfig(detail="bots.file has inbox and outbox", problems="bots.file has inbox and outbox")
        return cls(**settings)

    async def run(self, door):
        door.register("file", "one", FileOutlet(self.outbox))
        for number, line in enumerate(self.inbox.read_text(encoding="utf-8").splitlines()):
            key = f"line{number}"
            to = Address("file", "one", "desk", "desk", key)
            await door.accept(Incoming(Lane.TURN, Kind.MESSAGE, to, "someone", key, key, line))
        await door.settled("file", "one")
'''
ENTRY_POINTS = "[distributary.bots]\nfile = file_bot:FileBot\nbroken = no_such_module:Bot\nnone = json:JSONDecoder\n"


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """What pip would have put into site-packages."""
    folder = tmp_path / "site"
    info = folder / "file_bot-1.0.dist-info"
    info.mkdir(parents=True)
    (folder / "file_bot.py").write_text(MODULE, encoding="utf-8")
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: file-bot\nVersion: 1.0\n", encoding="utf-8")
    (info / "entry_points.txt").write_text(ENTRY_POINTS, encoding="utf-8")
    return folder


@pytest.fixture
def program(tmp_path: Path, site: Path) -> Program:
    (tmp_path / "in.txt").write_text("hello\nwho?\n", encoding="utf-8")
    bound = '[channels.files]\nbind = ["file:one"]\n'
    table = f'[bots.file]\ninbox = "{tmp_path}/in.txt"\noutbox = "{tmp_path}/out.txt"\n'
    return Program(tmp_path, extra=bound + table, environment={"PYTHONPATH": str(site)})


def test_installed_bots_are_found_and_broken_ones_named(site, monkeypatch):
    monkeypatch.syspath_prepend(str(site))
    broken: dict[str, str] = {}
    found = find_bots(broken)
    assert {"terminal", "file"} <= set(found)
    assert set(broken) == {"broken", "none"}
    assert "no_such_module" in broken["broken"]
    assert "it has no platform, training_allowed, configure, run" in broken["none"]
    sys.modules.pop("file_bot", None)


def test_a_bot_of_someone_else_is_answered_through_the_service(program):
    ran = program.run("serve")
    assert ran.returncode == 0, ran.stderr
    assert (program.folder / "out.txt").read_text() == "line0: Hello there.\nline1: You said: who?\n"
    again = program.run("serve")  # the same updates: nothing is said twice
    assert again.returncode == 0
    assert len((program.folder / "out.txt").read_text().splitlines()) == 2
    used = json.loads(program.run("usage", "files", "--json").stdout)
    assert [row["replies"] for row in used] == [2]


def test_its_wrong_settings_are_named(tmp_path, site):
    program = Program(tmp_path, extra="[bots.file]\ninbo = 'x'\n", environment={"PYTHONPATH": str(site)})
    ran = program.run("serve")
    assert ran.returncode == 2
    assert "bots.file has inbox and outbox" in ran.stderr


def test_a_bot_that_is_not_there_or_broken_is_named_with_those_that_are(tmp_path, site):
    program = Program(tmp_path, extra="[bots.broken]\n[bots.telegrim]\n", environment={"PYTHONPATH": str(site)})
    ran = program.run("serve")
    assert ran.returncode == 2
    assert "no_such_module" in ran.stderr
    assert "telegrim" in ran.stderr
    assert "terminal" in ran.stderr


def test_serving_without_a_bot_says_what_to_add(tmp_path):
    ran = Program(tmp_path).run("serve")
    assert ran.returncode == 2
    assert "[bots." in ran.stderr
