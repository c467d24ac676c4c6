"""Logits (B, V) to token ids, with parameters per row. Random numbers depend on seed and position only.

All rows of a step are sampled together, so the GPU is synchronized once per step. Each row is cut and summed in widths
of its own, so its result does not depend on the rest of the batch.
"""

import hashlib
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from core.types import Sampling

NOT_FINITE = -1
CANDIDATES = 1024  # most likely tokens that are tried before the whole vocabulary is sorted
BLOCK, MIN_BLOCK = 256, 16  # logits per block of _argmax
MIN_TEMPERATURE = 1e-5  # below it only the most likely token has a chance, and float32 overflows

_UNDECIDED = -2  # the candidates do not suffice for this row


def sample(
    logits: Tensor, params: Sequence[Sampling], positions: Sequence[int], seen: Sequence[Sequence[int]]
) -> list[int]:
    """One token per row; NOT_FINITE for a row whose logits are not finite.

    logits (B, V); positions count from the first generated token; seen[i] are the ids of row i's prompt and answer so
    far, needed for the repetition penalty only. Rows do not influence each other.
    """
    ids = _argmax(logits)
    # NaN and +inf show in the maximum; a row of only -inf cannot be sampled either.
    finite = logits.gather(1, ids[:, None])[:, 0].isfinite()
    for draw, rows in _rows_by_method(params).items():
        ids[_to_device(rows, logits.device)] = _draw(draw, logits, rows, params, positions, seen)
    found: list[int] = torch.where(finite, ids, NOT_FINITE).tolist()  # the only synchronization with a GPU
    if rows := [i for i, one in enumerate(found) if one == _UNDECIDED]:  # rare: nearly uniform rows
        for i, one in zip(rows, _draw(_sample_sorted, logits, rows, params, positions, seen).tolist(), strict=True):
            found[i] = one
    return found


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) with 53 random bits."""
    digest = hashlib.blake2b(f"{seed}:{position}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / 2**53


class RowParameters:
    """Parameters of N rows on their device, (N, 1) each."""

    def __init__(self, params: Sequence[Sampling], uniforms: Sequence[float], device: torch.device) -> None:
        rows = [
            (one.temperature, one.top_p, one.top_k, one.min_p, one.repetition_penalty, drawn)
            for one, drawn in zip(params, uniforms, strict=True)
        ]
        double = _to_device(torch.tensor(rows, dtype=torch.float64), device).unsqueeze(2).unbind(1)
        self.temperature, self.top_p, self.top_k, self.min_p, self.penalty = (one.float() for one in double[:5])
        self.uniform = double[5]


Draw = Callable[[Tensor, RowParameters], Tensor]  # penalized scores (N, V) -> ids (N,)


def _rows_by_method(params: Sequence[Sampling]) -> dict[Draw, list[int]]:
    """Rows by sampling method; the others take their most likely token."""
    ways: dict[Draw, list[int]] = {}
    for i, one in enumerate(params):
        if one.temperature > MIN_TEMPERATURE:
            ways.setdefault(_sample_full if one.top_k <= 0 and one.top_p >= 1 else _sample_top, []).append(i)
        elif one.repetition_penalty != 1:
            ways.setdefault(_greedy, []).append(i)
    return ways


def _draw(
    draw: Draw,
    logits: Tensor,
    rows: Sequence[int],
    params: Sequence[Sampling],
    positions: Sequence[int],
    seen: Sequence[Sequence[int]],
) -> Tensor:
    chosen = [params[i] for i in rows]
    columns = RowParameters(chosen, [uniform(params[i].seed, positions[i]) for i in rows], logits.device)
    scores = logits[_to_device(rows, logits.device)].float()  # a copy
    if any(one.repetition_penalty != 1 for one in chosen):
        _penalize(scores, columns.penalty, [seen[i] if params[i].repetition_penalty != 1 else () for i in rows])
    return draw(scores, columns)


def _penalize(scores: Tensor, penalty: Tensor, seen: Sequence[Sequence[int]]) -> None:
    """Make seen ids less likely, in place (Keskar et al. 2019, arXiv 1909.05858, as transformers does it)."""
    at = [(row, one) for row, ids in enumerate(seen) for one in set(ids)]
    if not at:
        return
    row, one = _to_device(torch.tensor(at), scores.device).unbind(1)
    values, by = scores[row, one], penalty[row, 0]
    scores[row, one] = torch.where(values < 0, values * by, values / by)


def _argmax(scores: Tensor) -> Tensor:
    """Index of each row's maximum, the first of equal ones; NaN is larger than all: (N, V) -> (N,).

    On a CPU argmax takes some 15 times as long as amax, so it runs only on the block of the maximum.
    """
    block = math.gcd(scores.shape[1], BLOCK)
    if scores.device.type != "cpu" or block < MIN_BLOCK:
        return scores.argmax(dim=-1)
    blocks = scores.view(len(scores), -1, block)
    chosen = blocks.amax(dim=-1).argmax(dim=-1)
    within: Tensor = blocks[torch.arange(len(scores)), chosen].argmax(dim=-1)
    return chosen * block + within


def _greedy(scores: Tensor, columns: RowParameters) -> Tensor:
    return _argmax(scores)


def _sample_full(scores: Tensor, columns: RowParameters) -> Tensor:
    """From the whole vocabulary in its own order, with min-p only."""
    weights = torch.softmax(scores / columns.temperature, dim=-1)
    weights.masked_fill_(weights < columns.min_p * weights.amax(dim=-1, keepdim=True), 0.0)
    return _inverse_cdf(weights, columns.uniform)[:, 0]


def _sample_top(scores: Tensor, columns: RowParameters) -> Tensor:
    """From the most likely tokens; _UNDECIDED where CANDIDATES of them are too few."""
    weights, ids = torch.topk(torch.softmax(scores / columns.temperature, dim=-1), min(CANDIDATES, scores.shape[1]))
    by_k = columns.top_k > 0
    enough = torch.where(by_k, columns.top_k <= weights.shape[1], weights.sum(dim=-1, keepdim=True) >= columns.top_p)
    drawn = _sample_ordered(weights, ids, columns)
    return drawn if weights.shape[1] == scores.shape[1] else torch.where(enough[:, 0], drawn, _UNDECIDED)


def _sample_sorted(scores: Tensor, columns: RowParameters) -> Tensor:
    """`_sample_top` over the whole vocabulary."""
    weights, ids = torch.sort(torch.softmax(scores / columns.temperature, dim=-1), descending=True)
    return _sample_ordered(weights, ids, columns)


def _sample_ordered(weights: Tensor, ids: Tensor, columns: RowParameters) -> Tensor:
    return ids.gather(1, _inverse_cdf(_filtered(weights, columns), columns.uniform))[:, 0]


def _filtered(weights: Tensor, columns: RowParameters) -> Tensor:
    """Descending probabilities (N, W) -> the same with 0 where excluded by top-k, then top-p, then min-p."""
    beyond = (columns.top_k > 0) & (torch.arange(weights.shape[1], device=weights.device) >= columns.top_k)
    weights = weights.masked_fill(beyond, 0.0)
    weights = torch.where(columns.top_k > 0, weights / weights.sum(dim=-1, keepdim=True), weights)
    dropped = weights < columns.min_p * weights[:, :1]
    dropped |= weights.cumsum(dim=-1) - weights >= columns.top_p
    dropped[:, 0] = False
    return weights.masked_fill(dropped, 0.0)


def _inverse_cdf(weights: Tensor, drawn: Tensor) -> Tensor:
    """weights (N, W), drawn (N, 1) in [0, 1) -> (N, 1): index at which the cumulative sum reaches that share, never of
    a zero.
    """
    total = weights.double().cumsum(dim=-1)
    below = torch.minimum(drawn * total[:, -1:], total[:, -1:].nextafter(torch.zeros_like(drawn)))
    return torch.searchsorted(total, below, right=True).clamp_max_(weights.shape[1] - 1)  # out of range: not finite


def _to_device(values: Tensor | Sequence[int], device: torch.device) -> Tensor:
    """Copy to the device without synchronizing."""
    values = values if isinstance(values, Tensor) else torch.tensor(values)
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)
