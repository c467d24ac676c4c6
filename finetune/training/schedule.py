"""What is trained when: the rows of each step, and when the validation rows are looked at. Knows no model.

All of it follows from lengths, settings, data and seed, so that a job that goes on does what it would have done.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from core.jobs.protocol import Spec
from finetune.data.batches import Micro, Step, plan_epoch, split_step
from finetune.process_group import ProcessGroup

EVALUATE_STEPS, EVALUATE_TIMES = (
    200,
    4,
)  # the validation rows are looked at after so many steps; an epoch up to so often


class Schedule:
    def __init__(self, lengths: Sequence[int], spec: Spec, *, micro_tokens: int, team: ProcessGroup) -> None:
        """`lengths` are those of what is computed for each row."""
        self.lengths, self.spec, self.micro_tokens, self.team = lengths, spec, micro_tokens, team
        self._epoch, self._plan = 0, self._plan_of(0)
        self.steps_per_epoch = len(self._plan)
        self.steps = self.steps_per_epoch * spec.hyper.epochs
        times = min(EVALUATE_TIMES, math.ceil(self.steps_per_epoch / EVALUATE_STEPS))
        self.evaluate_every = math.ceil(self.steps_per_epoch / times)

    def step(self, number: int) -> Step:
        """The rows of an optimiser step (from 0), in micro-batches for a single process."""
        epoch, at = divmod(number, self.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._plan = epoch, self._plan_of(epoch)
        return self._plan[at]

    def share(self, step: Step) -> list[tuple[Micro, int]]:
        """What of it this process computes, each with 1. All take part in equally many, some of which count 0 times."""
        if self.team.size == 1:
            return [(micro, 1) for micro in step]
        rows = [row for micro in step for row in micro]
        shares = [
            split_step(self.team.share(rows, rank), self.lengths, micro_tokens=self.micro_tokens)
            for rank in range(self.team.size)
        ]
        own: list[tuple[Micro, int]] = [(micro, 1) for micro in shares[self.team.rank]]
        idle: tuple[Micro, int] = ((rows[0],), 0)
        return own + [idle] * (max(len(share) for share in shares) - len(own))

    def looks_after(self, steps: int) -> bool:
        """Whether the validation rows are looked at when so many steps are done."""
        return steps % self.steps_per_epoch % self.evaluate_every == 0 or steps == self.steps

    def epoch_of(self, steps: int) -> int:
        """The epoch (from 1) of the last of so many steps."""
        return max(0, steps - 1) // self.steps_per_epoch + 1

    def _plan_of(self, epoch: int) -> list[Step]:
        return plan_epoch(
            self.lengths,
            rows_per_step=self.spec.hyper.rows_per_step,
            micro_tokens=self.micro_tokens,
            data_sha256=self.spec.data_sha256,
            seed=self.spec.hyper.seed,
            epoch=epoch,
        )
