"""The training loop.

Random numbers depend only on (seed, step) or (data, seed, epoch), and checkpoints hold the rest: an interrupted job
resumes to the same bits, on a CPU with the same number of threads.
"""

import hashlib
import logging
import math
import threading
import time
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch

from core import files
from core.config.sections import HyperParameters
from core.errors import JobError
from core.i18n.messages import say
from core.jobs.protocol import Evaluated, JobEvent, Judged, Spec, Warned
from finetune.data.batches import collate, pack, shared_prefix
from finetune.evaluation.evaluator import Evaluator
from finetune.evaluation.retention_set import NOTHING, OwnAnswers, own_answers
from finetune.evaluation.row_losses import RowLosses
from finetune.modeling import packed_attention as packed_attention
from finetune.modeling import rms_norm
from finetune.modeling.base import load_again, load_module
from finetune.modeling.loss import Scorer
from finetune.modeling.memory import checkpoint_activations, checkpoints_activations, trim_heap
from finetune.modeling.methods import AllWeights, LoraDelta, Trained
from finetune.output.publish import done, publish, published, write_adapter, write_model
from finetune.output.report import losses_of, manifest_of, model_card
from finetune.prepare import Emit, Prepared, prepare
from finetune.process_group import ProcessGroup, whole
from finetune.settings import LEAST_PREFIX, Resolved, refused, resolve
from finetune.training.checkpoint import BEST
from finetune.training.checkpoints import Checkpoints, Interrupted, identity_of
from finetune.training.optimizer import clip, learning_rate
from finetune.training.progress import ProgressEstimate, StepResult
from finetune.training.schedule import Schedule

log = logging.getLogger(__name__)

WARM_UP_STEPS, WARM_UP_S = 4, 10.0
LOST_STEPS, LOST_NATS = 5, 2.0  # diverged: mean loss of the last steps this far above the initial loss
LOST_VALIDATION = 0.5  # diverged: validation loss this far above the untrained one, in nats


class Unstable(Exception):
    """Training diverged: a loss or gradient is not finite, or the loss is far above the initial one."""

    def __init__(self, key: str, **fields: object) -> None:
        super().__init__(key)
        self.key, self.fields = key, fields


def train(folder: Path, spec: Spec, emit: Emit, stop: threading.Event) -> None:
    """Train or resume a job. Raises Interrupted, JobError, BadDataset."""
    group = ProcessGroup(spec.device)
    tell = emit if group.leads else _silent
    if said := published(folder):
        for event in said:
            tell(event)
        return
    torch.set_num_threads(spec.threads)
    with group.first():
        prepared = prepare(folder, spec, tell)
    Trainer(folder, spec, prepared, tell, stop, group).run()


