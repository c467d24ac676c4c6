"""The trainer's program in forks of one process that has loaded what takes seconds, each with streams of its own.

    python -m tests.support.finetune_forked

Reads lines of an action and a job folder; writes each one's exit status. What it wrote is in JOBDIR.out and JOBDIR.err.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from finetune import __main__ as program

program.set_up_libraries()
program.LOCK_S = 0.5

import finetune.check  # noqa: E402
import finetune.imported  # noqa: E402
import finetune.training.train  # noqa: E402, F401


def be_started(folder: Path) -> None:
    """Take streams as whoever starts a trainer gives it; nobody closes its input."""
    opened = [os.open(f"{folder}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600) for name in ("out", "err")]
    for number, one in enumerate([os.pipe()[0], *opened]):
        os.dup2(one, number)


def main() -> None:
    while words := sys.stdin.readline().split():
        pid = os.fork()
        if pid == 0:
            be_started(Path(words[1]))
            sys.exit(program.main(words))
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
