"""Where a killed job goes on: weights, optimiser and step in one file, written aside and renamed. Knows no data.

One file, because only a file can be replaced in one step: there is always the old checkpoint or the new one. BEST is
the checkpoint as it was when the validation rows were understood best: what is published in the end, and where a job
that has lost its way goes back to.
"""

from __future__ import annotations

import errno
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from finetune.modeling.methods import Trained
from finetune.process_group import parted_like, whole

NEWEST, BEST = "state.safetensors", "best.safetensors"
MOMENTS = ("exp_avg", "exp_avg_sq", "step")


@dataclass(slots=True)
class Position:
    """How far a job has come. `identity` says of which job, data and settings; all else of it follows from `step`."""

    identity: str
    step: int = 0  # optimiser steps done
    tokens: int = 0
    seconds: float = 0.0  # of training, all starts together
    rate_factor: float = 1.0  # of the learning rate; halved when it has lost its way
    clipped: float = 0.0  # the fractions of gradient values that were clipped, of all steps together
    losses: list[float] = field(default_factory=list)  # of each step
    validated: dict[int, float] = field(default_factory=dict)  # step -> loss on the validation rows; 0 is untrained

    @property
    def best(self) -> int:
        """The step after which the validation rows were understood best; 0 before any was measured."""
        trained = {step: loss for step, loss in self.validated.items() if step}
        return min(trained, key=lambda step: (trained[step], step), default=0)

    @property
    def without_gain(self) -> int:
        """How many measurements came after the best one."""
        return sum(step > self.best for step in self.validated) if self.best else 0

    def ends(self) -> tuple[float, float]:
        """Mean losses of the first few steps and of the last few: rows of like length go together, so steps differ."""
        few = max(1, min(10, len(self.losses) // 4))
        return sum(self.losses[:few]) / few, sum(self.losses[-few:]) / few


def save_checkpoint(
    folder: Path,
    name: str,
    position: Position,
    trained: Trained,
    optimizer: torch.optim.Optimizer,
    *,
    write: bool = True,
) -> None:
    """Replace the checkpoint of that name; it is on the disk when this returns.

    Every process of a team takes part, and one of them writes.
    """
    tensors = trained.tensors()
    for i, parameter in enumerate(trained.parameters):
        for moment in MOMENTS if parameter in optimizer.state else ():
            value = whole(optimizer.state[parameter][moment].detach())
            tensors[f"optimizer.{i}.{moment}"] = value.cpu().reshape(-1)
    if write:
        folder.mkdir(exist_ok=True)
        save_durably(folder / name, tensors, {"position": json.dumps(asdict(position))})


def load_checkpoint(
    folder: Path, name: str, identity: str, trained: Trained, optimizer: torch.optim.Optimizer
) -> Position | None:
    """Put the checkpoint into model and optimiser; None, and nothing touched, if there is none of this identity."""
    path = folder / name
    try:
        with safe_open(path, framework="pt") as file:
            known = json.loads(file.metadata()["position"])
            known["validated"] = {int(step): loss for step, loss in known["validated"].items()}
            position = Position(**known)
            if position.identity != identity:
                return None
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dictionary
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError):
        return None
    trained.load(tensors)
    _load_optimizer(optimizer, trained, tensors)
    return position


def _load_optimizer(optimizer: torch.optim.Optimizer, trained: Trained, tensors: dict[str, Tensor]) -> None:
    optimizer.state.clear()
    for i, parameter in enumerate(trained.parameters):
        if f"optimizer.{i}.step" in tensors:
            moments: dict[str, Any] = {"step": tensors[f"optimizer.{i}.step"].reshape(())}
            for name in MOMENTS[:2]:
                value = tensors[f"optimizer.{i}.{name}"].reshape(parameter.shape)
                moments[name] = parted_like(value, parameter.detach())
            optimizer.state[parameter] = moments


def is_disk_full(error: Exception) -> bool:
    """safetensors tells it in words alone."""
    full = (errno.ENOSPC, errno.EDQUOT)
    return getattr(error, "errno", None) in full or any(f"(os error {number})" in str(error) for number in full)


def save_durably(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Like `write_durably`, without a copy of the tensors in memory."""
    aside = path.with_name(path.name + ".new")
    try:
        save_file(tensors, aside, metadata)
        with aside.open("rb") as file:
            os.fsync(file.fileno())
        aside.replace(path)
    except (OSError, SafetensorError):
        aside.unlink(missing_ok=True)  # what is half there takes the room of others
        raise
    sync_folder(path.parent)


def write_durably(path: Path, content: bytes) -> None:
    """Write aside, to the disk, then rename over `path`."""
    aside = path.with_name(path.name + ".new")
    try:
        with aside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except OSError:
        aside.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
