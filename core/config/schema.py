"""Every table of config.toml, and what a channel can be set to. `Config` is a whole configuration."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic

from core.config.keys import Key, Language, Line, Listen, Percent, Place, key, keys, table
from core.config.sections import MAX_DEADLINE_S, MOST, PRESETS, HyperParameters, ModelSettings, RemoteSettings
from core.types import Limits

_DAYS = 36_500
Temperature = Annotated[float, pydantic.Field(ge=0, le=2)]
TopP = Annotated[float, pydantic.Field(ge=0.01, le=1)]
RESERVED = frozenset({"base", "all"})  # names that no channel has: base is an adapter version, all is every channel
PRICES = ("price_in", "price_out", "price_train", "share")
OWNER_PARTNER = "owner"  # the partner that every home has


@dataclass(frozen=True, slots=True)
class EngineChoice(RemoteSettings):
    """[engine]: which engine, and the bounds of every kind of engine."""

    kind: str = key(
        "local",
        "local runs the model here, remote asks an OpenAI-compatible server; scripted answers from a file, for tests",
        pattern=r"\S+",
        shape="local, remote, scripted or an installed engine's name",
    )
    script: str = key("", "file of the scripted engine's answers")


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """How a channel samples unless it is set otherwise."""

    temperature: Temperature = key(0.0, "0 always takes the likeliest token")
    top_p: TopP = key(1.0, "probability mass of the likeliest tokens to sample from")
    top_k: int = key(0, "number of the likeliest tokens to sample from; 0 is all", ge=0, le=MOST)
    min_p: float = key(0.0, "least probability, relative to that of the likeliest token", ge=0, le=1)
    repetition_penalty: float = key(1.0, "above 1 discourages repetition", ge=0.01, le=10)
    stop: tuple[str, ...] = key((), "strings that end a reply")
    deadline_s: float = key(120.0, "seconds after which a reply is cut", gt=0, le=MAX_DEADLINE_S)


@dataclass(frozen=True, slots=True)
class Finetune(HyperParameters):
    """[finetune]: what is not set is what the preset says."""

    threads: int = key(1, "CPU threads of the trainer", ge=1, le=1024)
    nice: int = key(10, "niceness of the trainer, so that chat goes first", ge=0, le=19)
    allow_training_on: tuple[str, ...] = key(
        (),
        "platforms whose terms forbid training and on which other terms apply to you: consenting people's words there"
        " may be used. A platform's bot declares what its terms forbid",
    )

    @property
    def hyper(self) -> HyperParameters:
        return HyperParameters(**{one.name: getattr(self, one.name) for one in fields(HyperParameters)})


@dataclass(frozen=True, slots=True)
class Retention:
    """How long data is kept (core.privacy.retention)."""

    conversation_hours: float = key(24.0, "hours that the turns of a conversation are kept", gt=0, le=_DAYS * 24)
    payload_minutes: float = key(15.0, "minutes that a message is kept after its answer", gt=0, le=_DAYS * 1440)
    dead_days: float = key(
        7.0, "days that an unreadable update, and the address of an ended job, are kept", gt=0, le=_DAYS
    )
    dataset_days: float = key(30.0, "days that a data set is kept after its last job", gt=0, le=_DAYS)
    audit_days: float = key(400.0, "days that the audit log is kept", gt=0, le=_DAYS)


@dataclass(frozen=True, slots=True)
class Privacy(Retention):
    key_file: str = key("", "file with the key of stored text; empty is secret.key in the home")

    @property
    def retention(self) -> Retention:
        return Retention(**{one.name: getattr(self, one.name) for one in fields(Retention)})


@dataclass(frozen=True, slots=True)
class Log:
    level: Literal["debug", "info", "warning", "error"] = key("info", "the least level that is logged")


@dataclass(frozen=True, slots=True)
class Metrics:
    listen: Listen = key("", "host:port that serves /metrics for Prometheus, say 127.0.0.1:9464; empty is off")


@dataclass(frozen=True, slots=True)
class PartnerSettings:
    """[partners.NAME]. `written` holds the keys that the file sets."""

    title: Line = key("", "name for people; empty is NAME", max_length=80, example="Acme Building AB")
    share: Percent = key(0.0, 'the partner\'s share of the revenue in percent: 30 or "30%"', example=30)
    weight: float = key(1.0, "the partner's share of a busy model: 2 is served twice as much as 1", ge=0.01, le=100)
    written: frozenset[str] = field(default=frozenset(), compare=False)


@dataclass(frozen=True, slots=True)
class ChannelSettings:
    """[channels.NAME], and what /channel set changes. `written` holds the keys that the file sets.

    A key that /channel set takes is a column of the table `channel`, but for the prices and the bindings.
    """

    title: Line = key("", "name for people; empty is NAME", chat="operator", max_length=80, example="Acme Building")
    instructions: str = key(
        "",
        "system prompt of every conversation",
        chat="operator",
        max_length=8000,
        example="You answer questions about building permits.",
    )
    language: Language = key("", "language of commands and notices; empty is the person's", chat="operator")
    questions: tuple[Annotated[Line, pydantic.Field(max_length=60)], ...] = key(
        (),
        "questions to tap below the greeting",
        chat="operator",
        max_length=4,
        example=["How long does a permit take?"],
    )
    limits: Limits = table(Limits, "keys of [limits] that differ here")
    temperature: Temperature | None = key(None, 'temperature; "auto" is that of [generation]', chat="operator")
    top_p: TopP | None = key(None, 'top_p; "auto" is that of [generation]', chat="operator")
    adapter: str = key("", "adapter name whose champion answers", chat="owner", file=False)
    price_in: int = key(0, "price of a prompt token, in billionths", chat="owner", file=False, ge=0, le=MOST)
    price_out: int = key(0, "price of a reply token, in billionths", chat="owner", file=False, ge=0, le=MOST)
    price_train: int = key(0, "price of a trained token, in billionths", chat="owner", file=False, ge=0, le=MOST)
    share: Percent = key(0.0, "the partner's share of the revenue in percent", chat="owner", file=False)
    partner: str = key(OWNER_PARTNER, "name of the partner: owner, or a NAME of [partners.NAME]", example="acme")
    bind: tuple[Place, ...] = key(
        (),
        'places that it answers in: "platform:account" or "platform:account/place"',
        chat="owner",
        example=["telegram:acme_bot", "telegram:acme_bot/start=acme", "slack:T0123456/C0123456"],
    )
    written: frozenset[str] = field(default=frozenset(), compare=False)


@dataclass(frozen=True, slots=True)
class BotTable:
    """[bots.NAME]: `kind` is the bot's entry point, NAME unless given; the bot validates its `settings`."""

    kind: str
    settings: Mapping[str, object] = field(repr=False)


