"""The terminal as people and programs meet it: a real process, the scripted engine, standard input and output."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from prompt_toolkit.history import FileHistory

from bots.terminal.bot import TerminalSink
from core.channels.terminal import prune_history
from core.i18n.messages import say
from core.types import Address, Body, Handle
from tests.support.paths import ROOT

pytestmark = pytest.mark.slow

ANSWERS = {
    "hello": "Hello there.",
    "river": "# Rivers\n\nA **river** branches.\n\n- one\n- two",
    "中文": "你好，世界。",
    "count": " ".join(map(str, range(200))),
}


@dataclass
class Program:
    """`distributary` with a home of its own, started from a folder that is not the repository."""

    folder: Path
    slow: float = 0.0
    extra: str = ""
    environment: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.home = self.folder / "home"
        self.home.mkdir(exist_ok=True)
        script = self.folder / "script.json"
        script.write_text(json.dumps({"delay_s": self.slow, "answers": ANSWERS}), encoding="utf-8")
        (self.home / "config.toml").write_text(
            f'[engine]\nkind = "scripted"\nscript = "{script}"\n[limits]\nper_minute = 0\nper_hour = 0\n{self.extra}',
            encoding="utf-8",
        )

    @property
    def command(self) -> list[str]:
        return [sys.executable, "-m", "bots", "--home", str(self.home)]

    @property
    def env(self) -> dict[str, str]:
        kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
        path = os.pathsep.join([str(ROOT), self.environment.get("PYTHONPATH", "")])
        return {**kept, "LANG": "C.UTF-8", "TERM": "xterm-256color", **self.environment, "PYTHONPATH": path}

    def run(self, *arguments: str, typed: bytes | str = b"") -> subprocess.CompletedProcess[str]:
        ran = subprocess.run(
            [*self.command, *arguments],
            input=typed.encode() if isinstance(typed, str) else typed,
            capture_output=True,
            cwd=self.folder,
            env=self.env,
            timeout=60,
            check=False,
        )
        return subprocess.CompletedProcess(ran.args, ran.returncode, ran.stdout.decode(), ran.stderr.decode())

    def start(self, *arguments: str) -> subprocess.Popen[bytes]:
        pipe = subprocess.PIPE
        return subprocess.Popen(
            [*self.command, *arguments], stdin=pipe, stdout=pipe, stderr=pipe, cwd=self.folder, env=self.env
        )

    def wait_for_inbox(self) -> None:
        """Until a message is committed."""
        database_path, deadline = self.home / "distributary.db", time.monotonic() + 60
        while time.monotonic() < deadline:
            with (
                suppress(sqlite3.Error),
                closing(sqlite3.connect(f"file:{database_path}?mode=ro", uri=True)) as database,
            ):
                if database.execute("SELECT count(*) FROM inbox").fetchone()[0]:
                    return
            time.sleep(0.05)
        raise AssertionError("no message was committed")


@pytest.fixture
def program(tmp_path: Path) -> Program:
    return Program(tmp_path)


def read_line(process: subprocess.Popen[bytes]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().decode()


# --- piped ---


def test_each_line_is_answered_in_order_and_nothing_else_is_said(program):
    ran = program.run("chat", typed="hello\n中文\nwho are you\n")
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "Hello there.\n你好，世界。\nYou said: who are you\n", "")


def test_markdown_is_left_as_it_is_for_programs(program):
    assert program.run("chat", typed="river\n").stdout == ANSWERS["river"] + "\n"


@pytest.mark.parametrize("typed", ["", "\n\n  \n\r\n"])
def test_no_message_no_output(program, typed):
    ran = program.run("chat", typed=typed)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")


def test_the_last_line_needs_no_newline_and_line_ends_may_be_windows(program):
    assert program.run("chat", typed="hello\r\nhello").stdout == "Hello there.\n" * 2


def test_bytes_that_are_no_text_are_answered_all_the_same(program):
    ran = program.run("chat", typed=b"a\xff\xfe\x00b\n\xed\xa0\x80\nhello\n")
    assert ran.returncode == 0
    assert ran.stdout.count("\n") == 3
    assert ran.stdout.endswith("Hello there.\n")


def test_a_line_of_two_megabytes_is_refused_and_the_next_answered(program):
    ran = program.run("chat", typed=b"x" * 2_000_000 + b"\nhello\n")
    refusal, answer = ran.stdout.splitlines()
    assert len(refusal) < 300
    assert answer == "Hello there."


def test_commands_are_answered_too(program):
    ran = program.run("chat", typed="/help\n/nonsense\n")
    assert "/help" in ran.stdout
    assert "nonsense" in ran.stdout


def test_more_lines_than_may_wait_are_all_answered_in_order(program):
    ran = program.run("chat", typed="".join(f"line {n}\n" for n in range(100)))
    assert ran.stdout == "".join(f"You said: line {n}\n" for n in range(100))


def test_input_is_read_no_faster_than_it_is_answered(tmp_path):
    program = Program(tmp_path, slow=0.2)
    process = program.start("chat")
    assert process.stdin is not None
    os.set_blocking(process.stdin.fileno(), False)
    written = 0
    deadline = time.monotonic() + 4
    while time.monotonic() < deadline:
        try:
            written += os.write(process.stdin.fileno(), b"hello\n" * 1000)
        except BlockingIOError:
            time.sleep(0.05)
    process.kill()
    process.communicate()
    assert written < 1_000_000


def test_a_reader_that_goes_away_ends_it_quietly(program):
    process = program.start("chat")
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(b"hello\n")
    process.stdin.flush()
    assert read_line(process) == "Hello there.\n"
    process.stdout.close()
    process.stdin.write(b"hello\nhello\n")
    process.stdin.close()
    assert process.stderr is not None
    with process.stderr as said:
        assert said.read() == b""
    assert process.wait(30) == 0


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_ends_it_cleanly(program, number, status):
    process = program.start("chat")
    assert process.stdin is not None
    process.stdin.write(b"hello\n")
    process.stdin.flush()
    assert read_line(process) == "Hello there.\n"
    process.send_signal(number)
    _, said = process.communicate(timeout=30)
    assert process.returncode == status
    assert b"Traceback" not in said


def test_what_a_kill_left_unanswered_is_answered_at_the_next_start(tmp_path):
    program = Program(tmp_path, slow=0.05)
    process = program.start("chat")
    assert process.stdin is not None
    process.stdin.write(b"count\n")
    process.stdin.flush()
    program.wait_for_inbox()
    process.kill()
    out, _ = process.communicate()
    assert out == b""
    assert Program(tmp_path).run("chat", typed="hello\n").stdout == ANSWERS["count"] + "\nHello there.\n"
    assert Program(tmp_path).run("chat").stdout == ""


def test_a_second_program_on_the_same_home_is_refused_naming_the_first(program):
    process = program.start("chat")
    assert process.stdin is not None
    process.stdin.write(b"hello\n")
    process.stdin.flush()
    read_line(process)
    second = program.run("chat")
    assert second.returncode == 1
    assert str(process.pid) in second.stderr
    assert "Traceback" not in second.stderr
    process.communicate(timeout=30)


def test_other_commands_ask_the_program_that_owns_the_home(program):
    process = program.start("chat")
    assert process.stdin is not None
    process.stdin.write(b"hello\n")
    process.stdin.flush()
    read_line(process)
    asked = program.run("channel", "list")
    assert (asked.returncode, asked.stderr) == (0, "")
    assert "terminal" in asked.stdout
    used = json.loads(program.run("usage", "--json").stdout)
    assert [(row["channel"], row["replies"]) for row in used] == [("terminal", 1)]
    process.communicate(timeout=30)
    assert program.run("channel", "list").stdout == asked.stdout


def test_a_home_with_a_long_name_has_a_control_socket_too(tmp_path):
    folder = tmp_path / ("long" * 30)
    folder.mkdir()
    program = Program(folder)
    process = program.start("chat")
    assert process.stdin is not None
    process.stdin.write(b"hello\n")
    process.stdin.flush()
    read_line(process)
    assert (program.home / "control.sock").stat().st_mode & 0o777 == 0o600
    assert program.run("channel", "list").stderr == ""
    process.communicate(timeout=30)
    assert not (program.home / "control.sock").exists()


# --- what goes wrong before it starts ---


def test_a_wrong_configuration_is_one_message_and_status_2(tmp_path):
    program = Program(tmp_path, extra="[modle]\n")
    ran = program.run("chat")
    assert ran.returncode == 2
    assert "did you mean model?" in ran.stderr
    assert "Traceback" not in ran.stderr


@pytest.mark.parametrize("inside", ["", "home"])
def test_a_home_that_cannot_be_written_is_named(read_only, inside):
    command = [sys.executable, "-m", "bots", "--home", str(read_only / inside), "chat"]
    ran = subprocess.run(command, capture_output=True, text=True, input="hello\n", cwd=ROOT, check=False)
    assert ran.returncode == 1
    assert str(read_only / inside) in ran.stderr
    assert "Traceback" not in ran.stderr


def test_a_home_that_is_a_file_is_named(program):
    (program.folder / "file").write_text("")
    ran = subprocess.run(
        [sys.executable, "-m", "bots", "--home", str(program.folder / "file"), "chat"],
        capture_output=True,
        text=True,
        env=program.env,
        check=False,
    )
    assert ran.returncode == 1
    assert str(program.folder / "file") in ran.stderr
    assert "Traceback" not in ran.stderr


def test_the_terminal_needs_no_other_platforms_library_and_no_torch():
    check = "import bots.terminal.bot, sys; sys.exit(bool({'aiogram', 'slack_bolt', 'torch'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", check], cwd=ROOT, check=False).returncode == 0


# --- the sink ---


@dataclass
class Sheet:
    said: list[tuple[object, ...]] = field(default_factory=list)

    async def begin(self, number: int, reply_to: str, *, resumed: bool) -> None:
        self.said.append(("begin", number, reply_to, resumed))

    async def show(self, number: int, text: str) -> None:
        self.said.append(("show", number, text))

    async def end(self, number: int, body: Body) -> None:
        self.said.append(("end", number, body.text))


HERE = Address("terminal", "home", "home", "home", "key")


async def test_finishing_again_writes_nothing():
    sheet = Sheet()
    sink = TerminalSink(sheet)
    handle = await sink.open(HERE)
    receipt = await sink.finish(handle, Body("a"))
    assert await sink.finish(handle, Body("a")) == receipt
    await sink.show(handle, "late")
    assert sheet.said == [("begin", 1, "key", False), ("end", 1, "a")]


async def test_a_handle_of_an_earlier_run_is_opened_anew_once():
    left = await TerminalSink(Sheet()).open(HERE)
    sheet = Sheet()
    sink = TerminalSink(sheet)
    handle = await sink.recover(left)
    assert handle != left
    assert await sink.recover(left) == handle
    assert await sink.recover(handle) == handle
    await sink.finish(left, Body("a"))
    await sink.finish(handle, Body("a"))
    assert sheet.said == [("begin", 1, "key", True), ("end", 1, "a")]
    assert Handle(handle)


# --- a person at a terminal ---


class Person:
    """Types into a pseudo-terminal and reads what is on it."""

    def __init__(self, program: Program) -> None:
        self._here, there = pty.openpty()
        self.process = subprocess.Popen(
            [*program.command, "chat"],
            stdin=there,
            stdout=there,
            stderr=there,
            cwd=program.folder,
            env={**program.env, "PROMPT_TOOLKIT_NO_CPR": "1", "COLUMNS": "80", "LINES": "24"},
            start_new_session=True,
        )
        os.close(there)
        self.seen = ""

    def type(self, text: str) -> None:
        os.write(self._here, text.encode())

    def sees(self, pattern: str, seconds: float = 120) -> bool:
        """Whether this comes to be seen; what was seen up to then is used up."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            found = re.search(pattern, self.seen)
            if found:
                self.seen = self.seen[found.end() :]
                return True
            if select.select([self._here], [], [], 0.1)[0]:
                try:
                    data = os.read(self._here, 65536).decode(errors="replace")
                except OSError:
                    return False
                self.seen += re.sub(r"\x1b(\[[0-9;?]*[A-Za-z]|[=>])|\r", "", data)
        return False

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._here)


