"""Which rows are trained in which step: a pure function of lengths, data, seed and epoch. Knows no text and no model.

Rows of like length go together, so that hardly any padding is computed; which of them, and in which order the steps
come, is drawn anew in each epoch. A step is the rows of one optimiser step; it is worked off in micro-batches, whose
size bounds memory and the time until a stop is noticed.
"""

from __future__ import annotations

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

POOL_STEPS = 50  # rows are sorted by length within pools of so many steps: like lengths together, yet drawn by chance


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows padded on the right, or packed into one row. Padding is never recognised by its id."""

    ids: Tensor  # (B, T) int64
    taught: Tensor  # (B, T) bool: the model is to say this token
    attention: Tensor | None  # (B, T) int64, or (1, 1, T, T) bool of a packed row; None where nothing is padded
    positions: Tensor | None  # (1, T) int64 of a packed row
    tokens: int  # of the rows, without padding
    supervised: int  # how many losses are summed


def plan_epoch(
    lengths: Sequence[int], *, rows_per_step: int, micro_tokens: int, data_sha256: str, seed: int, epoch: int
) -> list[Step]:
    """The steps of one epoch as row numbers; every row exactly once. Raises ValueError for sizes below 1.

    A micro-batch holds at most micro_tokens tokens with its padding, but always at least one row.
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
    """Cut rows into micro-batches in order of length; none exceeds micro_tokens with padding unless it is one row."""
    micros: list[list[int]] = []
    for row in sorted(rows, key=lambda row: lengths[row]):
        if micros and (len(micros[-1]) + 1) * lengths[row] <= micro_tokens:
            micros[-1].append(row)
        else:
            micros.append([row])
    return tuple(tuple(micro) for micro in micros)


def collate(rows: Sequence[TrainingRow], device: torch.device) -> Batch:
    """Pad rows on the right into one batch. The padding's id is 0 and never looked at."""
    width = max(len(row.ids) for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    taught = torch.zeros(len(rows), width, dtype=torch.bool)
    attention = torch.zeros(len(rows), width, dtype=torch.int64)
    for i, row in enumerate(rows):
        ids[i, : len(row.ids)] = torch.tensor(row.ids)
        taught[i, : len(row.ids)] = torch.tensor(row.supervised)
        attention[i, : len(row.ids)] = 1
    taught[:, 0] = False  # nothing comes before the first token, so nothing could have predicted it
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
    """How many tokens all rows begin with: the instructions they stand under. What is taught comes later in each.

    At least one token that is not taught stays with every row, since `pack` cannot predict a row's first own token.
    """
    first = rows[0]
    limit = min((row.supervised.index(True) if True in row.supervised else len(row.ids)) - 1 for row in rows)
    same = 0
    while same < limit and all(row.ids[same] == first.ids[same] for row in rows):
        same += 1
    return same


def pack(rows: Sequence[TrainingRow], device: torch.device, *, prefix: int) -> Batch:
    """Rows as one: the prefix that they share once, then what each has of its own, which sees the prefix and itself.

    The loss is that of `collate` (dropout falls on the prefix once instead of once per row), without padding and
    without computing the channel's instructions again for each row.
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