class Trainer:
    """One job: model, trained parameters, optimiser, position."""

    def __init__(
        self,
        folder: Path,
        spec: Spec,
        prepared: Prepared,
        emit: Emit,
        stop: threading.Event,
        group: ProcessGroup | None = None,
    ) -> None:
        self.folder, self.spec, self.prepared, self.emit, self.stop = folder, spec, prepared, emit, stop
        self.group = group or ProcessGroup(spec.device)
        self.device = self.group.device
        self._check_stop()
        model = load_module(prepared.base, spec, self.device)
        with self.group.first():
            self.own = self._own_answers(model)
        trim_heap()
        rms_norm.replace_rms_norms(model)
        rows = prepared.part(prepared.split.train)
        self.train_rows = [*rows, *self.own.to_rehearse(len(rows), spec.hyper.rehearsal)]
        self.settings: Resolved = resolve(spec, rows=len(rows), device=self.device.type)
        torch.manual_seed(spec.hyper.seed)
        self.trained = self._trained(model)
        self.model: Any = model
        self.group.shard(model)
        self.checkpointing = checkpoints_activations(
            spec.hyper.checkpointing, model, self.device, self.settings.micro_tokens
        )
        if self.checkpointing:
            checkpoint_activations(model)
        self.scorer = Scorer(model, in_bfloat16=self.settings.in_bfloat16)
        self.parameters = self.trained.parameters
        self.row_losses = RowLosses(
            self.scorer,
            self.device,
            prefix=self._shared_prefix(),
            micro_tokens=self.settings.micro_tokens,
            check_stop=self._check_stop,
        )
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=spec.hyper.learning_rate, weight_decay=spec.hyper.weight_decay
        )
        lengths = [len(row.ids) - self.row_losses.prefix for row in self.train_rows]
        self.schedule = Schedule(lengths, spec, micro_tokens=self.settings.micro_tokens, group=self.group)
        self.gate_losses: dict[str, float] = {}  # by name
        self.progress = ProgressEstimate(spec, prepared, self.train_rows, self.schedule, emit)
        self.checkpoints = Checkpoints(
            folder,
            identity_of(spec, prepared, self.own.sha256, self.settings),
            self.trained,
            self.optimizer,
            group=self.group,
            stop=stop,
            warn=self._warn,
        )
        self.position = self.checkpoints.begin()
        log.info("train.begin step=%d of %d, %d rows", self.position.step, self.schedule.steps, len(self.train_rows))

    def _trained(self, model: Any) -> Trained:
        spec, hyper = self.spec, self.spec.hyper
        if spec.method != "lora":
            load = partial(load_again, self.prepared.base, spec, torch.device("cpu"))
            return AllWeights(model, dropout=self.settings.dropout, original=load)
        return LoraDelta(model, rank=hyper.rank, alpha=hyper.alpha, dropout=self.settings.dropout, rslora=hyper.rslora)

    def _own_answers(self, model: Any) -> OwnAnswers:
        spec = self.spec
        if spec.method == "scratch" or not (spec.ability or spec.hyper.rehearsal):
            return NOTHING  # a new model has nothing to retain
        cache = Path(spec.cache) if spec.cache else None
        return own_answers(
            self.folder, cache, self.prepared.base, spec.instructions, model, self._check_local_stop, self.emit
        )

    def run(self) -> None:
        self.progress.emit_plan()
        try:
            self._train()
        except Interrupted:
            with suppress(Interrupted):  # disk full: the previous checkpoint stays
                self._save()
            raise
        judged = self._evaluate()
        self.emit(judged)
        losses = losses_of(self.position, self.gate_losses)
        manifest = manifest_of(
            self.spec,
            self.prepared,
            self.position,
            self.trained,
            dropout=self.settings.dropout,
            epochs_done=self.position.step / self.schedule.steps_per_epoch,
            losses=losses,
            judged=judged,
            processes=self.group.size,
        )
        if self.spec.method == "lora":
            tensors = self.trained.tensors()
            write = partial(write_adapter, tensors=tensors, manifest=manifest)
        else:
            state = {name: whole(tensor).cpu() for name, tensor in self.model.state_dict().items()}
            write = partial(write_model, model=self.model, state=state, tokenizer=self.prepared.base.tokenizer)
        if self.group.leads:
            self.checkpoints.with_space(
                lambda: publish(self.folder, write, manifest.as_dict(), model_card(manifest)), step=self.position.step
            )
        self.group.wait()
        self.emit(done(self.position.step, self.position.seconds, losses))

    def _train(self) -> None:
        """Train until the last step or until patience ends; then load the best checkpoint."""
        while True:
            try:
                if self.position.step not in self.position.validated and self.schedule.validates_after(
                    self.position.step
                ):
                    self._validate()
                if self._is_over():
                    break
                self._advance()
            except Unstable as error:
                self._return_to_best(error)
        if self.position.step < self.schedule.steps:
            self._warn("stopped_early", step=self.position.step, steps=self.schedule.steps, best=self.position.best)
            self.progress.emit_end(self.position)
        if self.position.best < self.position.step and self.checkpoints.load(BEST) is None:
            detail = f"the checkpoint of step {self.position.best} cannot be read any more"
            raise JobError("training.why_damaged", detail)

    def _advance(self) -> None:
        began = time.monotonic()
        taken = self._step()
        self.progress.count(self.position, taken, time.monotonic() - began)
        if self._has_diverged(LOST_STEPS):
            raise Unstable("diverged", at=self.position.step, loss=taken.loss, before=self._untrained_loss())
        self.progress.emit_step(self.position, taken)
        if self.checkpoints.is_due(began):
            self._save()

    def _step(self) -> StepResult:
        try:
            return self.take_step()
        except torch.OutOfMemoryError as error:
            self._checkpoint_activations(error)
        return self._step()  # the failed step changed nothing

    def _checkpoint_activations(self, error: Exception) -> None:
        """Switch to activation checkpointing. Raises JobError if on, set to off, or with several processes."""
        self.optimizer.zero_grad(set_to_none=True)
        if self.checkpointing or self.group.size > 1 or self.spec.hyper.checkpointing == "off":
            raise refused("out_of_memory", device=self.device) from error
        log.warning("train.out_of_memory step=%d: activations are computed twice", self.position.step)
        checkpoint_activations(self.model)
        self.checkpointing = True

    def _is_over(self) -> bool:
        patience = self.spec.hyper.patience
        return self.position.step >= self.schedule.steps or 0 < patience <= self.position.without_gain

    def _has_diverged(self, steps: int) -> bool:
        """Whether the mean loss of the last steps is far above the untrained loss."""
        last = self.position.losses[-steps:]
        return len(last) == steps and not sum(last) / steps <= self._untrained_loss() + LOST_NATS

    def _untrained_loss(self) -> float:
        return max(self.position.validated[0], *self.position.losses[:1])

    def warm_up(self) -> tuple[int, float]:
        """(tokens, seconds) of some steps at learning rate 0, after the one with most memory. Raises Interrupted."""
        steps = [self.schedule.step(at) for at in range(self.schedule.steps_per_epoch)]
        lengths = [[sum(len(self.train_rows[row].ids) for row in micro) for micro in step] for step in steps]
        order = sorted(range(len(steps)), key=lambda at: -sum(lengths[at]))
        self.position.rate_factor = 0.0
        self.position.step = max(range(len(steps)), key=lambda at: max(lengths[at]))
        self._step()  # first step: allocations, kernel selection
        tokens, seconds = 0, 0.0
        for at in order[len(order) // 2 :][:WARM_UP_STEPS]:
            self.position.step, began = at, time.monotonic()
            tokens += self._step().tokens
            seconds += time.monotonic() - began
            if seconds > WARM_UP_S:
                break
        self.position.step = 0
        return tokens, seconds

    def take_step(self) -> StepResult:
        """Forward, backward, clip, update. Raises Interrupted or Unstable with nothing changed."""
        step, hyper = self.position.step, self.spec.hyper
        torch.manual_seed(step_seed(hyper.seed, step, self.group.rank))
        rate = learning_rate(step, self.schedule.steps, hyper) * self.position.rate_factor
        for group in self.optimizer.param_groups:
            group["lr"] = rate

        micros = self.schedule.step(step)
        supervised = sum(sum(self.train_rows[row].supervised[1:]) for micro in micros for row in micro)
        loss = tokens = 0.0
        self.scorer.train()
        self.optimizer.zero_grad(set_to_none=True)
        for micro, counts in self.schedule.share(micros):
            self._check_stop()
            batch = self.row_losses.batch([self.train_rows[row] for row in micro])
            # Loss sum / supervised tokens of the whole step, so micro-batches and processes do not change the weights.
            part = self.scorer(batch) * (counts / supervised)
            part.backward()
            loss += float(part.detach())
            tokens += batch.tokens * counts
        self._check_stop()
        self.group.add_gradients(self.parameters)
        loss, tokens = self.group.add([loss, tokens])
        clipped = clip(self.parameters, hyper, self.group) if math.isfinite(loss) else None
        if clipped is None:
            raise Unstable("non_finite", at=step + 1)
        self.optimizer.step()
        return StepResult(loss, clipped.norm, clipped.fraction, round(tokens))

    def _return_to_best(self, error: Unstable) -> None:
        """Return once to the best checkpoint with half the learning rate. Raises JobError the second time.

        The newest checkpoint depends on timing and may have diverged already.
        """
        failed_factor, rate = self.position.rate_factor, self.spec.hyper.learning_rate
        position = self.checkpoints.load(BEST)
        if position is None or failed_factor < 1:
            fields = {**error.fields, "rate": f"{min(rate / 4, HyperParameters().learning_rate):g}"}
            raise refused(f"lost_{error.key}", **fields)
        self.position = position
        self.position.rate_factor = failed_factor / 2
        self._save()
        self._warn(error.key, **error.fields, step=position.step, rate=f"{rate / 2:g}")

    def _validate(self) -> None:
        """Validation loss; writes BEST if it improved, and a checkpoint."""
        position, rows = self.position, self.prepared.part(self.prepared.split.validation)
        best_before = position.validated.get(position.best, math.inf)
        loss = self.row_losses.mean(rows)
        trim_heap()  # steps of varying lengths fragment the heap
        if not math.isfinite(loss):
            if not position.step:
                raise JobError("training.why_not_finite", "the loss is not finite before the first step")
            raise Unstable("non_finite", at=position.step)
        untrained = position.validated.get(0, math.inf)
        if untrained <= best_before and loss > untrained + LOST_VALIDATION:
            raise Unstable("diverged", at=position.step, loss=loss, before=untrained)
        position.validated[position.step] = loss
        if position.best == position.step:
            self.checkpoints.write(BEST, position)
        self._save()
        if position.step:
            self.emit(Evaluated(step=position.step, split="validation", loss=loss, rows=len(rows)))

    def _evaluate(self) -> Judged:
        """Evaluate against the champion on the test rows."""
        evaluator = Evaluator(
            self.folder, self.spec, self.prepared, self.own, self.trained, self.row_losses, self._warn, self._write
        )
        evaluation = evaluator.evaluate(nullcontext, self.emit, step=self.position.step)
        self.gate_losses |= evaluation.losses
        return evaluation.judged

    def _write(self, path: Path, content: bytes) -> None:
        if self.group.leads:
            self.checkpoints.with_space(lambda: files.write(path, content), step=self.position.step)

    def _warn(self, key: str, **fields: object) -> None:
        self.emit(Warned(say(self.spec.language, f"data.warn_{key}", **fields)))

    @torch.no_grad()
    def _shared_prefix(self) -> int:
        """Length of the prefix for packing; 0 where packing does not pay or is not exact for this model."""
        prefix = shared_prefix([*self.prepared.rows, *self.own.rehearsed, *self.own.measured])
        text = self.model.config.get_text_config()
        if not self.settings.share_prefix or prefix < LEAST_PREFIX or getattr(text, "sliding_window", None):
            return 0
        packed_attention.use(self.model)
        self.scorer.eval()
        two = self.train_rows[:2]
        packed, padded = self.scorer(pack(two, self.device, prefix=prefix)), self.scorer(collate(two, self.device))
        if not torch.allclose(packed, padded, rtol=1e-3):
            log.warning("train.not_packed: packed %g, padded %g", packed, padded)
            return 0
        return prefix

    def _save(self) -> None:
        """Write a checkpoint, unless the last step diverged."""
        if self.position.validated and not self._has_diverged(1):
            self.checkpoints.save(self.position)

    def _check_local_stop(self) -> None:
        """Not collective."""
        if self.stop.is_set():
            raise Interrupted

    def _check_stop(self) -> None:
        """Collective."""
        if self.group.any(self.stop.is_set()):
            raise Interrupted


def step_seed(seed: int, step: int, rank: int = 0) -> int:
    """Seed of one process for one optimiser step."""
    text = f"{seed}:{step}:{rank}" if rank else f"{seed}:{step}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def _silent(event: JobEvent) -> None:
    """Emit of all ranks but 0."""
