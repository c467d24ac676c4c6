"""Every sentence that a person reads in a chat, by language and key. Knows nothing of who says it, or when.

A language is one TOML file here; English is the one that is complete by definition, a test holds the others to it.
"""

from __future__ import annotations

import math
import string
import tomllib
from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import Any, Self

FALLBACK = "en"
_GROUPED_FROM = 10_000
NANO = 1_000_000_000
_SMALL_NANO = NANO // 100
_MINUTE_S, _HOUR_S, _DAY_S = 60, 3600, 86_400


class Lazy(str):
    """A field that is itself a sentence: the key of one, said in the language of the sentence it stands in."""

    __slots__ = ("fields",)
    fields: Mapping[str, object]

    def __new__(cls, key: str, **fields: object) -> Self:
        made = super().__new__(cls, key)
        made.fields = fields
        return made

    def said(self, language: str) -> str:
        return say(language, str(self), **self.fields)


class Refusal(ValueError):
    """`reason` is the sentence that says why, for whoever tells a person; the error's own text is it in English."""

    def __init__(self, key: str, **fields: object) -> None:
        self.reason = Lazy(key, **fields)
        super().__init__(self.reason.said(FALLBACK))


def say(language: str, key: str, /, **fields: object) -> str:
    """The sentence `key` ("section.name"), filled. In English where the language lacks it; a missing field is "…"."""
    spoken = resolve(language) or FALLBACK
    sentence = _sentences(spoken).get(key) or _sentences(FALLBACK).get(key)
    if sentence is None:
        return key
    ready = {name: value.said(spoken) if isinstance(value, Lazy) else value for name, value in fields.items()}
    return _FORMATTER.vformat(sentence, (), ready)


def languages() -> tuple[str, ...]:
    """The languages that there are, English first."""
    files = resources.files("core.i18n").iterdir()
    found = {path.name.removesuffix(".toml") for path in files if _is_language(path.name)}
    return (FALLBACK, *sorted(found - {FALLBACK}))


def resolve(tag: str) -> str:
    """The language that a tag or a name means ("zh_CN", "zh-Hans", "中文"), or "" where it is none of ours."""
    wanted = tag.strip().lower().replace("_", "-")
    primary = wanted.partition(".")[0].partition("-")[0]
    return _names().get(wanted) or _names().get(primary, "")


def duration(language: str, seconds: float) -> str:
    """How long, rounded up, in the one unit that people would say: "25 s", "3 min", "2 h", "4 d"."""
    if seconds <= 90:
        return say(language, "duration.seconds", n=max(1, math.ceil(seconds)))
    if seconds <= 90 * _MINUTE_S:
        return say(language, "duration.minutes", n=math.ceil(seconds / _MINUTE_S))
    if seconds <= 36 * _HOUR_S:
        return say(language, "duration.hours", n=math.ceil(seconds / _HOUR_S))
    return say(language, "duration.days", n=math.ceil(seconds / _DAY_S))


def money(nano: int) -> str:
    """Nano-units in units of the currency; small amounts to the sixth place."""
    return f"{nano / NANO:,.2f}" if not nano or abs(nano) >= _SMALL_NANO else f"{nano / NANO:.6f}"


class _Formatter(string.Formatter):
    """Long whole numbers are grouped; what is missing does not cost a person the sentence."""

    def get_value(self, key: int | str, args: Any, kwargs: Mapping[str, Any]) -> Any:
        return kwargs.get(str(key), "…")

    def format_field(self, value: Any, format_spec: str) -> str:
        if value == "…":
            return "…"
        if not format_spec and type(value) is int and abs(value) >= _GROUPED_FROM:
            return f"{value:,}"
        return str(super().format_field(value, format_spec))


_FORMATTER = _Formatter()


@cache
def _sentences(language: str) -> Mapping[str, str]:
    table = tomllib.loads(resources.files("core.i18n").joinpath(f"{language}.toml").read_text(encoding="utf-8"))
    return {f"{section}.{name}": text for section, named in table.items() for name, text in named.items()}


@cache
def _names() -> Mapping[str, str]:
    """Every word that means one of our languages."""
    named = {
        _sentences(language)[key].lower(): language
        for language in languages()
        for key in ("language.name", "language.english")
    }
    return {**named, **{language: language for language in languages()}}


def _is_language(name: str) -> bool:
    return name.endswith(".toml") and not name.startswith(".")


for _language in languages():  # at import, so that nothing is read from a disk while people wait
    _sentences(_language)
_names()
