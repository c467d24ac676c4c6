"""Erasure, retention and clean-up of files: each module that owns a table registers its part, core.privacy runs them.

`erases`: one person's rows, in the order of `Stage`, in one transaction.  `withdraws`: one person's consent in one
channel ends.  `prunes`: rows by age, in batches.  `sweeps`: files whose rows are gone.
"""

import os
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path

from core.storage.database import Tx
from core.storage.home import Home
from core.types import After

BATCH = 1000  # rows that one transaction prunes
HOUR_MS = 3_600_000
_LEFT_OVER_S = 3600.0  # a file without a row may be about to get one


class Stage(IntEnum):
    """Order of an erasure: a step reads what earlier stages left. Charges stay; pruning makes them nameless."""

    REPLIES = 1  # generations end while their messages are still open
    TEXT = 2  # turns, examples, messages, deliveries, the person's own row
    DATASETS = 3  # data sets with the person's texts; the jobs that read them are cancelled
    ADAPTERS = 4  # versions trained on those data sets are unpublished


@dataclass(slots=True)
class Erasure:
    """Erase what is stored of a person up to a moment; the steps add what they found."""

    user_hash: str
    until_ms: int
    keep_row: int = 0  # the inbox row that asks for the erasure: it still has to be answered
    datasets: list[str] = field(default_factory=list)  # sha256 of the data sets that were erased
    unpublished: list[tuple[str, str]] = field(default_factory=list)  # (label, label that answers instead)
    after: list[After] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Periods:
    """How long rows stay, in milliseconds."""

    conversation: int
    payload: int
    dead: int
    dataset: int
    audit: int


EraseStep = Callable[[Tx, Erasure], None]
WithdrawStep = Callable[[Tx, str, int], Sequence[After]]
Prune = Callable[[Tx], int]
PruneSteps = Callable[[Periods], Sequence[Prune]]
SweepStep = Callable[[Tx, Periods], Callable[[Home], None]]

_erases: list[tuple[Stage, EraseStep]] = []
_withdraws: list[WithdrawStep] = []
_prunes: list[PruneSteps] = []
_sweeps: list[SweepStep] = []


def erases(stage: Stage) -> Callable[[EraseStep], EraseStep]:
    """Register a step of `erase`."""

    def register(step: EraseStep) -> EraseStep:
        _erases.append((stage, step))
        return step

    return register


def withdraws(step: WithdrawStep) -> WithdrawStep:
    """Register (tx, user_hash, channel_id) -> effects: nothing more is learned from the person in this channel."""
    _withdraws.append(step)
    return step


def prunes(steps: PruneSteps) -> PruneSteps:
    """Register a function that gives the owner's prune steps, in their order, for the periods in force."""
    _prunes.append(steps)
    return steps


def sweeps(step: SweepStep) -> SweepStep:
    """Register a function that reads in a transaction what files are to go, and returns what removes them."""
    _sweeps.append(step)
    return step


def erase(tx: Tx, erasure: Erasure) -> Erasure:
    """Run all registered steps, by stage. Raises RuntimeError where the owners of a stage were never imported."""
    if missing := set(Stage) - {stage for stage, _ in _erases}:
        raise RuntimeError(f"no module is registered for {', '.join(stage.name for stage in sorted(missing))}")
    for _, step in sorted(_erases, key=lambda pair: pair[0]):
        step(tx, erasure)
    return erasure


def withdraw(tx: Tx, user_hash: str, channel_id: int) -> tuple[After, ...]:
    """The effects of all owners."""
    return tuple(dict.fromkeys(effect for step in _withdraws for effect in step(tx, user_hash, channel_id)))


def prune_steps(periods: Periods) -> Iterator[Prune]:
    """Each changes at most BATCH rows and returns how many."""
    for steps in _prunes:
        yield from steps(periods)


def sweep_steps(tx: Tx, periods: Periods) -> list[Callable[[Home], None]]:
    return [step(tx, periods) for step in _sweeps]


def batch(change: str, where: str, *ages_ms: int, key: str = "id") -> Prune:
    """A prune step: the UPDATE or DELETE `change` for BATCH rows where `where` holds; each age fills one ? of it."""
    table = change.removeprefix("DELETE FROM ").removeprefix("UPDATE ").split()[0]
    sql = f"{change} WHERE {key} IN (SELECT {key} FROM {table} WHERE {where} LIMIT {BATCH})"
    return lambda tx: tx.run(sql, [tx.now_ms - age for age in ages_ms])


def remove_files(folder: Path, *, gone: Collection[str], known: Collection[str]) -> None:
    """Remove the entries named in `gone`, and those of no known row after an hour."""
    for path in entries(folder):
        if path.name in gone or (path.name not in known and age_s(path) > _LEFT_OVER_S):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def entries(folder: Path) -> list[Path]:
    return [folder / name for name in sorted(os.listdir(folder))] if folder.is_dir() else []


def age_s(path: Path) -> float:
    """Seconds since the file or its name last changed."""
    try:
        return time.time() - path.stat().st_ctime
    except OSError:
        return 0.0
