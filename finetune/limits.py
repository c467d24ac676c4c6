"""Limits on processor time and memory while an untrusted file is read, in the trainer's own process."""

import resource
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

SECONDS = 480.0  # processor time; less than the heartbeat timeout of a trainer
MEMORY_BYTES = 4 * 2**30  # beyond what the process holds already


class TooCostly(Exception):
    """Reading exceeded a limit; `what` is "time" or "memory"."""

    def __init__(self, what: str) -> None:
        super().__init__(what)
        self.what = what


@contextmanager
def bounded(seconds: float = SECONDS, memory_bytes: int = MEMORY_BYTES) -> Iterator[None]:
    """Raise TooCostly if the block exceeds a limit. The time limit holds in the main thread only (signals)."""
    with _bounded_memory(memory_bytes):
        if threading.current_thread() is threading.main_thread():
            with _bounded_time(seconds):
                yield
        else:
            yield


@contextmanager
def _bounded_time(seconds: float) -> Iterator[None]:
    """The signal repeats: an error that is raised in a finaliser or a callback of the collector is ignored there."""

    def over(signum: int, frame: FrameType | None) -> None:
        raise TooCostly("time")

    before = signal.signal(signal.SIGPROF, over)
    signal.setitimer(signal.ITIMER_PROF, seconds, min(seconds, 1.0))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


@contextmanager
def _bounded_memory(memory_bytes: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    try:
        with suppress(ValueError, OSError):  # unsupported, or a lower limit is set
            resource.setrlimit(resource.RLIMIT_DATA, (held_bytes("VmData") + memory_bytes, hard))
        yield
    except MemoryError as error:
        raise TooCostly("memory") from error
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def disable_core_dumps() -> None:
    """Disable core dumps: they would contain users' texts."""
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def held_bytes(name: str) -> int:
    """A field of /proc/self/status in bytes: VmData counts towards RLIMIT_DATA, VmHWM is the peak resident size.

    getrusage may return the parent's peak. Raises OSError where the field is missing.
    """
    with open("/proc/self/status", encoding="ascii", errors="replace") as status:
        for line in status:
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    raise OSError(f"no {name} in /proc/self/status")