@pytest.fixture
def person(tmp_path: Path) -> Iterator[Person]:
    someone = Person(Program(tmp_path, slow=0.03))
    yield someone
    someone.close()


def test_a_person_asks_stops_and_leaves(person):
    assert person.sees(r"Distributary 0\.1 · scripted · answers from a table · channel \"terminal\" on base")
    person.type("hello\r")
    assert person.sees(r"› hello")
    assert person.sees(r"Hello there\.")
    assert person.sees(r" s\b")
    person.type("count\r")
    assert person.sees("10 11 12")
    person.type("\x03")
    assert person.sees(r"tokens|stopped")
    assert person.process.poll() is None
    person.type("\x03")
    assert person.sees("Ctrl-D")
    person.type("\x04")
    assert person.process.wait(120) == 0


def test_completion_and_hints_follow_the_language_that_was_chosen(person):
    assert person.sees("Ctrl-D")
    person.type("/who")
    assert person.sees("show who you are here")
    person.type("\x03/language zh\r")
    assert person.sees(say("zh", "users.language_set", name="中文"))
    deadline = time.monotonic() + 120
    while True:  # once the program has settled the command
        person.type("\x03")
        if person.sees("按 Ctrl-D|Ctrl-D 退出", 1) or time.monotonic() > deadline:
            break
    person.type("/who")
    assert person.sees("身份")


