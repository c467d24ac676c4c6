"""The settings of one job as the loop needs them: checked, and with every default resolved. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass

from core.errors import JobError
from core.job import Spec

FEW_ROWS, DROPOUT_FEW, DROPOUT = 200, 0.1, 0.05
MICRO_TOKENS_CPU = 384  # about two seconds on two cores, which is how long a stop may take; larger is not faster
MICRO_TOKENS_GPU = 16384
LEAST_PREFIX = 8  # tokens; for fewer, packing saves too little to be worth its mask


def check(spec: Spec) -> None:
    """Raises JobError(fault="yours") naming the setting, its value and its range."""
    h = spec.hyper
    ranges: list[tuple[str, float | None, float, float]] = [
        ("rank", h.rank, 1, 256),
        ("alpha", h.alpha, 1, 4096),
        ("dropout", h.dropout, 0, 0.9),
        ("learning_rate", h.learning_rate, 1e-8, 1),
        ("epochs", h.epochs, 1, 1000),
        ("patience", h.patience, 0, 1000),
        ("rows_per_step", h.rows_per_step, 1, 4096),
        ("clip_value", h.clip_value, 0, 1e9),
        ("clip_norm", h.clip_norm, 0, 1e9),
        ("weight_decay", h.weight_decay, 0, 10),
        ("warmup", h.warmup, 0, 1),
        ("max_tokens", h.max_tokens, 16, 131072),
        ("rehearsal", h.rehearsal, 0, 10),
        ("threads", spec.threads, 1, 1024),
    ]
    for name, value, least, most in ranges:
        if value is not None and not (math.isfinite(value) and least <= value <= most):
            raise JobError(detail=f"finetune.{name}={value} is not within {least:g} and {most:g}", fault="yours")
    fresh = spec.fresh
    sizes = [
        ("layers", fresh.layers, 1, 200),
        ("hidden", fresh.hidden, 8, 16384),
        ("heads", fresh.heads, 1, 128),
        ("vocabulary", fresh.vocabulary, 0, 500_000),
        ("context", fresh.context, 16, 131072),
    ]
    for name, size, least, most in sizes if spec.method == "scratch" else ():
        if not least <= size <= most:
            raise JobError(detail=f"fresh.{name}={size} is not within {least:g} and {most:g}", fault="yours")
    if spec.method == "scratch" and (fresh.hidden % fresh.heads or fresh.hidden // fresh.heads % 2):
        detail = f"fresh.hidden={fresh.hidden} must be fresh.heads={fresh.heads} times an even number"
        raise JobError(detail=detail, fault="yours")
    if spec.method not in ("lora", "full", "scratch"):
        raise JobError(detail=f"method={spec.method!r} is none of lora, full, scratch", fault="yours")
    if h.schedule not in ("cosine", "constant"):
        raise JobError(detail=f"finetune.schedule={h.schedule!r} is neither cosine nor constant", fault="yours")


@dataclass(frozen=True, slots=True)
class Resolved:
    """What was left to a rule, decided."""

    dropout: float
    micro_tokens: int
    share_prefix: bool  # a dense mask of micro_tokens squared: nothing on a CPU, too much on a GPU
    in_bfloat16: bool  # products, where the weights themselves are trained in float32


def resolve(spec: Spec, *, rows: int, device: str) -> Resolved:
    hyper = spec.hyper
    by_rows = DROPOUT_FEW if rows < FEW_ROWS else DROPOUT
    return Resolved(
        dropout=by_rows if hyper.dropout is None else hyper.dropout,
        micro_tokens=MICRO_TOKENS_CPU if device == "cpu" else MICRO_TOKENS_GPU,
        share_prefix=device == "cpu",
        in_bfloat16=spec.method != "lora" and (spec.dtype == "bfloat16" or (spec.dtype == "auto" and device != "cpu")),
    )
