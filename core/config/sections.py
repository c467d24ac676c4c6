"""Settings that packages of their own rule read: of the base model, of the engines, of a fine-tune."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

MAX_DEADLINE_S = 86_400.0


@dataclass(frozen=True, slots=True)
class ModelSettings:
    """Which base model, and how it is held. `name` is "demo", a local folder or a Hugging Face id.

    device: auto, cpu, cuda, cuda:N. dtype: auto, float32, bfloat16, float16.
    quantization: none, int8 (CPU), 8bit and 4bit (CUDA).
    """

    name: str = "demo"
    device: str = "auto"
    dtype: str = "auto"
    quantization: str = "none"
    revision: str = ""


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """Bounds of the local engine. `threads` 0 means all cores; `reuse_mib` bounds what is kept between turns.

    `adapters_at_once` 0 means that every row may run with an adapter of its own. With fewer, requests whose adapter
    finds no room wait for it; `adapters_in_memory` are those that need not be read from disk.
    """

    max_rows: int = 8
    max_context: int = 4096
    max_waiting: int = 256
    adapters_at_once: int = 0
    adapters_in_memory: int = 64
    threads: int = 0
    reuse_mib: int = 512


@dataclass(frozen=True, slots=True)
class RemoteSettings(EngineSettings):
    """An OpenAI-compatible server in the place of the local engine. `max_rows` bounds the requests sent to it at once.

    `adapters_there` is the adapters folder as the server sees it; "" is the same path as here. `fingerprint` names the
    base weights where the model's folder here holds none. Time-outs: to connect, to the first token, between two.
    """

    url: str = ""
    api_key: str = field(default="", repr=False)
    model_there: str = ""
    adapters_there: str = ""
    fingerprint: str = ""
    connect_s: float = 5.0
    first_token_s: float = 60.0
    next_token_s: float = 30.0


Preset = Literal["auto", "card", "thorough"]


PRESETS: Mapping[str, Mapping[str, Any]] = {
    "auto": {},
    "card": {"learning_rate": 1e-4, "dropout": 0.1, "clip_value": 0.5, "epochs": 4, "schedule": "constant"},
    "thorough": {"learning_rate": 5e-4, "epochs": 8, "rank": 32, "alpha": 64, "rehearsal": 0.5},
}


@dataclass(frozen=True, slots=True)
class HyperParameters:
    """Of one fine-tune. Zero for a clip means off; dropout None means by the number of rows.

    The defaults are those of the preset "auto". "card" is slow and careful, as model cards have it: Adam at 1e-4 with
    dropout and clipping by value. "thorough" takes longer and stops by itself when nothing is gained any more.
    """

    preset: Preset = "auto"

    rank: int = 16
    alpha: int = 32
    rslora: bool = False  # scale by alpha / sqrt(rank) (Kalajdzievski 2023, arXiv 2312.03732)
    dropout: float | None = None
    learning_rate: float = 1e-3
    epochs: int = 2
    patience: int = 2  # evaluations on the validation rows without a gain until it stops; 0 never stops early
    rows_per_step: int = 4
    clip_value: float = 1.0
    clip_norm: float = 1.0
    weight_decay: float = 0.0
    warmup: float = 0.05
    schedule: Literal["cosine", "constant"] = "cosine"
    max_tokens: int = 1024
    quantization: Literal["none", "4bit"] = "none"  # of the base model while it is trained on; 4bit is QLoRA
    checkpointing: Literal["auto", "on", "off"] = "auto"  # compute activations twice instead of keeping them
    rehearsal: float = 0.3  # rows of what the base can do, for each row of the data set; 0 is none
    seed: int = 0
