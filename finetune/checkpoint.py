"""Where a killed job goes on: adapter, optimiser and step in one file, written aside and renamed. Knows no data.

One file, because only a file can be replaced in one step: there is always the old checkpoint or the new one.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from finetune.lora import load_state, state, trainable

FILE = "state.safetensors"
MOMENTS = ("exp_avg", "exp_avg_sq", "step")


@dataclass(slots=True)
class Position:
    """How far a job has come. `identity` says of which job, data and settings; all else of it follows from `step`."""

    identity: str
    step: int = 0  # optimiser steps done
    tokens: int = 0
    seconds: float = 0.0  # of training, all starts together
    rate_factor: float = 1.0  # of the learning rate; halved after a value that is not finite
    losses: list[float] = field(default_factory=list)  # of each step
    evaluated: dict[str, float] = field(default_factory=dict)  # what was measured, by name


def save_checkpoint(folder: Path, position: Position, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Replace the checkpoint; it is on the disk when this returns."""
    tensors = state(model)
    for i, parameter in enumerate(trainable(model)):
        for name in MOMENTS:
            if parameter in optimizer.state:
                tensors[f"optimizer.{i}.{name}"] = optimizer.state[parameter][name].detach().cpu().reshape(-1)
    folder.mkdir(exist_ok=True)
    write_durably(folder / FILE, save(tensors, {"position": json.dumps(asdict(position))}))


def load_checkpoint(folder: Path, identity: str, model: nn.Module, optimizer: torch.optim.Optimizer) -> Position | None:
    """Put the checkpoint into model and optimiser; None, and nothing touched, if there is none of this identity."""
    path = folder / FILE
    try:
        with safe_open(path, framework="pt") as file:
            position = Position(**json.loads(file.metadata()["position"]))
            if position.identity != identity:
                return None
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dictionary
    except (OSError, SafetensorError, ValueError, KeyError, TypeError):
        return None
    load_state(model, tensors)
    _load_optimizer(optimizer, trainable(model), tensors)
    return position


def _load_optimizer(
    optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], tensors: dict[str, Tensor]
) -> None:
    optimizer.state.clear()
    for i, parameter in enumerate(parameters):
        if f"optimizer.{i}.step" in tensors:
            moments: dict[str, Any] = {}
            for name in MOMENTS:
                value = tensors[f"optimizer.{i}.{name}"]
                moments[name] = value.reshape(()) if name == "step" else value.reshape(parameter.shape)
            moments |= {name: moments[name].to(parameter.device) for name in MOMENTS[:2]}
            optimizer.state[parameter] = moments


def write_durably(path: Path, content: bytes) -> None:
    """Write aside, to the disk, then rename over `path`."""
    aside = path.with_name(path.name + ".new")
    with aside.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
