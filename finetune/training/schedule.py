"""The rows of each step and the steps with validation, determined by lengths, settings, data and seed."""

import math
from collections.abc import Sequence

from core.jobs.protocol import Spec
from finetune.data.batches import Micro, Step, plan_epoch, split_step
from finetune.process_group import ProcessGroup

EVALUATE_STEPS = 200  # between validations
EVALUATE_TIMES = 4  # at most, in an epoch


class Schedule:
    def __init__(self, lengths: Sequence[int], spec: Spec, *, micro_tokens: int, group: ProcessGroup) -> None:
        """`lengths`: tokens computed per row."""
        self.lengths, self.spec, self.micro_tokens, self.group = lengths, spec, micro_tokens, group
        self._epoch, self._plan = 0, self._plan_of(0)
        self.steps_per_epoch = len(self._plan)
        self.steps = self.steps_per_epoch * spec.hyper.epochs
        times = min(EVALUATE_TIMES, math.ceil(self.steps_per_epoch / EVALUATE_STEPS))
        self.evaluate_every = math.ceil(self.steps_per_epoch / times)

    def step(self, number: int) -> Step:
        """Micro-batches of optimiser step `number` (from 0) for a single process."""
        epoch, at = divmod(number, self.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._plan = epoch, self._plan_of(epoch)
        return self._plan[at]

    def share(self, step: Step) -> list[tuple[Micro, int]]:
        """(micro-batch, weight) of this process. All processes run equally many; extra ones have weight 0."""
        if self.group.size == 1:
            return [(micro, 1) for micro in step]
        rows = [row for micro in step for row in micro]
        shares = [
            split_step(self.group.share(rows, rank), self.lengths, micro_tokens=self.micro_tokens)
            for rank in range(self.group.size)
        ]
        own: list[tuple[Micro, int]] = [(micro, 1) for micro in shares[self.group.rank]]
        idle: tuple[Micro, int] = ((rows[0],), 0)
        return own + [idle] * (max(len(share) for share in shares) - len(own))

    def validates_after(self, steps: int) -> bool:
        """Whether to validate after so many steps."""
        return steps % self.steps_per_epoch % self.evaluate_every == 0 or steps == self.steps

    def epoch_of(self, steps: int) -> int:
        """The epoch (from 1) of step `steps`."""
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
