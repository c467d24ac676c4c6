"""What can be set: one frozen dataclass per table of the configuration, and what each key means.

Knows nothing of files, nor of who uses a value.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from core.config.sections import MAX_DEADLINE_S, PRESETS, HyperParameters, ModelSettings, RemoteSettings
from core.types import Limits

_MOST = 1_000_000_000  # of what has no nearer bound
_MOST_DAYS = 36_500
NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")


@dataclass(frozen=True, slots=True)
class EngineChoice(RemoteSettings):
    kind: str = "local"
    script: str = ""


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """How a channel answers unless it says otherwise."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    deadline_s: float = 120.0


@dataclass(frozen=True, slots=True)
class Finetune(HyperParameters):
    """What is not set is what the preset says."""

    threads: int = 1
    nice: int = 10
    allow_training_on: tuple[str, ...] = ()

    @property
    def hyper(self) -> HyperParameters:
        return HyperParameters(**{one.name: getattr(self, one.name) for one in fields(HyperParameters)})


@dataclass(frozen=True, slots=True)
class Retention:
    """How long what is kept (core.privacy.retention)."""

    conversation_hours: float = 24
    payload_minutes: float = 15
    dead_days: float = 7
    dataset_days: float = 30
    audit_days: float = 400


@dataclass(frozen=True, slots=True)
class Privacy(Retention):
    key_file: str = ""

    @property
    def retention(self) -> Retention:
        return Retention(**{one.name: getattr(self, one.name) for one in fields(Retention)})


@dataclass(frozen=True, slots=True)
class Log:
    level: str = "info"


@dataclass(frozen=True, slots=True)
class Metrics:
    listen: str = ""


@dataclass(frozen=True, slots=True)
class PartnerSeed:
    title: str = ""
    share: float = 0.0
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class ChannelSeed:
    """A channel to create where it is missing. `limits` holds the values that differ from [limits]."""

    title: str = ""
    partner: str = "owner"
    instructions: str = ""
    language: str = ""
    questions: tuple[str, ...] = ()
    bind: tuple[str, ...] = ()
    temperature: float | None = None
    top_p: float | None = None
    limits: Limits = field(default_factory=Limits)


@dataclass(frozen=True, slots=True)
class BotTable:
    """[bots.NAME]: `kind` is the bot's entry point, NAME unless given; `settings` are handed to it as they are."""

    kind: str
    settings: Mapping[str, object] = field(repr=False)


def presets(chosen: Mapping[str, Any]) -> Mapping[str, HyperParameters]:
    """What [finetune] comes to under each preset; what was chosen wins over it."""
    own = {one.name: chosen[one.name] for one in fields(HyperParameters) if one.name in chosen}
    return {name: HyperParameters(**{**PRESETS[name], **own, "preset": name}) for name in PRESETS}


@dataclass(frozen=True, slots=True)
class Config:
    model: ModelSettings = field(default_factory=ModelSettings)
    engine: EngineChoice = field(default_factory=EngineChoice)
    generation: GenerationDefaults = field(default_factory=GenerationDefaults)
    limits: Limits = field(default_factory=Limits)
    finetune: Finetune = field(default_factory=Finetune)
    finetune_presets: Mapping[str, HyperParameters] = field(default_factory=lambda: presets({}), compare=False)
    privacy: Privacy = field(default_factory=Privacy)
    log: Log = field(default_factory=Log)
    metrics: Metrics = field(default_factory=Metrics)
    partners: Mapping[str, PartnerSeed] = field(default_factory=dict)
    channels: Mapping[str, ChannelSeed] = field(default_factory=dict)
    bots: Mapping[str, BotTable] = field(default_factory=dict)
    file: Path | None = None
    secrets: frozenset[str] = field(default=frozenset(), repr=False)  # their values: never shown, never logged


