"""The settings of one job as the loop needs them: checked, and with every default resolved. Pure."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal, get_args, get_origin, get_type_hints

from core.config.sections import HyperParameters
from core.errors import JobError
from core.i18n.messages import Lazy
from core.jobs.protocol import Method, Spec

HINTS = get_type_hints(HyperParameters)
DEVICE = re.compile(r"cpu|cuda(:\d+)?")
FEW_ROWS, DROPOUT_FEW, DROPOUT = 200, 0.1, 0.05
MICRO_TOKENS_CPU = 768  # a stop waits for one: some four seconds; with 384 a token takes 1.1 times as long
MICRO_TOKENS_GPU = 16384
LEAST_VOCABULARY = 256 + 3  # a token for each byte, and three of control
LEAST_PREFIX = 8  # tokens; for fewer, packing saves too little to be worth its mask


def refused(key: str, **fields: object) -> JobError:
    """What to raise where the rows are fine: `fields["reason"]`, a sentence of [data], says what is not."""
    reason = Lazy(f"data.{key}", **fields)
    return JobError(detail=reason.render("en"), fault="settings", reason=reason)


def check(spec: Spec) -> None:
    """Raises JobError(fault="settings") naming the setting, its value and its range."""
    h, fresh = spec.hyper, spec.fresh
    ranges: list[tuple[str, float | None, float, float]] = [
        ("finetune.rank", h.rank, 1, 256),
        ("finetune.alpha", h.alpha, 1, 4096),
        ("finetune.dropout", h.dropout, 0, 0.9),
        ("finetune.learning_rate", h.learning_rate, 1e-8, 1),
        ("finetune.epochs", h.epochs, 1, 1000),
        ("finetune.patience", h.patience, 0, 1000),
        ("finetune.rows_per_step", h.rows_per_step, 1, 4096),
        ("finetune.clip_value", h.clip_value, 0, 1e9),
        ("finetune.clip_norm", h.clip_norm, 0, 1e9),
        ("finetune.weight_decay", h.weight_decay, 0, 10),
        ("finetune.warmup", h.warmup, 0, 1),
        ("finetune.max_tokens", h.max_tokens, 16, 131072),
        ("finetune.rehearsal", h.rehearsal, 0, 10),
        ("finetune.seed", h.seed, 0, 2**63 - 1),
        ("finetune.threads", spec.threads, 1, 1024),
    ]
    sizes: list[tuple[str, float | None, float, float]] = [
        ("fresh.layers", fresh.layers, 1, 200),
        ("fresh.hidden", fresh.hidden, 8, 16384),
        ("fresh.heads", fresh.heads, 1, 128),
        ("fresh.vocabulary", fresh.vocabulary or None, LEAST_VOCABULARY, 500_000),
        ("fresh.context", fresh.context, 16, 131072),
    ]
    for name, value, least, most in [*ranges, *(sizes if spec.method == "scratch" else [])]:
        if value is not None and not (math.isfinite(value) and least <= value <= most):
            raise refused("setting_range", name=name, value=str(value), least=f"{least:g}", most=f"{most:g}")
    if spec.method == "scratch" and (fresh.hidden % fresh.heads or fresh.hidden // fresh.heads % 2):
        raise refused("setting_heads", hidden=str(fresh.hidden), heads=str(fresh.heads))
    chosen = {
        f"finetune.{name}": (getattr(h, name), hint) for name, hint in HINTS.items() if get_origin(hint) is Literal
    }
    for name, (one, kind) in {"method": (spec.method, Method), **chosen}.items():
        if one not in get_args(kind):
            raise refused("setting_choice", name=name, value=one, known=", ".join(get_args(kind)))
    if not DEVICE.fullmatch(spec.device):
        raise refused("setting_choice", name="device", value=spec.device, known="cpu, cuda, cuda:N")


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
