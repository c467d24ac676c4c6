"""What a job that has ended may go on from, in its folder. Knows no row, no process and no format of a checkpoint."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path

from core.errors import JobError
from core.jobs.protocol import Spec

_CHECKPOINT = "checkpoint"
_LEARNED = ("spec.json", _CHECKPOINT, "own-answers.json")


def begun_with(folder: Path) -> Spec | None:
    """What a job was begun with, also where it has ended since; None where nothing of it is left."""
    try:
        return Spec.read(folder)
    except JobError:
        return None


def has_learned(folder: Path) -> bool:
    """Whether there is a checkpoint; also where it cannot be looked at just now."""
    try:
        (folder / _CHECKPOINT).stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True
    return True


def empty(folder: Path, *, keep_learned: bool) -> None:
    """Remove what is in it but what was learned, if that is kept; the folder too where nothing is.

    What cannot be removed just now stays as long as its data set.
    """
    kept = _LEARNED if keep_learned else ()
    try:
        there = os.listdir(folder)
    except OSError:
        return
    if not set(kept) & set(there):
        shutil.rmtree(folder, ignore_errors=True)
        return
    for name in set(there) - set(kept):
        shutil.rmtree(folder / name, ignore_errors=True)  # does nothing to a file
        with suppress(OSError):
            (folder / name).unlink()
