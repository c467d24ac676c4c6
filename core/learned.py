"""What a job that has ended may go on from, in its folder. Knows no row, no process and no format of a checkpoint."""

from __future__ import annotations

import shutil
from pathlib import Path

from core.errors import JobError
from core.job import Spec

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
    """Remove what is in it but what was learned, if that is kept; the folder too where nothing is."""
    kept = _LEARNED if keep_learned else ()
    if not any((folder / name).exists() for name in kept):
        shutil.rmtree(folder, ignore_errors=True)
        return
    for path in folder.iterdir():
        if path.name in kept:
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