def presets(chosen: Mapping[str, Any]) -> Mapping[str, HyperParameters]:
    """The hyper-parameters under each preset; what is `chosen` wins over it."""
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
    partners: Mapping[str, PartnerSettings] = field(default_factory=dict)
    channels: Mapping[str, ChannelSettings] = field(default_factory=dict)
    bots: Mapping[str, BotTable] = field(default_factory=dict)
    file: Path | None = None
    secrets: frozenset[str] = field(default=frozenset(), repr=False)  # their values: never shown, never logged


SECTIONS: Mapping[str, type] = {  # in the order in which they are shown; a bot brings the definition of its own
    "model": ModelSettings,
    "engine": EngineChoice,
    "generation": GenerationDefaults,
    "limits": Limits,
    "finetune": Finetune,
    "privacy": Privacy,
    "log": Log,
    "metrics": Metrics,
    "partners.NAME": PartnerSettings,
    "channels.NAME": ChannelSettings,
}


@cache
def channel_keys() -> Mapping[str, Key]:
    """What /channel set takes, in the order of /channel show."""
    found: dict[str, Key] = {}
    for name, one in keys(ChannelSettings).items():
        found |= keys(one.section) if one.section else {name: one}
    return {name: one for name, one in found.items() if one.chat}


@cache
def channel_columns() -> Mapping[str, Key]:
    """The settings of a channel that are columns of its table; a list is stored as lines."""
    return {name: one for name, one in channel_keys().items() if name not in (*PRICES, "bind")}
