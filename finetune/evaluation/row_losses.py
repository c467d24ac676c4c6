"""Losses of rows, without dropout, under whatever delta the model carries at the moment. Knows no data set, no verdict.

Both the loop and the gate measure with it: one function for candidate, champion and base, on the same rows, cut into
the same micro-batches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from core.model.chat_format import TrainingRow
from finetune.data.batches import Batch, collate, pack, split_step
from finetune.modeling.loss import Scorer

Listen = Callable[[], None]  # raises Interrupted when the job is to stop


class RowLosses:
    """`prefix` is how many tokens all rows share (0: rows are padded); `listen` is called before each micro-batch."""

    def __init__(self, scorer: Scorer, device: torch.device, *, prefix: int, micro_tokens: int, listen: Listen) -> None:
        self.scorer, self.device, self.prefix = scorer, device, prefix
        self.micro_tokens, self.listen = micro_tokens, listen

    def batch(self, rows: Sequence[TrainingRow]) -> Batch:
        return pack(rows, self.device, prefix=self.prefix) if self.prefix else collate(rows, self.device)

    def mean_loss(self, rows: Sequence[TrainingRow]) -> float:
        """Mean loss per supervised token."""
        return sum(self.row_losses(rows)) / sum(supervised(rows))

    @torch.no_grad()
    def row_losses(self, rows: Sequence[TrainingRow]) -> list[float]:
        """Each row's summed loss. Holds no more than one micro-batch."""
        self.scorer.eval()
        losses = [0.0] * len(rows)
        lengths = [len(row.ids) - self.prefix for row in rows]
        for micro in split_step(range(len(rows)), lengths, micro_tokens=self.micro_tokens):
            self.listen()
            some = [rows[row] for row in micro]
            parts = torch.split(self.scorer.token_losses(self.batch(some)), supervised(some))
            for row, part in zip(micro, parts, strict=True):
                losses[row] = float(part.double().sum())
        return losses


def supervised(rows: Sequence[TrainingRow]) -> list[int]:
    """How many tokens of each row are scored: the first is predicted by nothing."""
    return [sum(row.supervised[1:]) for row in rows]