@dataclass(frozen=True, slots=True)
class Key:
    """What a key means, and which of its type's values are allowed. `above` is excluded, `low` and `high` are not.

    The value of a `secret` one is never shown.
    """

    meaning: str
    choices: tuple[str, ...] = ()
    low: float | None = None
    high: float | None = None
    above: float | None = None
    pattern: str = ""
    secret: bool = False

    def refuse(self, value: object) -> str:
        """What is allowed, if `value` is not; else nothing."""
        if any(isinstance(one, str) and "\0" in one for one in (value if isinstance(value, tuple) else (value,))):
            return "must have no NUL character, which no chat can show"
        if isinstance(value, str):
            if self.choices and value not in self.choices:
                return f"must be one of {', '.join(self.choices)}{nearest(value, self.choices)}"
            if self.pattern and not re.fullmatch(self.pattern, value):
                return f"must look like {self.pattern}"
        if isinstance(value, int | float):
            if self.low is not None and not value >= self.low:
                return f"must be at least {self.low:.10g}"
            if self.above is not None and not value > self.above:
                return f"must be above {self.above:.10g}"
            if self.high is not None and not value <= self.high:
                return f"must be at most {self.high:.10g}"
        return ""


KEYS: Mapping[str, Mapping[str, Key]] = {
    "model": {
        "name": Key('"demo", a local folder, or a Hugging Face id', pattern=r"\S(.*\S)?"),
        "device": Key("auto, cpu, cuda or cuda:N", pattern=r"auto|cpu|cuda(:\d+)?"),
        "dtype": Key("how weights are held", choices=("auto", "float32", "bfloat16", "float16")),
        "quantization": Key("fewer bits per weight", choices=("none", "int8", "8bit", "4bit")),
        "revision": Key("the revision of a Hugging Face id; empty is its newest"),
    },
    "engine": {
        "kind": Key(
            "local runs the model here, remote on an OpenAI-compatible server; scripted is a table, for tests",
            choices=("local", "remote", "scripted"),
        ),
        "script": Key("file of the scripted engine's answers"),
        "max_rows": Key("replies that are generated at once", low=1, high=1024),
        "max_context": Key("tokens of one conversation, prompt and reply", low=64, high=_MOST),
        "max_waiting": Key("replies that may wait for a row; more are refused as busy", low=1, high=_MOST),
        "adapters_at_once": Key("different adapters that run at once; 0 is as many as rows", low=0, high=1024),
        "adapters_in_memory": Key("adapters kept ready for use", low=1, high=_MOST),
        "threads": Key("CPU threads of the model; 0 is all cores", low=0, high=1024),
        "reuse_mib": Key("memory for conversations between their turns, in MiB; 0 keeps nothing", low=0, high=_MOST),
        "url": Key("of the server, for remote", pattern=r"(https?://[^/\s@]+(/\S*)?)?"),
        "api_key": Key("the server's key", secret=True),
        "model_there": Key("the base model's id at the server; empty is the only one it has"),
        "adapters_there": Key("the adapters folder as the server sees it; empty is the same path as here"),
        "fingerprint": Key("of the base model's weights, where model.name is a folder without them"),
        "connect_s": Key("seconds to reach the server", above=0, high=600),
        "first_token_s": Key("seconds to the first token of an answer", above=0, high=3600),
        "next_token_s": Key("seconds from one token to the next", above=0, high=3600),
    },
    "generation": {
        "temperature": Key("0 always takes the likeliest token", low=0, high=2),
        "top_p": Key("share of the likeliest tokens to draw from", above=0, high=1),
        "top_k": Key("number of the likeliest tokens to draw from; 0 is all", low=0, high=_MOST),
        "min_p": Key("least probability, relative to the likeliest token's", low=0, high=1),
        "repetition_penalty": Key("above 1 discourages repetition", low=0.01, high=10),
        "stop": Key("strings that end a reply"),
        "deadline_s": Key("seconds after which what exists is the answer", above=0, high=MAX_DEADLINE_S),
    },
    "limits": {
        "per_minute": Key("messages of one person in a minute; 0 is no limit", low=0, high=_MOST),
        "per_hour": Key("messages of one person in an hour; 0 is no limit", low=0, high=_MOST),
        "tokens_in": Key("longest prompt in tokens; 0 is what the model can take", low=0, high=_MOST),
        "tokens_out": Key("longest reply in tokens", low=1, high=_MOST),
    },
    "finetune": {
        "preset": Key("what the other keys here are unless they are set", choices=("auto", "card", "thorough")),
        "rank": Key("rank of the adapter's matrices", low=1, high=256),
        "alpha": Key("the adapter is scaled by alpha / rank", low=1, high=4096),
        "rslora": Key("the adapter is scaled by alpha / sqrt(rank) instead"),
        "dropout": Key('on the adapter\'s input; "auto" is by the number of rows', low=0, high=0.9),
        "learning_rate": Key("of AdamW, at its highest", above=0, high=1),
        "epochs": Key("rounds over the rows", low=1, high=1000),
        "patience": Key("evaluations without a gain until it stops; 0 never stops early", low=0, high=1000),
        "rows_per_step": Key("rows of one optimiser step", low=1, high=4096),
        "clip_value": Key("each gradient value is cut to [-x, x]; 0 is off", low=0, high=_MOST),
        "clip_norm": Key("the gradient's joint norm is cut to x; 0 is off", low=0, high=_MOST),
        "weight_decay": Key("of AdamW", low=0, high=10),
        "warmup": Key("share of the steps in which the learning rate rises", low=0, high=1),
        "schedule": Key("how the learning rate falls", choices=("cosine", "constant")),
        "max_tokens": Key("longest conversation that is trained on", low=16, high=_MOST),
        "quantization": Key(
            "bits per weight of the base while it is trained on; 4bit is QLoRA", choices=("none", "4bit")
        ),
        "checkpointing": Key(
            "compute activations twice instead of keeping them; auto is where memory asks for it",
            choices=("auto", "on", "off"),
        ),
        "rehearsal": Key("rows of what the base model can do, for each row of the data set; 0 is none", low=0, high=10),
        "seed": Key("of order and dropout", low=0, high=2**32 - 1),
        "threads": Key("CPU threads of the trainer", low=1, high=1024),
        "nice": Key("how far the trainer stands back for chat", low=0, high=19),
        "allow_training_on": Key(
            "platforms whose terms forbid training and on which other terms apply to you: consenting people's words "
            "there may be used. A platform's bot declares what its terms forbid"
        ),
    },
    "privacy": {
        "conversation_hours": Key("how long turns of a conversation are kept", above=0, high=_MOST_DAYS * 24),
        "payload_minutes": Key("how long a message is kept after its answer", above=0, high=_MOST_DAYS * 1440),
        "dead_days": Key(
            "how long an update that could not be read, and the address of an ended job, are kept",
            above=0,
            high=_MOST_DAYS,
        ),
        "dataset_days": Key("how long a data set is kept after its last job", above=0, high=_MOST_DAYS),
        "audit_days": Key("how long the audit log is kept", above=0, high=_MOST_DAYS),
        "key_file": Key("the key of stored text; empty is secret.key in the home"),
    },
    "log": {"level": Key("what is written to standard error", choices=("debug", "info", "warning", "error"))},
    "metrics": {
        "listen": Key(
            "address of the numbers for Prometheus, such as 127.0.0.1:9464; empty is off", pattern=r"(\S+:\d{1,5})?"
        ),
    },
    "partners.NAME": {
        "title": Key("what people read; empty is NAME"),
        "share": Key("the partner's share of the revenue", low=0, high=1),
        "weight": Key("the partner's share of the model when it is busy, beside 1 of others", low=0.01, high=100),
    },
    "channels.NAME": {
        "title": Key("what people read; empty is NAME"),
        "partner": Key("whose channel it is", pattern=NAME.pattern),
        "instructions": Key("what the model is told before every conversation"),
        "language": Key("of commands and notices; empty is the person's", choices=("", "en", "zh")),
        "questions": Key("what people may tap to begin with"),
        "bind": Key('places: "platform:account" or "platform:account/place"'),
        "temperature": Key("instead of [generation] temperature", low=0, high=2),
        "top_p": Key("instead of [generation] top_p", above=0, high=1),
        "limits": Key("a table of [limits] keys that differ here"),
    },
}
SECTIONS: Mapping[str, type] = {
    "model": ModelSettings,
    "engine": EngineChoice,
    "generation": GenerationDefaults,
    "limits": Limits,
    "finetune": Finetune,
    "privacy": Privacy,
    "log": Log,
    "metrics": Metrics,
    "partners.NAME": PartnerSeed,
    "channels.NAME": ChannelSeed,
}
GROUPS = ("partners", "channels", "bots")


def nearest(name: str, known: Iterable[str]) -> str:
    """The known name that was meant, as the end of a sentence."""
    found = get_close_matches(name, list(known), 1)
    return f"; did you mean {found[0]}?" if found else ""
