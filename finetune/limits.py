"""Bounds on what a file from outside may cost: processor time and memory. Knows nothing of what is read.

They hold for the trainer's own process, so nothing that people send can slow or starve the program that serves chats.
"""

from __future__ import annotations

import resource
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

SECONDS = 480.0  # of the processor: less than the silence after which a trainer is taken for dead
MEMORY_BYTES = 4 * 2**30  # beside what the process holds already


class TooCostly(Exception):
    """Reading took more time or memory than any file of the allowed size needs; `what` is "time" or "memory"."""

    def __init__(self, what: str) -> None:
        super().__init__(what)
        self.what = what


@contextmanager
def bounded(seconds: float = SECONDS, memory_bytes: int = MEMORY_BYTES) -> Iterator[None]:
    """Raise TooCostly in what takes more; then the bounds are off again. Time is bound in the main thread."""
    with _bounded_memory(memory_bytes):
        if threading.current_thread() is threading.main_thread():
            with _bounded_time(seconds):
                yield
        else:
            yield


@contextmanager
def _bounded_time(seconds: float) -> Iterator[None]:
    def over(signum: int, frame: FrameType | None) -> None:
        raise TooCostly("time")

    before = signal.signal(signal.SIGPROF, over)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


@contextmanager
def _bounded_memory(memory_bytes: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    try:
        with suppress(ValueError, OSError):  # a system without this bound, or with a lower one
            resource.setrlimit(resource.RLIMIT_DATA, (held_bytes("VmData") + memory_bytes, hard))
        yield
    except MemoryError as error:
        raise TooCostly("memory") from error
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def keep_no_core() -> None:
    """A crash writes no memory image: people's text would be in it."""
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def held_bytes(name: str) -> int:
    """A figure of this process's memory: VmData is what RLIMIT_DATA counts, VmHWM the most that was ever resident.

    (getrusage would give the parent's peak, if that was higher.) Raises OSError where the system does not tell.
    """
    with open("/proc/self/status", encoding="ascii", errors="replace") as status:
        for line in status:
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    raise OSError(f"no {name} in /proc/self/status")
