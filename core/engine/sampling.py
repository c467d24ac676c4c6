"""Logits (B, V) -> token ids, parameters per row. Random numbers depend on seed and position alone.

Knows nothing of models, rows in the cache or text.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from core.types import Sampling

NOT_FINITE = -1
CANDIDATES = 1024  # of the most likely tokens, before a whole vocabulary is sorted


def sample(
    logits: Tensor, params: Sequence[Sampling], positions: Sequence[int], seen: Sequence[Sequence[int]]
) -> list[int]:
    """One token per row; NOT_FINITE for a row whose logits are not numbers.

    logits (B, V); positions count from the first generated token; seen[i] are the ids of row i's prompt and answer so
    far, needed for the repetition penalty alone. Rows do not influence each other.
    """
    # NaN and +inf show in the maximum; a row of -inf alone cannot be drawn from either.
    finite = logits.amax(dim=-1).isfinite()
    greedy = torch.where(finite, logits.argmax(dim=-1), NOT_FINITE).tolist()  # the one wait for a GPU
    ids = []
    for i, param in enumerate(params):
        if greedy[i] == NOT_FINITE:
            ids.append(NOT_FINITE)
        elif param.temperature <= 0 and param.repetition_penalty == 1:
            ids.append(greedy[i])
        else:
            ids.append(_sample_row(logits[i].float(), param, positions[i], seen[i]))
    return ids


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) of 53 random bits."""
    digest = hashlib.blake2b(f"{seed}:{position}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / 2**53


def _sample_row(row: Tensor, param: Sampling, position: int, seen: Sequence[int]) -> int:
    if param.repetition_penalty != 1:
        row = _penalised(row, param.repetition_penalty, seen)
    if param.temperature <= 0:
        return int(row.argmax())
    ids, probabilities = _candidates(row / param.temperature, param)
    cumulative = probabilities.double().cumsum(dim=0)
    drawn = uniform(param.seed, position) * cumulative[-1]
    index = int(torch.searchsorted(cumulative, drawn, right=True))
    return int(ids[min(index, len(ids) - 1)])


def _penalised(row: Tensor, penalty: float, seen: Sequence[int]) -> Tensor:
    """Ids that were seen become less likely (Keskar et al. 2019, arXiv 1909.05858, as transformers does it)."""
    ids = torch.tensor(sorted(set(seen)), device=row.device, dtype=torch.long)
    row = row.clone()
    values = row[ids]
    row[ids] = torch.where(values < 0, values * penalty, values / penalty)
    return row


def _candidates(row: Tensor, param: Sampling) -> tuple[Tensor, Tensor]:
    """(ids, probabilities) that may be drawn: top-k, then top-p, then min-p. Never empty."""
    probabilities = torch.softmax(row, dim=-1)
    if param.top_k <= 0 and param.top_p >= 1:  # no order needed
        keep = probabilities >= param.min_p * probabilities.max()
        return keep.nonzero()[:, 0], probabilities[keep]
    count = min(param.top_k if param.top_k > 0 else CANDIDATES, len(row))
    values, ids = torch.topk(probabilities, count)
    if param.top_k > 0:
        values = values / values.sum()
    elif float(values.sum()) < param.top_p:
        values, ids = torch.sort(probabilities, descending=True)
    keep = values >= param.min_p * values[0]
    keep &= values.cumsum(dim=0) - values < param.top_p
    keep[0] = True
    return ids[keep], values[keep]
