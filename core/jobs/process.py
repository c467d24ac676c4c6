"""One trainer process: start it on a job folder, read its events, pause and stop it.

The command is `python -m finetune check|train JOBDIR`, in a session of its own. End of file on its standard input asks
it to write a checkpoint and exit, so it also exits when this program is killed.
"""

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
from dataclasses import dataclass
from pathlib import Path

from core.errors import JobError
from core.jobs.protocol import EXIT_INTERRUPTED, Alive, JobEvent, load_event

log = logging.getLogger(__name__)

COMMAND = (sys.executable, "-P", "-m", "finetune")
_ROOT = Path(__file__).resolve().parents[2]
_MAX_LINE_BYTES = 2**20
_MAX_LOG_BYTES = 2**20
_TERMINATE_S = 5.0
_EXIT_S = 30.0
_LOCK_S, _LOCK_POLL_S = 60.0, 0.2
_LOAD_POLL_S = 0.02
# The variables by which a trainer finds its libraries and its device; no tokens, no passwords.
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
        self._folder, self._log_file = folder, log_file
        self._command = (*command, action, str(folder))
        self._silence_s = silence_s
        self._paused_at: float | None = None  # time.monotonic
        self._earlier_pauses_s = 0.0
        self._process: Process | None = None
        self._stop_requested = asyncio.Event()

    async def run(self, on_event: Callable[[JobEvent], Awaitable[None]]) -> int:
        """Start the process, pass each event to `on_event`, and wait for the end. Raises JobError."""
        await self._until_unlocked()
        if self._stop_requested.is_set():
            return EXIT_INTERRUPTED
        self._process = process = await self._spawn()
        if self._stop_requested.is_set():
            self._close_stdin()
        try:
            await self._read_events(process, on_event)
            return await self._exit_status(process)
        finally:
            if process.returncode is None:  # this task was cancelled, or an event could not be stored
                self._signal(signal.SIGKILL)
                await process.wait()

    async def stop(self, deadline_s: float) -> None:
        """Ask for a checkpoint and an exit; SIGTERM after the deadline, then SIGKILL."""
        self._stop_requested.set()
        process = self._process
        if process is None or process.returncode is not None:
            return
        self._close_stdin()
        for timeout_s, number in ((deadline_s, signal.SIGTERM), (_TERMINATE_S, signal.SIGKILL)):
            try:
                async with asyncio.timeout(timeout_s):
                    await process.wait()
                return
            except TimeoutError:
                self._signal(number)

    def pause(self) -> None:
        """Stop the process group with SIGSTOP until `resume`; a no-op once a stop is requested."""
        if not self._stop_requested.is_set():
            self._signal(signal.SIGSTOP)
            self._paused_at = self._paused_at or time.monotonic()

    def resume(self) -> None:
        self._signal(signal.SIGCONT)
        self._earlier_pauses_s, self._paused_at = self._paused_s(), None

    def _paused_s(self) -> float:
        return self._earlier_pauses_s + (time.monotonic() - self._paused_at if self._paused_at else 0.0)

    async def _spawn(self) -> Process:
        descriptor = await asyncio.to_thread(_open_log, self._log_file)
        try:
            return await asyncio.create_subprocess_exec(
                *self._command,
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

    async def _read_events(self, process: Process, on_event: Callable[[JobEvent], Awaitable[None]]) -> None:
        while True:
            try:
                line = await self._read_line(process)
            except TimeoutError:
                log.error("trainer.silent", extra={"job": self._folder.name, "seconds": self._silence_s})
                self._signal(signal.SIGKILL)
                return
            except ValueError:  # longer than _MAX_LINE_BYTES
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
                await on_event(event)

    async def _read_line(self, process: Process) -> bytes:
        """Raises TimeoutError after `silence_s` without a line, pauses not counted."""
        assert process.stdout is not None
        left, paused_before, began = self._silence_s, self._paused_s(), time.monotonic()
        while True:
            try:
                async with asyncio.timeout(left):
                    return await process.stdout.readline()
            except TimeoutError:
                left = self._silence_s - (time.monotonic() - began - (self._paused_s() - paused_before))
                if left <= 0:
                    raise

    async def _exit_status(self, process: Process) -> int:
        """Wait for the exit of a process that has closed its standard output; kill it after _EXIT_S."""
        try:
            async with asyncio.timeout(_EXIT_S):
                return await process.wait()
        except TimeoutError:
            log.error("trainer.no_exit", extra={"job": self._folder.name})
            self._signal(signal.SIGKILL)
            return await process.wait()

    async def _until_unlocked(self) -> None:
        """Wait until the trainer of an earlier run of this program has exited. Raises JobError after _LOCK_S."""
        try:
            async with asyncio.timeout(_LOCK_S):
                while await asyncio.to_thread(_is_locked, self._folder / "lock"):
                    with suppress(TimeoutError):
                        async with asyncio.timeout(_LOCK_POLL_S):
                            await self._stop_requested.wait()
                        return
        except TimeoutError:
            raise JobError("training.why_locked", seconds=round(_LOCK_S)) from None

    def _close_stdin(self) -> None:
        self.resume()  # a paused process reads nothing
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None and self._process.returncode is None:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, number)


@dataclass(slots=True)
class PausePolicy:
    """Whether a trainer is paused while replies are generated on the same machine.

    However nice it is, one busy thread delays a first token 38 times (tests/bench/room.py). The pause lasts `quiet_s`
    longer than the load. After `longest_pause_s` the trainer runs for `turn_s`, unless the load grows.
    """

    quiet_s: float = 0.5
    longest_pause_s: float = 4.5
    turn_s: float = 0.5
    paused: bool = False
    _loaded_at: float = -math.inf
    _paused_at: float = -math.inf
    _load_before: int = 0

    def update(self, now: float, load: int) -> bool:
        """`paused` at the time `now` (seconds) with `load` replies in work or waiting."""
        if load:
            self._loaded_at = now
        quiet = now - self._loaded_at >= self.quiet_s
        in_turn = self.longest_pause_s <= now - self._paused_at < self.longest_pause_s + self.turn_s
        pause = not (quiet or (in_turn and load <= self._load_before))
        if pause and not self.paused:
            self._paused_at = now
        self.paused, self._load_before = pause, load
        return pause


async def pause_under_load(trainer: TrainerProcess, load: Callable[[], int]) -> None:
    """Pause and resume a trainer by PausePolicy until cancelled. `load` counts replies in work or waiting."""
    policy = PausePolicy()
    try:
        while True:
            before = policy.paused
            if policy.update(time.monotonic(), load()) != before:
                trainer.resume() if before else trainer.pause()
            await asyncio.sleep(_LOAD_POLL_S)
    finally:
        trainer.resume()


def environment(given: Mapping[str, str]) -> dict[str, str]:
    """The environment of a trainer, without secrets."""
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
    """Descriptor of the file for standard error, truncated beyond _MAX_LOG_BYTES; -1 where it cannot be opened."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
    try:
        if path.exists() and path.stat().st_size > _MAX_LOG_BYTES:
            flags |= os.O_TRUNC
        return os.open(path, flags, 0o600)
    except OSError as error:
        log.warning("trainer.no_log", extra={"error": error.strerror})
        return -1