def test_markdown_is_shown_as_what_it_means(person):
    assert person.sees("Ctrl-D")
    person.type("river\r")
    for shown in (r"Rivers\n", r"A river branches\.\n", r" • one", r" • two"):
        assert person.sees(shown)


def test_a_pasted_text_of_several_lines_is_one_message(person):
    assert person.sees("Ctrl-D")
    person.type("\x1b[200~first\nsecond\x1b[201~")
    person.type("\r")
    assert person.sees(r"› first\n  second\n")
    assert person.sees(r"You said: first")


def test_what_was_typed_long_ago_is_forgotten(tmp_path):
    path = tmp_path / "history"
    for at, text in (("2020-01-01 00:00:00", "old"), (time.strftime("%Y-%m-%d %H:%M:%S"), "new\n\nlines")):
        with path.open("a") as file:
            file.write(f"\n# {at}.000000\n" + "".join(f"+{line}\n" for line in text.split("\n")))
    now_ms = time.time_ns() // 1_000_000
    prune_history(path, now_ms - 3_600_000)
    assert list(FileHistory(path).load_history_strings()) == ["new\n\nlines"]
    prune_history(path, now_ms + 3_600_000)
    assert path.read_text() == ""
    prune_history(tmp_path / "none", 1)


def test_the_history_is_for_this_user_only(person, tmp_path):
    assert person.sees("Ctrl-D")
    person.type("hello\r")
    assert person.sees("Hello there")
    assert (tmp_path / "home" / "history").stat().st_mode & 0o777 == 0o600
