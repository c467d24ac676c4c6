"""One trainer process: started on a job folder, heard, and stopped. Knows no rows, no adapters and no sentences.

It runs `python -m finetune check|train JOBDIR` in a session of its own. The end of its standard input tells it to
write a checkpoint and go; so it also goes when this program is killed.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import math
import os
import signal
import sys
import time
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from core.errors import JobError
from core.jobs.protocol import EXIT_INTERRUPTED, Alive, JobEvent, load_event

log = logging.getLogger(__name__)

COMMAND = (sys.executable, "-P", "-m", "finetune")
_ROOT = Path(__file__).resolve().parents[2]
_MAX_LINE_BYTES = 2**20
_MAX_LOG_BYTES = 2**20
_TERMINATE_S = 5.0
_LEAVE_S = 30.0
_LOCK_S, _LOOK_S = 60.0, 0.2
_USHER_S, _QUIET_S = 0.02, 0.5
_LONGEST_HALT_S, _TURN_S = 4.5, 0.5
# What a trainer needs to find its libraries and its device. Tokens and passwords are not among it.
_PASSED = frozenset(
    "PATH HOME USER LANG LANGUAGE TZ TMPDIR TEMP TMP VIRTUAL_ENV LD_LIBRARY_PATH DYLD_LIBRARY_PATH SYSTEMROOT".split()
)
_PASSED_GROUPS = ("LC_", "CUDA_", "NVIDIA_", "OMP_", "MKL_", "TORCH_", "NCCL_", "XDG_")


class TrainerProcess:
    """Use once. `run` returns the exit status, negative for a signal; `stop` may be called at any time."""

    def __init__(
        self,
        folder: Path,
        log_file: Path,
        *,
        action: str = "train",
        command: Sequence[str] = COMMAND,
        silence_s: float = 600.0,
    ) -> None:
        self._folder = folder
        self._action = action
        self._log_file = log_file
        self._command = command
        self._silence_s = silence_s
        self._halted_at: float | None = None  # of time.monotonic
        self._halted_s = 0.0  # all its halts before
        self._process: Process | None = None
        self._told_to_stop = asyncio.Event()

    async def run(self, hear: Callable[[JobEvent], Awaitable[None]]) -> int:
        """Start it, give each event to `hear`, and wait for its end. Raises JobError where it cannot be started."""
        await self._until_unlocked()
        if self._told_to_stop.is_set():
            return EXIT_INTERRUPTED
        self._process = process = await self._spawn()
        if self._told_to_stop.is_set():
            self._hang_up()
        try:
            await self._listen(process, hear)
            return await self._ended(process)
        finally:
            if process.returncode is None:  # we are cancelled, or cannot hear it any more
                self._signal(signal.SIGKILL)
                await process.wait()

    async def stop(self, deadline_s: float) -> None:
        """Ask it to write a checkpoint and go; make it go when the time is over. Returns when it is asked."""
        self._told_to_stop.set()
        process = self._process
        if process is None or process.returncode is not None:
            return
        self._hang_up()
        for patience_s, number in ((deadline_s, signal.SIGTERM), (_TERMINATE_S, signal.SIGKILL)):
            try:
                async with asyncio.timeout(patience_s):
                    await process.wait()
                    return
            except TimeoutError:
                self._signal(number)

    def halt(self) -> None:
        """Let it stand still, in the middle of whatever it does, until `go_on`; not if it is to go."""
        if not self._told_to_stop.is_set():
            self._signal(signal.SIGSTOP)
            self._halted_at = self._halted_at or time.monotonic()

    def go_on(self) -> None:
        self._signal(signal.SIGCONT)
        self._halted_s, self._halted_at = self._stood_still_s(), None

    def _stood_still_s(self) -> float:
        return self._halted_s + (time.monotonic() - self._halted_at if self._halted_at else 0.0)

    async def _spawn(self) -> Process:
        descriptor = await asyncio.to_thread(_open_log, self._log_file)
        try:
            return await asyncio.create_subprocess_exec(
                *self._command,
                self._action,
                str(self._folder),
                stdin=PIPE,
                stdout=PIPE,
                stderr=descriptor if descriptor >= 0 else DEVNULL,
                env=environment(os.environ),
                cwd=self._folder,
                start_new_session=True,
                limit=_MAX_LINE_BYTES,
            )
        except OSError as error:
            raise JobError("training.why_not_started", error=str(error)) from error
        finally:
            if descriptor >= 0:
                os.close(descriptor)

    async def _listen(self, process: Process, hear: Callable[[JobEvent], Awaitable[None]]) -> None:
        while True:
            try:
                line = await self._read(process)
            except TimeoutError:
                log.error("trainer.silent", extra={"job": self._folder.name, "seconds": self._silence_s})
                self._signal(signal.SIGKILL)
                return
            except ValueError:  # longer than any event
                log.warning("trainer.line_too_long", extra={"job": self._folder.name})
                continue
            if not line:
                return
            try:
                event = load_event(line.decode("utf-8", "replace"))
            except JobError:
                log.warning("trainer.not_an_event", extra={"job": self._folder.name, "bytes": len(line)})
                continue
            if not isinstance(event, Alive):
                await hear(event)

    async def _read(self, process: Process) -> bytes:
        """The next line. Raises TimeoutError after `silence_s`, in which the time that it was halted does not count."""
        assert process.stdout is not None
        left, before, began = self._silence_s, self._stood_still_s(), time.monotonic()
        while True:
            try:
                async with asyncio.timeout(left):
                    return await process.stdout.readline()
            except TimeoutError:
                silent = time.monotonic() - began - (self._stood_still_s() - before)
                left = self._silence_s - silent
                if left <= 0:
                    raise

    async def _ended(self, process: Process) -> int:
        """Its exit status; it has closed its standard output, so it has no more to do than to go."""
        try:
            async with asyncio.timeout(_LEAVE_S):
                return await process.wait()
        except TimeoutError:
            log.error("trainer.stays", extra={"job": self._folder.name})
            self._signal(signal.SIGKILL)
            return await process.wait()

    async def _until_unlocked(self) -> None:
        """Wait for a trainer of an earlier life, which is writing its checkpoint. Raises JobError if it never ends."""
        try:
            async with asyncio.timeout(_LOCK_S):
                while await asyncio.to_thread(_is_locked, self._folder / "lock"):
                    with suppress(TimeoutError):
                        async with asyncio.timeout(_LOOK_S):
                            await self._told_to_stop.wait()
                            return
        except TimeoutError:
            raise JobError("training.why_locked", seconds=round(_LOCK_S)) from None

    def _hang_up(self) -> None:
        self.go_on()  # it cannot hear us while it is halted
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()

    def _signal(self, number: signal.Signals) -> None:
        """To the trainer and whatever it has started."""
        if self._process is not None and self._process.returncode is None:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, number)


async def usher(trainer: TrainerProcess, asked: Callable[[], int]) -> None:
    """While people are answered the trainer stands still, and a moment longer: they ask again. Until cancelled.

    `asked` counts who is answered or waits. Running more slowly is not enough: each of chat's matrix products waits for
    the slowest of its threads, so that one thread beside them makes a first token 38 times later, however nice it is
    (tests/bench/room.py). A chat that never rests leaves a job a turn now and then, which ends when somebody asks.
    """
    asked_at = halted_at = -math.inf
    halted, before = False, 0
    try:
        while True:
            now, count = time.monotonic(), asked()
            if count:
                asked_at = now
            room = now - asked_at >= _QUIET_S
            turn = _LONGEST_HALT_S <= now - halted_at < _LONGEST_HALT_S + _TURN_S and count <= before
            if halted and (room or turn):
                trainer.go_on()
                halted = False
            elif not (halted or room or turn):
                trainer.halt()
                halted, halted_at = True, now
            before = count
            await asyncio.sleep(_USHER_S)
    finally:
        trainer.go_on()


def environment(given: Mapping[str, str]) -> dict[str, str]:
    """What a trainer may know of our environment; none of it is a secret."""
    passed = {name: value for name, value in given.items() if name in _PASSED or name.startswith(_PASSED_GROUPS)}
    return {**passed, "PYTHONPATH": str(_ROOT), "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}


def _is_locked(path: Path) -> bool:
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)


def _open_log(path: Path) -> int:
    """Where the trainer's standard error goes; -1 where there is no room. A file that has grown large begins anew."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
    try:
        if path.exists() and path.stat().st_size > _MAX_LOG_BYTES:
            flags |= os.O_TRUNC
        return os.open(path, flags, 0o600)
    except OSError as error:
        log.warning("trainer.no_log", extra={"error": error.strerror})
        return -1
