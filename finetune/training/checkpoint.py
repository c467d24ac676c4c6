"""One checkpoint file: weights, optimiser state and position, replaced atomically.

BEST is the checkpoint with the lowest validation loss: it is published, and training returns to it after diverging.
"""

import errno
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from core import files
from finetune.modeling.methods import Trained
from finetune.position import Position
from finetune.process_group import parted_like, whole

NEWEST, BEST = "state.safetensors", "best.safetensors"
MOMENTS = ("exp_avg", "exp_avg_sq", "step")


def save_checkpoint(
    folder: Path,
    name: str,
    position: Position,
    trained: Trained,
    optimizer: torch.optim.Optimizer,
    *,
    write: bool = True,
) -> None:
    """Replace the checkpoint of that name durably. Collective; the process with `write` writes. Raises OSError."""
    tensors = trained.tensors()
    for i, parameter in enumerate(trained.parameters):
        for moment in MOMENTS if parameter in optimizer.state else ():
            value = whole(optimizer.state[parameter][moment].detach())
            tensors[f"optimizer.{i}.{moment}"] = value.cpu().reshape(-1)
    if write:
        folder.mkdir(exist_ok=True)
        with files.replacing(folder / name) as aside:
            save_file(tensors, aside, {"position": json.dumps(asdict(position))})


def load_checkpoint(
    folder: Path, name: str, identity: str, trained: Trained, optimizer: torch.optim.Optimizer
) -> Position | None:
    """Load model and optimiser; None, with nothing changed, without a valid checkpoint of this identity."""
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
    """safetensors reports the error number only in its message."""
    full = (errno.ENOSPC, errno.EDQUOT)
    return getattr(error, "errno", None) in full or any(f"(os error {number})" in str(error) for number in full)
