"""What a job would take, told before it begins: steps and tokens are counted, seconds and memory are measured.

Some real steps are taken on a model that is thrown away, the largest first: it decides how much memory there
must be. Evaluations, and the base's own answers where no earlier job has left them, count for what they cost.
"""

from __future__ import annotations

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

_ASKED = (
    retention_set.AT_ONCE // 2
)  # prompts that are answered to see how fast that goes: the others of a batch have ended
_SAID = 4  # tokens of each answer


def estimate(folder: Path, spec: Spec, prepared: Prepared, emit: Emit, stop: threading.Event) -> Estimated:
    """Raises Interrupted, JobError."""
    hyper, train = spec.hyper, prepared.part(prepared.split.train)
    prompts = retention_set.asked(prepared.base, spec.instructions)
    remembers = spec.method != "scratch"  # what was never learned is not rehearsed
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
    plain = replace(spec, ability=False, hyper=replace(hyper, rehearsal=0.0))  # no answers of the base are made
    with tempfile.TemporaryDirectory(prefix="estimate-", dir=folder) as aside:  # the job's own checkpoint stays
        trainer = Trainer(Path(aside), plain, prepared, emit, stop)
        tokens, seconds = trainer.warm_up()
    work = trainer.pace.tokens_left(trainer.position) + rehearsed * length * hyper.epochs
    total = work * seconds / max(1, tokens)
    if remembers and (spec.ability or rehearsed) and not retention_set.is_kept(spec, prepared.base):
        total += _seconds_of_answers(trainer, prompts)
    return replace(counted, seconds=round(total, 1), memory_mib=_memory_mib(trainer.device))


def _seconds_of_answers(trainer: Trainer, prompts: retention_set.Asked) -> float:
    """What the base's own answers to these prompts will take."""
    took = []
    for most in (1, 1 + _SAID):
        began = time.monotonic()
        retention_set.answer(trainer.model, prompts.measured[:_ASKED], most=most, ends=(), listen=lambda: None)
        took.append(time.monotonic() - began)
    reading, saying = 2 * took[0], max(0.0, took[1] - took[0]) / _SAID  # seconds of a batch, and of a token of it
    rehearsed, measured = (
        math.ceil(len(some) / retention_set.AT_ONCE) for some in (prompts.rehearsed, prompts.measured)
    )
    tokens = rehearsed * retention_set.REHEARSED_TOKENS + measured * retention_set.MEASURED_TOKENS
    return reading * (rehearsed + measured) + saying * tokens


def _memory_mib(device: torch.device) -> int:
    """The most that this process has held, on the device that it trains on."""
    if device.type == "cuda":
        return math.ceil(torch.cuda.max_memory_allocated(device) / 2**20)
    return math.ceil(held_bytes("VmHWM") / 2**20)
