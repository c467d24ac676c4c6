"""The settings of one job: validated, with every default resolved."""

from dataclasses import dataclass
from typing import Any

from core.config.keys import Key, key, keys
from core.config.keys import refused as setting_refused
from core.config.schema import Finetune
from core.errors import JobError
from core.i18n.messages import Lazy, Refusal
from core.jobs.protocol import Fresh, Method, Spec

FEW_ROWS, DROPOUT_FEW, DROPOUT = 200, 0.1, 0.05
MICRO_TOKENS_CPU = 768  # a stop waits for one: some four seconds; with 384 a token takes 1.1 times as long
MICRO_TOKENS_GPU = 16384
LEAST_VOCABULARY = 256 + 3  # a token for each byte, and three of control
LEAST_PREFIX = 8  # tokens; for fewer, packing saves too little to be worth its mask


@dataclass(frozen=True, slots=True)
class Where:
    """What is trained, and on which device."""

    method: Method = key("lora", "a delta, all weights, or a model drawn anew")
    device: str = key("cpu", "device", pattern=r"cpu|cuda(:[0-9]{1,3})?", shape="cpu, cuda or cuda:N")


def refused(name: str, **fields: object) -> JobError:
    """The error for a job whose rows are fine; the sentence `name` of [data] names what is not."""
    return _error(Lazy(f"data.{name}", **fields))


def _error(reason: Lazy) -> JobError:
    return JobError(detail=reason.render("en"), fault="settings", reason=reason)


def check(spec: Spec) -> None:
    """Raises JobError(fault="settings") naming the setting, its value and what it must be."""
    _check_section("finetune", spec.hyper)
    _check_key("finetune", keys(Finetune)["threads"], spec.threads)
    if spec.method == "scratch":
        _check_section("fresh", spec.fresh)
        fresh = spec.fresh
        if 0 < fresh.vocabulary < LEAST_VOCABULARY:
            need = Refusal("setting.whole", low=LEAST_VOCABULARY, high=keys(Fresh)["vocabulary"].high)
            raise _error(setting_refused(keys(Fresh)["vocabulary"], fresh.vocabulary, need, "fresh"))
        if fresh.hidden % fresh.heads or fresh.hidden // fresh.heads % 2:
            raise refused("setting_heads", hidden=str(fresh.hidden), heads=str(fresh.heads))
    _check_section("", Where(spec.method, spec.device))


def _check_section(path: str, section: Any) -> None:
    for name, one in keys(type(section)).items():
        _check_key(path, one, getattr(section, name))


def _check_key(path: str, one: Key, value: object) -> None:
    try:
        one.read(value)
    except Refusal as refusal:
        raise _error(setting_refused(one, value, refusal, path)) from None


@dataclass(frozen=True, slots=True)
class Resolved:
    """Settings that follow from the rows and the device."""

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
