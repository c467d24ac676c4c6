"""Losses of rows without dropout, for training and the gate: equal micro-batches for candidate, champion, base."""

from collections.abc import Callable, Sequence

import torch

from core.model.chat_format import TrainingRow
from finetune.data.batches import Batch, collate, pack, split_step
from finetune.modeling.loss import Scorer

CheckStop = Callable[[], None]  # raises Interrupted when the job must stop


class RowLosses:
    """`prefix`: length of the prefix shared by all rows; 0 pads them. `check_stop` runs before each micro-batch."""

    def __init__(
        self, scorer: Scorer, device: torch.device, *, prefix: int, micro_tokens: int, check_stop: CheckStop
    ) -> None:
        self.scorer, self.device, self.prefix = scorer, device, prefix
        self.micro_tokens, self.check_stop = micro_tokens, check_stop

    def batch(self, rows: Sequence[TrainingRow]) -> Batch:
        return pack(rows, self.device, prefix=self.prefix) if self.prefix else collate(rows, self.device)

    def mean(self, rows: Sequence[TrainingRow]) -> float:
        """Mean loss per supervised token."""
        return sum(self.of(rows)) / sum(supervised(rows))

    @torch.no_grad()
    def of(self, rows: Sequence[TrainingRow]) -> list[float]:
        """The summed loss of each row."""
        self.scorer.eval()
        losses = [0.0] * len(rows)
        lengths = [len(row.ids) - self.prefix for row in rows]
        for micro in split_step(range(len(rows)), lengths, micro_tokens=self.micro_tokens):
            self.check_stop()
            some = [rows[row] for row in micro]
            parts = torch.split(self.scorer.token_losses(self.batch(some)), supervised(some))
            for row, part in zip(micro, parts, strict=True):
                losses[row] = float(part.double().sum())
        return losses


def supervised(rows: Sequence[TrainingRow]) -> list[int]:
    """Tokens in the loss per row, without the first, which nothing predicts."""
    return [sum(row.supervised[1:]) for row in rows]
