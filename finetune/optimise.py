"""One step's arithmetic: learning rate, clipping by value and then by norm. Pure but for the gradients it changes."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from core.job import HyperParameters


def learning_rate(step: int, steps: int, hyper: HyperParameters) -> float:
    """Of optimiser step `step` (from 0): linear warm-up, then constant, or half a cosine down to nearly nothing."""
    warmup = max(1, round(hyper.warmup * steps))
    if step < warmup:
        return hyper.learning_rate * (step + 1) / warmup
    if hyper.schedule == "constant":
        return hyper.learning_rate
    way = (step - warmup) / max(1, steps - warmup)
    return hyper.learning_rate * 0.5 * (1 + math.cos(math.pi * way))


def clip_by_value(gradients: list[Tensor], clip_value: float) -> float:
    """Clamp every element to [-clip_value, clip_value] in place; return the fraction that this changed. 0 is off."""
    if not clip_value or not gradients:
        return 0.0
    touched = sum(torch.count_nonzero(grad.abs() > clip_value) for grad in gradients)
    torch._foreach_clamp_max_(gradients, clip_value)
    torch._foreach_clamp_min_(gradients, -clip_value)
    return float(touched) / sum(grad.numel() for grad in gradients)


def clip_by_norm(gradients: list[Tensor], clip_norm: float) -> float:
    """Scale in place so that the joint L2 norm is at most clip_norm; return the norm before. 0 only measures.

    It must come after clipping by value: behind it every element is at most clip_norm already, and a clip by value
    of the same size would do nothing. Source: Pascanu et al. 2013, arXiv:1211.5063, algorithm 1.
    """
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
    if clip_norm and bool(norm > clip_norm):
        torch._foreach_mul_(gradients, clip_norm / float(norm))
    return float(norm)
