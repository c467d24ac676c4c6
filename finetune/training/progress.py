"""Throughput, time left, and the progress events of a job."""

import math
import time
from dataclasses import dataclass, replace

from core.jobs.protocol import Planned, Progress, Spec
from core.model.chat_format import TrainingRow
from finetune.position import Position
from finetune.prepare import Emit, Prepared
from finetune.training.schedule import Schedule

PROGRESS_S = 1.0
FORWARD_SHARE = 0.4  # cost of evaluating a token relative to training it


@dataclass(slots=True)
class StepResult:
    """One optimiser step: mean loss per supervised token, gradient norm before clipping, fraction clipped by value."""

    loss: float
    grad_norm: float
    clipped: float
    tokens: int


class ProgressEstimate:
    def __init__(self, spec: Spec, prepared: Prepared, rows: list[TrainingRow], schedule: Schedule, emit: Emit) -> None:
        """`rows`: all training rows, with rehearsal."""
        self._spec, self._prepared, self._schedule, self._emit = spec, prepared, schedule, emit
        self._rows, self._epoch = len(rows), sum(len(row.ids) for row in rows)
        self._tokens, self._seconds = 0, 0.0  # since this start
        self._emitted_at = -math.inf
        self._last: Progress | None = None

    def emit_plan(self) -> None:
        own, epochs = len(self._prepared.split.train), self._spec.hyper.epochs
        planned = Planned(steps=self._schedule.steps, tokens=self._epoch * epochs, rows=own, rehearsed=self._rows - own)
        self._emit(planned)

    def count(self, position: Position, taken: StepResult, seconds: float) -> None:
        """Add a finished step to the position."""
        position.step += 1
        position.tokens += taken.tokens
        position.seconds += seconds
        position.clipped += taken.clipped
        position.losses.append(taken.loss)
        self._tokens += taken.tokens
        self._seconds += seconds

    def emit_step(self, position: Position, taken: StepResult) -> None:
        """Emit Progress, at most every PROGRESS_S and after the last step."""
        now = time.monotonic()
        if now - self._emitted_at < PROGRESS_S and position.step < self._schedule.steps:
            return
        self._emitted_at = now
        rate = self._tokens / max(self._seconds, 1e-9)
        first, last = position.ends()
        self._last = Progress(
            step=position.step,
            steps=self._schedule.steps,
            epoch=self._schedule.epoch_of(position.step),
            epochs=self._spec.hyper.epochs,
            loss=last,
            first_loss=first,
            tokens_per_s=round(rate, 1),
            seconds_left=round(self.tokens_left(position) / rate, 1),
            grad_norm=taken.grad_norm,
            clipped=taken.clipped,
        )
        self._emit(self._last)

    def emit_end(self, position: Position) -> None:
        """Emit the end of a job that stopped early."""
        if self._last:
            self._emit(replace(self._last, step=position.step, steps=position.step))

    def tokens_left(self, position: Position) -> float:
        """Training tokens left; tokens of evaluations count FORWARD_SHARE."""
        parts, rows = self._prepared.split, self._prepared.rows
        validation = sum(len(rows[row].ids) for row in parts.validation)
        test = sum(len(rows[row].ids) for row in parts.test)
        evaluations = (self._schedule.steps - position.step) / self._schedule.evaluate_every
        training = self._epoch * self._spec.hyper.epochs - position.tokens
        models = 3 if self._spec.champion else 2  # each on own and swapped questions
        return max(0.0, training + FORWARD_SHARE * (evaluations * validation + 2 * models * test))
