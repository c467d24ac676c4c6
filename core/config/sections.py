"""Sections that other packages take as values: the base model, the engines, a fine-tune."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from core.config.keys import key

MOST = 1_000_000_000  # where nothing else bounds a number
MAX_DEADLINE_S = 86_400.0


@dataclass(frozen=True, slots=True)
class ModelSettings:
    """The base model."""

    name: str = key(
        "demo",
        '"demo", a local folder, or a Hugging Face id',
        pattern=r"\S(.*\S)?",
        shape="demo, folder/model or org/model",
    )
    device: str = key(
        "auto", "auto, cpu, cuda or cuda:N", pattern=r"auto|cpu|cuda(:[0-9]{1,3})?", shape="auto, cpu, cuda or cuda:N"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = key("auto", "type of the weights in memory")
    quantization: Literal["none", "int8", "8bit", "4bit"] = key(
        "none", "bits per weight: int8 on a CPU, 8bit and 4bit on CUDA"
    )
    revision: str = key("", "revision of a Hugging Face id; empty is the newest")


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """Bounds of the local engine."""

    max_rows: int = key(8, "replies generated at once", ge=1, le=1024)
    max_context: int = key(4096, "tokens of one conversation, prompt and reply", ge=64, le=MOST)
    max_waiting: int = key(256, "replies that may wait for a row; more are refused as busy", ge=1, le=MOST)
    adapters_at_once: int = key(0, "adapters that run at once; 0 is as many as rows", ge=0, le=1024)
    adapters_in_memory: int = key(64, "adapters kept in memory, ready for use", ge=1, le=MOST)
    threads: int = key(0, "CPU threads of the model; 0 is all cores", ge=0, le=1024)
    reuse_mib: int = key(512, "MiB of key-value cache kept between turns; 0 keeps none", ge=0, le=MOST)


@dataclass(frozen=True, slots=True)
class RemoteSettings(EngineSettings):
    """An OpenAI-compatible server in place of the local engine. `max_rows` bounds the requests sent to it at once."""

    url: str = key(
        "",
        "base URL of the server of a remote engine",
        pattern=r"(https?://[^/\s@]+(/\S*)?)?",
        shape="http://127.0.0.1:8000",
    )
    api_key: str = key("", "API key of the server; better env:NAME", secret=True)
    model_there: str = key("", "id of the base model at the server; empty is the only one that it has")
    adapters_there: str = key("", "path of the adapters folder at the server; empty is the same as here")
    fingerprint: str = key("", "fingerprint of the base weights, if the folder in model.name holds none")
    connect_s: float = key(5.0, "seconds to connect to the server", gt=0, le=600)
    first_token_s: float = key(60.0, "seconds to the first token of an answer", gt=0, le=3600)
    next_token_s: float = key(30.0, "seconds from one token to the next", gt=0, le=3600)


PRESETS: Mapping[str, Mapping[str, Any]] = {
    "auto": {},
    "card": {"learning_rate": 1e-4, "dropout": 0.1, "clip_value": 0.5, "epochs": 4, "schedule": "constant"},
    "thorough": {"learning_rate": 5e-4, "epochs": 8, "rank": 32, "alpha": 64, "rehearsal": 0.5},
}


@dataclass(frozen=True, slots=True)
class HyperParameters:
    """The defaults are the preset "auto"; "card" is slow and careful, "thorough" takes long and may stop early."""

    preset: Literal["auto", "card", "thorough"] = key(
        "auto", "what the other keys of this table are unless they are set"
    )
    rank: int = key(16, "rank of the LoRA matrices", ge=1, le=256)
    alpha: int = key(32, "LoRA scale: alpha / rank", ge=1, le=4096)
    rslora: bool = key(False, "scale by alpha / sqrt(rank) instead (Kalajdzievski 2023, arXiv 2312.03732)")
    dropout: float | None = key(None, 'dropout of the LoRA input; "auto" follows the number of rows', ge=0, le=0.9)
    learning_rate: float = key(1e-3, "peak learning rate of AdamW", ge=1e-8, le=1)
    epochs: int = key(2, "passes over the rows", ge=1, le=1000)
    patience: int = key(2, "evaluations without improvement before it stops early; 0 never does", ge=0, le=1000)
    rows_per_step: int = key(4, "rows of one optimizer step", ge=1, le=4096)
    clip_value: float = key(1.0, "bound of each gradient value; 0 is off", ge=0, le=MOST)
    clip_norm: float = key(1.0, "bound of the gradient norm; 0 is off", ge=0, le=MOST)
    weight_decay: float = key(0.0, "weight decay of AdamW", ge=0, le=10)
    warmup: float = key(0.05, "fraction of the steps in which the learning rate rises", ge=0, le=1)
    schedule: Literal["cosine", "constant"] = key("cosine", "learning rate schedule after the warm-up")
    max_tokens: int = key(1024, "tokens of the longest conversation that is trained on", ge=16, le=131_072)
    quantization: Literal["none", "4bit"] = key(
        "none", "bits per weight of the base model during training; 4bit is QLoRA (CUDA, bitsandbytes)"
    )
    checkpointing: Literal["auto", "on", "off"] = key(
        "auto", "recompute activations instead of keeping them; auto decides by memory"
    )
    rehearsal: float = key(
        0.3, "rows of the base model's own answers for each row of the data set; 0 is none", ge=0, le=10
    )
    seed: int = key(0, "seed of row order and dropout", ge=0, le=2**32 - 1)
