"""A trainer stands still while people are answered, never for ever, and never when it is to go."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from core.config.sections import HyperParameters
from core.jobs import process
from core.jobs.process import TrainerProcess, usher
from core.jobs.protocol import JobEvent, Progress, Spec
from tests.support.fake_trainer import COMMAND


class Recorder:
    def __init__(self) -> None:
        self.orders: list[str] = []

    def halt(self) -> None:
        self.orders.append("halt")

    def go_on(self) -> None:
        self.orders.append("go on")


async def ushered(asked: Callable[[], int], seconds: float) -> list[str]:
    recorder = Recorder()
    task = asyncio.create_task(usher(recorder, asked))  # type: ignore[arg-type]
    await asyncio.sleep(seconds)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    return recorder.orders


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "_USHER_S", 0.001)
    monkeypatch.setattr(process, "_QUIET_S", 0.05)


async def test_it_halts_while_somebody_is_answered_and_goes_on_afterwards() -> None:
    until = time.monotonic() + 0.1
    assert await ushered(lambda: int(time.monotonic() < until), 0.4) == ["halt", "go on", "go on"]
    assert await ushered(lambda: 0, 0.1) == ["go on"]


async def test_a_chat_that_never_rests_leaves_it_a_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "_LONGEST_HALT_S", 0.05)
    monkeypatch.setattr(process, "_TURN_S", 0.02)
    orders = await ushered(lambda: 1, 0.6)
    assert orders[:4] == ["halt", "go on", "halt", "go on"]


async def test_a_turn_ends_when_somebody_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "_LONGEST_HALT_S", 0.05)
    monkeypatch.setattr(process, "_TURN_S", 60.0)
    began = time.monotonic()
    orders = await ushered(lambda: 1 + (time.monotonic() - began > 0.2), 0.4)
    assert orders == ["halt", "go on", "halt", "go on", "go on"]


def state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def until_state(pid: int, wanted: str) -> None:
    deadline = time.monotonic() + 20
    while state(pid) != wanted:
        assert time.monotonic() < deadline
        time.sleep(0.01)


async def test_a_halted_trainer_still_goes_when_it_is_told_to(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text('{"word": "pause"}\n')
    Spec("1", "", "", "data.jsonl", "", "acme@1", hyper=HyperParameters()).write(tmp_path)
    process = TrainerProcess(tmp_path, tmp_path / "log", command=COMMAND)
    reached = asyncio.Event()

    async def hear(event: JobEvent) -> None:
        if isinstance(event, Progress) and event.step == 2:
            reached.set()

    running = asyncio.create_task(process.run(hear))
    await asyncio.wait_for(reached.wait(), 20)
    assert process._process is not None
    process.halt()
    async with asyncio.timeout(10):
        await asyncio.to_thread(until_state, process._process.pid, "T")
        await process.stop(10)
        assert await running == 3


def test_a_trainer_that_is_halted_goes_on_when_its_supervisor_dies(tmp_path: Path) -> None:
    """It would hold the job's lock for ever: the kernel wakes it, and its input has ended."""
    child = (
        "import os, sys, time; from finetune.__main__ import _wake_when_left_alone as wake; wake();"
        "print(os.getpid(), flush=True); sys.stdin.read(); open(sys.argv[1], 'w').close()"
    )
    parent = (
        "import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', sys.argv[1], sys.argv[2]],"
        " stdin=subprocess.PIPE, start_new_session=True); p.wait()"
    )
    done = tmp_path / "done"
    supervisor = subprocess.Popen([sys.executable, "-c", parent, child, str(done)], stdout=subprocess.PIPE, text=True)
    assert supervisor.stdout is not None
    pid = int(supervisor.stdout.readline())

    os.kill(pid, signal.SIGSTOP)
    until_state(pid, "T")
    supervisor.kill()
    supervisor.wait()
    deadline = time.monotonic() + 20
    while not done.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    supervisor.stdout.close()
