"""How fast a job goes, how long it still takes, and what is told of it. Knows no model and no optimiser."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace

from core.jobs.protocol import Planned, Progress, Spec
from core.model.chat_format import TrainingRow
from finetune.position import Position
from finetune.prepare import Emit, Prepared
from finetune.training.schedule import Schedule

PROGRESS_S = 1.0
FORWARD_SHARE = 0.4  # of a training step's time: what evaluating a token costs beside training one


@dataclass(slots=True)
class StepResult:
    """One optimiser step: mean loss per supervised token, norm before clipping by it, fraction clipped by value."""

    loss: float
    grad_norm: float
    clipped: float
    tokens: int


class ProgressEstimate:
    def __init__(self, spec: Spec, prepared: Prepared, rows: list[TrainingRow], course: Schedule, emit: Emit) -> None:
        """`rows` are all that is trained on, rehearsal included."""
        self._spec, self._prepared, self._course, self._emit = spec, prepared, course, emit
        self._rows, self._epoch = len(rows), sum(len(row.ids) for row in rows)
        self._tokens, self._seconds = 0, 0.0  # of this start alone
        self._told = -math.inf
        self._last: Progress | None = None

    def tell_plan(self) -> None:
        own, epochs = len(self._prepared.split.train), self._spec.hyper.epochs
        planned = Planned(steps=self._course.steps, tokens=self._epoch * epochs, rows=own, rehearsed=self._rows - own)
        self._emit(planned)

    def count(self, position: Position, taken: StepResult, seconds: float) -> None:
        """A step was taken: the job has come so much further."""
        position.step += 1
        position.tokens += taken.tokens
        position.seconds += seconds
        position.clipped += taken.clipped
        position.losses.append(taken.loss)
        self._tokens += taken.tokens
        self._seconds += seconds

    def tell(self, position: Position, taken: StepResult) -> None:
        """From time to time, and of the last step."""
        now = time.monotonic()
        if now - self._told < PROGRESS_S and position.step < self._course.steps:
            return
        self._told = now
        pace = self._tokens / max(self._seconds, 1e-9)
        first, last = position.ends()
        self._last = Progress(
            step=position.step,
            steps=self._course.steps,
            epoch=self._course.epoch_of(position.step),
            epochs=self._spec.hyper.epochs,
            loss=last,
            first_loss=first,
            tokens_per_s=round(pace, 1),
            seconds_left=round(self.tokens_left(position) / pace, 1),
            grad_norm=taken.grad_norm,
            clipped=taken.clipped,
        )
        self._emit(self._last)

    def tell_end(self, position: Position) -> None:
        """No more steps are taken, though there would be some."""
        if self._last:
            self._emit(replace(self._last, step=position.step, steps=position.step))

    def tokens_left(self, position: Position) -> float:
        """Of training; tokens that are only evaluated count for their share."""
        parts, rows = self._prepared.split, self._prepared.rows
        validation = sum(len(rows[row].ids) for row in parts.validation)
        test = sum(len(rows[row].ids) for row in parts.test)
        evaluations = (self._course.steps - position.step) / self._course.evaluate_every
        training = self._epoch * self._spec.hyper.epochs - position.tokens
        models = 3 if self._spec.champion else 2  # each under two questions
        return max(0.0, training + FORWARD_SHARE * (evaluations * validation + 2 * models * test))
