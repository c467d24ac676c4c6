"""Learning rate schedule, and gradient clipping by value, then by norm."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from core.config.sections import HyperParameters
from finetune.process_group import ProcessGroup, is_shard, local


def learning_rate(step: int, steps: int, hyper: HyperParameters) -> float:
    """At optimiser step `step` (from 0): linear warm-up, then constant or cosine decay."""
    warmup = max(1, round(hyper.warmup * steps))
    if step < warmup:
        return hyper.learning_rate * (step + 1) / warmup
    if hyper.schedule == "constant":
        return hyper.learning_rate
    way = (step - warmup) / max(1, steps - warmup)
    return hyper.learning_rate * 0.5 * (1 + math.cos(math.pi * way))


@dataclass(slots=True)
class Clipped:
    """Norm of a step's gradient before clipping by norm; fraction of values clipped by value."""

    norm: float
    fraction: float


def clip(parameters: Sequence[nn.Parameter], hyper: HyperParameters, group: ProcessGroup) -> Clipped | None:
    """Clip gradients by value, then by norm; None, with nothing changed, if one is not finite. Collective."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    shards = [local(one) for one in gradients if is_shard(one)]
    wholes = [one for one in gradients if not is_shard(one)]
    # Before clamping, which would hide infinite gradients.
    if group.any(not all_finite(shards + wholes)):
        return None
    touched = [clip_by_value(part, hyper.clip_value) for part in (shards, wholes)]
    sums = [squares(part) for part in (shards, wholes)]
    once = 1 if group.leads else 0  # replicated gradients count once
    clipped, square = group.add([touched[0] + once * touched[1], sums[0] + once * sums[1]])
    clip_by_norm(shards + wholes, math.sqrt(square), hyper.clip_norm)
    return Clipped(math.sqrt(square), clipped / max(1, sum(one.numel() for one in gradients)))


def all_finite(gradients: list[Tensor]) -> bool:
    return not gradients or bool(torch.isfinite(torch.stack(torch._foreach_norm(gradients, math.inf))).all())


def clip_by_value(gradients: list[Tensor], clip_value: float) -> int:
    """Clamp to [-clip_value, clip_value] in place; return the number of changed values. 0 disables."""
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
    """Scale gradients of joint L2 norm `norm` in place to at most clip_norm (Pascanu et al. 2013, arXiv 1211.5063,
    algorithm 1). 0 disables. After clipping by value, which would otherwise have no effect.
    """
    if clip_norm and norm > clip_norm:
        torch._foreach_mul_(gradients, clip_norm / norm)
