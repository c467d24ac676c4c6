"""One step's arithmetic: learning rate, clipping by value and then by norm. Pure but for the gradients it changes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from core.config.sections import HyperParameters
from finetune.process_group import ProcessGroup, is_shard, local


def learning_rate(step: int, steps: int, hyper: HyperParameters) -> float:
    """Of optimiser step `step` (from 0): linear warm-up, then constant, or half a cosine down to nearly nothing."""
    warmup = max(1, round(hyper.warmup * steps))
    if step < warmup:
        return hyper.learning_rate * (step + 1) / warmup
    if hyper.schedule == "constant":
        return hyper.learning_rate
    way = (step - warmup) / max(1, steps - warmup)
    return hyper.learning_rate * 0.5 * (1 + math.cos(math.pi * way))


@dataclass(slots=True)
class Clipped:
    """Of one step's gradient: its norm before clipping by it, and the fraction of its values clipped by value."""

    norm: float
    fraction: float


def clip(parameters: Sequence[nn.Parameter], hyper: HyperParameters, team: ProcessGroup) -> Clipped | None:
    """Clip the gradients of all processes by value and by norm; None, and nothing touched, if one is not finite."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    shards = [local(one) for one in gradients if is_shard(one)]
    wholes = [one for one in gradients if not is_shard(one)]
    # Looked for first: clamping would make an ordinary 1.0 of an infinite gradient.
    if team.any(not all_finite(shards + wholes)):
        return None
    touched = [clip_by_value(part, hyper.clip_value) for part in (shards, wholes)]
    sums = [squares(part) for part in (shards, wholes)]
    once = 1 if team.leads else 0  # what every process has whole is counted by one
    clipped, square = team.add([touched[0] + once * touched[1], sums[0] + once * sums[1]])
    clip_by_norm(shards + wholes, math.sqrt(square), hyper.clip_norm)
    return Clipped(math.sqrt(square), clipped / max(1, sum(one.numel() for one in gradients)))


def all_finite(gradients: list[Tensor]) -> bool:
    return not gradients or bool(torch.isfinite(torch.stack(torch._foreach_norm(gradients, math.inf))).all())


def clip_by_value(gradients: list[Tensor], clip_value: float) -> int:
    """Clamp every element to [-clip_value, clip_value] in place; return how many this changed. 0 is off."""
    if not clip_value or not gradients:
        return 0
    touched = sum(torch.count_nonzero(grad.abs() > clip_value) for grad in gradients)
    torch._foreach_clamp_max_(gradients, clip_value)
    torch._foreach_clamp_min_(gradients, -clip_value)
    return int(touched)


def squares(gradients: list[Tensor]) -> float:
    """The sum of all elements' squares."""
    return float(torch.stack(torch._foreach_norm(gradients)).double().square().sum()) if gradients else 0.0


def clip_by_norm(gradients: list[Tensor], norm: float, clip_norm: float) -> None:
    """Scale in place so that a joint L2 norm of `norm` becomes at most clip_norm. 0 is off.

    It must come after clipping by value: behind it every element is at most clip_norm already, and a clip by value
    of the same size would do nothing. Source: Pascanu et al. 2013, arXiv:1211.5063, algorithm 1.
    """
    if clip_norm and norm > clip_norm:
        torch._foreach_mul_(gradients, clip_norm / norm)
