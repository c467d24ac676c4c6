"""`python -m finetune new|check|train|gate JOBDIR`: the command line, events, signals and exit status of a job.

Standard output carries events only. SIGTERM, SIGINT and end of file on a piped standard input stop the job after a
checkpoint. The same command runs under `torchrun` and `accelerate launch`.
"""

import argparse
import ctypes
import fcntl
import logging
import os
import signal
import stat
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from core.errors import AppError, BadDataset, JobError
from core.i18n.messages import Lazy, say
from core.jobs.protocol import (
    EXIT_FAILED,
    EXIT_FINISHED,
    EXIT_INTERRUPTED,
    Alive,
    Failed,
    Fault,
    JobEvent,
    Spec,
    dump_event,
)
from core.model.onednn import keep_few_kernels
from finetune import new
from finetune.limits import disable_core_dumps

log = logging.getLogger("finetune")
ALIVE_S = 20.0  # silence after which an Alive event is emitted
LOCK_S = 10.0  # time for a trainer whose parent was killed to notice and exit
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # malloc.h
PR_SET_PDEATHSIG = 1  # sys/prctl.h
UNEXPECTED, MOST_TOLD = "training.why_unexpected", 300
# Failures after which the checkpoint cannot be used: damaged, for another base model, or not finite.
_OF_NO_USE = ("training.why_damaged", "training.why_base_changed", "training.why_not_finite")


def main(arguments: list[str] | None = None) -> int:
    """Return an exit status of core.jobs.protocol."""
    parser = argparse.ArgumentParser(prog="python -m finetune", description=__doc__)
    actions = parser.add_subparsers(dest="action", required=True)
    for action in ("check", "train", "gate"):
        actions.add_parser(action).add_argument("job", type=Path, metavar="JOBDIR")
    new.options(actions.add_parser("new"))
    given, words = parser.parse_known_args(arguments)
    if given.action == "new":
        return _make(given, words)
    if words:
        parser.error(f"{words[0]} is not understood")
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    logging.captureWarnings(True)
    set_up_libraries()
    events = Events(_own_stdout())
    _watch(events.stop)
    return run(given.action, given.job.absolute(), events, events.stop)


def _make(given: argparse.Namespace, words: list[str]) -> int:
    try:
        folder = new.make(given, words)
    except JobError as error:
        sys.stderr.write(f"{error.detail}\n")
        return EXIT_FAILED
    sys.stdout.write(f"{folder} is ready: python -m finetune train {folder}\n")
    return EXIT_FINISHED


class Events:
    """Writes events as lines of JSON; a closed pipe sets `stop`."""

    def __init__(self, out: IO[str]) -> None:
        self.out, self.stop = out, Stop(self)
        self.told = time.monotonic()

    def __call__(self, event: JobEvent) -> None:
        self.told = time.monotonic()
        try:
            self.out.write(dump_event(event) + "\n")
            self.out.flush()
        except BrokenPipeError:
            self.stop.set()


class Stop(threading.Event):
    """Stop flag. It is polled before each piece of work, so polling also emits the Alive heartbeat of rank 0."""

    def __init__(self, events: Events) -> None:
        super().__init__()
        self._events, self._speaks = events, os.environ.get("RANK", "0") == "0"

    def is_set(self) -> bool:
        if self._speaks and time.monotonic() - self._events.told >= ALIVE_S:
            self._events(Alive())
        return super().is_set()


def run(action: str, folder: Path, emit: Events, stop: threading.Event) -> int:
    """Run the action; every outcome becomes an event and an exit status."""
    language = "en"
    from finetune.training.checkpoints import Interrupted  # imported late: signals are handled before torch loads
    from finetune.training.train import train

    disable_core_dumps()
    try:
        if stop.is_set():  # the parent has exited already
            return EXIT_INTERRUPTED
        with _locked(folder, stop):
            spec = Spec.read(folder)
            language = spec.language
            configure_process(spec)
            if action == "check":
                from finetune.check import check

                check(folder, spec, emit, stop)
            elif action == "gate" or spec.candidate:
                from finetune.imported import judge_imported

                judge_imported(folder, spec, emit, stop)
            else:
                train(folder, spec, emit, stop)
    except Interrupted:
        log.info("train.interrupted")
        return EXIT_INTERRUPTED
    except BadDataset as error:
        emit(Failed("yours", _told(error, language), line=int(error.fields.get("line", 0))))
        return EXIT_FAILED
    except AppError as error:
        log.error("train.refused %s", error.detail or error)
        emit(Failed(_fault_of(error), _told(error, language), of_use=error.key not in _OF_NO_USE))
        return EXIT_FAILED
    except Exception as error:
        log.exception("train.failed")
        emit(Failed("ours", say(language, UNEXPECTED, error=f"{type(error).__name__}: {error}"[:MOST_TOLD])))
        return EXIT_FAILED
    return EXIT_FINISHED


