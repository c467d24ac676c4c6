"""Batching: which rows are trained in which step, and tensors of a micro-batch.

Rows of similar length share a micro-batch, so little padding is computed; their choice and the order of steps are
shuffled in each epoch. A step is one optimiser step; the size of its micro-batches bounds memory and stop latency.
"""

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from core.model.chat_format import TrainingRow
from finetune.data import packed_layout

Micro = tuple[int, ...]
Step = tuple[Micro, ...]

POOL_STEPS = 50  # rows are sorted by length within shuffled pools of this many steps


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows right-padded, or packed into one sequence. Padding is masked, not recognised by its id."""

    ids: Tensor  # (B, T) int64
    taught: Tensor  # (B, T) bool: the token is in the loss
    attention: Tensor | None  # (B, T) int64; (1, 1, T, T) bool if packed; None without padding
    positions: Tensor | None  # (1, T) int64 if packed
    tokens: int  # without padding
    supervised: int  # tokens in the loss


def plan_epoch(
    lengths: Sequence[int], *, rows_per_step: int, micro_tokens: int, data_sha256: str, seed: int, epoch: int
) -> list[Step]:
    """The steps of one epoch as row numbers, each row once. Raises ValueError for sizes below 1.

    A micro-batch holds at most micro_tokens tokens including padding, or one row.
    """
    if rows_per_step < 1 or micro_tokens < 1:
        raise ValueError(f"rows_per_step={rows_per_step}, micro_tokens={micro_tokens}: both must be at least 1")
    chance = random.Random(hashlib.sha256(f"{data_sha256}:{seed}:{epoch}".encode()).digest())  # noqa: S311  # no secret
    rows = list(range(len(lengths)))
    chance.shuffle(rows)
    steps: list[Step] = []
    for start in range(0, len(rows), POOL_STEPS * rows_per_step):
        pool = sorted(rows[start : start + POOL_STEPS * rows_per_step], key=lambda row: lengths[row])
        parts = [pool[at : at + rows_per_step] for at in range(0, len(pool), rows_per_step)]
        steps += [split_step(part, lengths, micro_tokens=micro_tokens) for part in parts]
    chance.shuffle(steps)
    return steps


def split_step(rows: Sequence[int], lengths: Sequence[int], *, micro_tokens: int) -> Step:
    """Split rows, sorted by length, into micro-batches of at most micro_tokens tokens including padding, or one row."""
    micros: list[list[int]] = []
    for row in sorted(rows, key=lambda row: lengths[row]):
        if micros and (len(micros[-1]) + 1) * lengths[row] <= micro_tokens:
            micros[-1].append(row)
        else:
            micros.append([row])
    return tuple(tuple(micro) for micro in micros)


def collate(rows: Sequence[TrainingRow], device: torch.device) -> Batch:
    """Right-pad rows into one batch."""
    width = max(len(row.ids) for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    taught = torch.zeros(len(rows), width, dtype=torch.bool)
    attention = torch.zeros(len(rows), width, dtype=torch.int64)
    for i, row in enumerate(rows):
        ids[i, : len(row.ids)] = torch.tensor(row.ids)
        taught[i, : len(row.ids)] = torch.tensor(row.supervised)
        attention[i, : len(row.ids)] = 1
    taught[:, 0] = False  # nothing predicts the first token
    padded = not bool(attention.all())
    return Batch(
        ids=ids.to(device),
        taught=taught.to(device),
        attention=attention.to(device) if padded else None,
        positions=None,
        tokens=sum(len(row.ids) for row in rows),
        supervised=int(taught.sum()),
    )


def shared_prefix(rows: Sequence[TrainingRow]) -> int:
    """Length of the common prefix of all rows (their instructions), before any token in the loss.

    Each row keeps at least one token outside the loss, since `pack` does not predict a row's first own token.
    """
    first = rows[0]
    limit = min((row.supervised.index(True) if True in row.supervised else len(row.ids)) - 1 for row in rows)
    same = 0
    while same < limit and all(row.ids[same] == first.ids[same] for row in rows):
        same += 1
    return same


def pack(rows: Sequence[TrainingRow], device: torch.device, *, prefix: int) -> Batch:
    """One sequence: the shared prefix once, then each row's own tokens, which attend to the prefix and themselves.

    The loss equals that of `collate` (but dropout falls on the prefix once, not once per row), without padding and
    without computing the instructions once per row.
    """
    ids, taught = list(rows[0].ids[:prefix]), [False] * prefix
    positions, owner = list(range(prefix)), [0] * prefix
    for number, row in enumerate(rows, 1):
        assert row.ids[:prefix] == rows[0].ids[:prefix]
        assert not any(row.supervised[: prefix + 1])
        ids += row.ids[prefix:]
        taught += row.supervised[prefix:]
        positions += range(prefix, len(row.ids))
        owner += [number] * (len(row.ids) - prefix)
    whose = torch.tensor(owner)
    sees = ((whose[None, :] == 0) | (whose[None, :] == whose[:, None])).tril()  # (T, T)
    mask = sees[None, None].to(device)
    packed_layout.describe(mask, packed_layout.Layout(prefix, tuple(len(row.ids) - prefix for row in rows)))
    return Batch(
        ids=torch.tensor([ids]).to(device),
        taught=torch.tensor([taught]).to(device),
        attention=mask,
        positions=torch.tensor([positions]).to(device),
        tokens=sum(len(row.ids) for row in rows),
        supervised=sum(taught),
    )
