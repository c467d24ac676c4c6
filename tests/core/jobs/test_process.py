"""When a trainer process is paused, and how it ends while it is."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from core.config.sections import HyperParameters
from core.jobs.process import PausePolicy, TrainerProcess
from core.jobs.protocol import JobEvent, Progress, Spec
from tests.support.fake_trainer import COMMAND
from tests.support.waiting import DEADLINE_S

pytestmark = pytest.mark.slow


def paused(policy: PausePolicy, loads: Sequence[tuple[float, int]]) -> list[bool]:
    """The policy's decisions for (time in seconds, load)."""
    return [policy.update(now, load) for now, load in loads]


def test_a_trainer_is_paused_under_load_and_a_moment_longer() -> None:
    policy = PausePolicy(quiet_s=0.5)
    assert paused(policy, [(1, 0), (2, 1), (3, 2), (3.4, 0), (3.6, 0), (9, 0)]) == [
        False,
        True,
        True,
        True,
        False,
        False,
    ]


def test_under_lasting_load_the_trainer_has_turns_which_end_when_the_load_grows() -> None:
    policy = PausePolicy(quiet_s=0.5, longest_pause_s=4.0, turn_s=1.0)
    assert paused(policy, [(1, 1), (4.9, 1), (5, 1), (5.9, 1), (6, 1)]) == [True, True, False, False, True]
    assert paused(policy, [(10, 1), (10.2, 2), (10.3, 1)]) == [False, True, True]


def state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def until_state(pid: int, wanted: str) -> None:
    deadline = time.monotonic() + 60
    while state(pid) != wanted:
        assert time.monotonic() < deadline
        time.sleep(0.01)


async def test_a_paused_trainer_stops_when_asked(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text('{"word": "pause"}\n')
    Spec("1", "", "", "data.jsonl", "", "acme@1", hyper=HyperParameters()).write(tmp_path)
    process = TrainerProcess(tmp_path, tmp_path / "log", command=COMMAND)
    reached = asyncio.Event()

    async def on_event(event: JobEvent) -> None:
        if isinstance(event, Progress) and event.step == 2:
            reached.set()

    running = asyncio.create_task(process.run(on_event))
    await asyncio.wait_for(reached.wait(), 60)
    assert process._process is not None
    process.pause()
    async with asyncio.timeout(DEADLINE_S):
        await asyncio.to_thread(until_state, process._process.pid, "T")
        await process.stop(10)
        assert await running == 3


def test_a_paused_trainer_continues_when_its_supervisor_dies(tmp_path: Path) -> None:
    """It would hold the job's lock for ever: the kernel wakes it, and its input has ended."""
    child = (
        "import os, sys, time; from finetune.__main__ import _resume_when_orphaned as resume; resume();"
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
    deadline = time.monotonic() + 60
    while not done.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    supervisor.stdout.close()