def _fault_of(error: AppError) -> Fault:
    said = error.fields.get("fault") if isinstance(error, JobError) else ""
    return "yours" if said == "yours" else "settings" if said == "settings" else "ours"


def _told(error: AppError, language: str) -> str:
    """The reason for users: the error's own message, or its log detail in a generic message."""
    reason = error.fields.get("reason")
    if isinstance(reason, Lazy):
        return reason.render(language)
    if error.key != type(error).key:
        return say(language, error.key, **error.fields)
    return say(language, UNEXPECTED, error=(error.detail or str(error))[:MOST_TOLD])


@contextmanager
def _locked(folder: Path, stop: threading.Event) -> Iterator[None]:
    """Hold an flock on JOBDIR/lock (rank 0 only); the kernel releases it when the process ends. Raises JobError."""
    if os.environ.get("RANK", "0") != "0":
        yield
        return
    try:
        handle = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise JobError(detail=f"{folder} is not a job folder: {error}") from error
    try:
        until = time.monotonic() + LOCK_S
        while not _lock(handle):
            if time.monotonic() > until:
                detail = f"another trainer is at work on {folder}"
                raise JobError("training.why_locked", detail, seconds=round(LOCK_S))
            stop.wait(0.1)
        yield
    finally:
        os.close(handle)


def _lock(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _own_stdout() -> IO[str]:
    """Reserve standard output for events; other writes to it go to standard error."""
    sys.stdout.flush()
    events = os.fdopen(os.dup(1), "w", encoding="utf-8", newline="\n")
    os.dup2(2, 1)
    return events


def _watch(stop: threading.Event) -> None:
    def told(signum: int, frame: object) -> None:
        stop.set()

    signal.signal(signal.SIGTERM, told)
    signal.signal(signal.SIGINT, told)
    mode = os.fstat(0).st_mode
    if not (stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)):
        return  # not a pipe: a terminal, torchrun, a batch queue

    def read_to_end() -> None:
        with suppress(OSError, ValueError):
            while os.read(0, 4096):
                pass
        stop.set()

    threading.Thread(target=read_to_end, name="stdin", daemon=True).start()


def set_up_libraries() -> None:
    """Environment that torch reads when it loads.

    OpenMP threads spin while they wait by default, which is 20 times slower beside another busy program.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    keep_few_kernels()


def configure_process(spec: Spec) -> None:
    """Niceness, malloc and matmul backend of this process."""
    if spec.nice > 0:
        with suppress(OSError):
            os.nice(spec.nice)
    _resume_when_orphaned()
    _keep_freed_memory()
    _multiply_by_onednn()


def _resume_when_orphaned() -> None:
    """Get SIGCONT when the parent dies: it may have paused this process with SIGSTOP."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGCONT)


def _keep_freed_memory() -> None:
    """Let glibc keep the memory that a step frees: returning and zeroing it costs 15% of a step."""
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_THRESHOLD, 32 * 2**20)  # the maximum
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(M_TOP_PAD, 64 * 2**20)


def _multiply_by_onednn() -> None:
    """On AMD processors use oneDNN for float32 products: MKL is half as fast there.

    torch's only switch for it also permits bfloat16, where the processor has AMX; so it stays on only if a test product
    has float32 precision. The choice is deterministic per processor.
    """
    import torch

    if "AMD" not in str(torch.cpu.get_capabilities().get("cpu_name", "")):
        return
    a, b = torch.linspace(-1, 1, 64 * 576).reshape(64, 576).sin(), torch.linspace(-3, 3, 576 * 64).reshape(576, 64)
    exact = a.double() @ b.double()
    torch.set_float32_matmul_precision("medium")
    if not torch.allclose((a @ b).double(), exact, rtol=1e-5, atol=5e-3):  # bfloat16 would be off by 0.1
        torch.set_float32_matmul_precision("highest")
    log.info("train.matmul matmul_precision=%s", torch.get_float32_matmul_precision())


if __name__ == "__main__":
    sys.exit(main())
