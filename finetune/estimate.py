"""Estimates a job: steps and tokens are counted; seconds and memory are measured on a few real steps.

The largest step runs first, since it decides the peak memory. Validation, and the base model's own answers where no
earlier job cached them, are included.
"""

import math
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path

import torch

from core.jobs.protocol import Estimated, Spec
from finetune.evaluation import retention_set
from finetune.limits import held_bytes
from finetune.prepare import Emit, Prepared
from finetune.training.train import Trainer

_PROMPTS = retention_set.AT_ONCE // 2  # batch size of the measurement: half of a batch has ended on average
_TOKENS = 4  # per answer


def estimate(folder: Path, spec: Spec, prepared: Prepared, emit: Emit, stop: threading.Event) -> Estimated:
    """Raises Interrupted, JobError."""
    hyper, train = spec.hyper, prepared.part(prepared.split.train)
    prompts = retention_set.asked(prepared.base, spec.instructions)
    remembers = spec.method != "scratch"  # a new model has nothing to retain
    rehearsed = retention_set.how_many(len(prompts.rehearsed), len(train), hyper.rehearsal) if remembers else 0
    length = sum(map(len, prompts.rehearsed)) / max(1, len(prompts.rehearsed)) + retention_set.REHEARSED_TOKENS
    own = sum(len(row.ids) for row in train)
    counted = Estimated(
        rows=len(train),
        rehearsed=rehearsed,
        epochs=hyper.epochs,
        steps=math.ceil((len(train) + rehearsed) / hyper.rows_per_step) * hyper.epochs,
        tokens=round((own + rehearsed * length) * hyper.epochs),
    )
    if not spec.warm_up:
        return counted
    plain = replace(spec, ability=False, hyper=replace(hyper, rehearsal=0.0))  # without a retention set
    with tempfile.TemporaryDirectory(prefix="estimate-", dir=folder) as aside:  # leaves the job's checkpoint alone
        trainer = Trainer(Path(aside), plain, prepared, emit, stop)
        tokens, seconds = trainer.warm_up()
    work = trainer.progress.tokens_left(trainer.position) + rehearsed * length * hyper.epochs
    total = work * seconds / max(1, tokens)
    if remembers and (spec.ability or rehearsed) and not retention_set.is_kept(spec, prepared.base):
        total += _seconds_of_answers(trainer, prompts)
    return replace(counted, seconds=round(total, 1), memory_mib=_memory_mib(trainer.device))


def _seconds_of_answers(trainer: Trainer, prompts: retention_set.Asked) -> float:
    """Seconds for the base model's own answers to these prompts."""
    took = []
    for most in (1, 1 + _TOKENS):
        began = time.monotonic()
        retention_set.answer(trainer.model, prompts.measured[:_PROMPTS], most=most, ends=(), check_stop=lambda: None)
        took.append(time.monotonic() - began)
    reading, saying = (
        2 * took[0],
        max(0.0, took[1] - took[0]) / _TOKENS,
    )  # seconds of prefill, and of one decoded token, of a batch
    rehearsed, measured = (
        math.ceil(len(some) / retention_set.AT_ONCE) for some in (prompts.rehearsed, prompts.measured)
    )
    tokens = rehearsed * retention_set.REHEARSED_TOKENS + measured * retention_set.MEASURED_TOKENS
    return reading * (rehearsed + measured) + saying * tokens


def _memory_mib(device: torch.device) -> int:
    """Peak memory of this process on the training device."""
    if device.type == "cuda":
        return math.ceil(torch.cuda.max_memory_allocated(device) / 2**20)
    return math.ceil(held_bytes("VmHWM") / 2**20)
