"""Sentences that people read, by language and key ("section.name").

A language is one TOML file beside this module. English is complete, a test holds the shipped languages to it, and a
sentence that a language lacks is said in English. Fields are those of `str.format`; `{n:one day|other days}` writes the
number with the word of its plural category (Unicode CLDR, by Babel).
"""

import math
import string
import tomllib
from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import Any, Self

from babel import Locale
from babel.numbers import format_decimal

FALLBACK = "en"
NANO = 1_000_000_000
_SMALL_NANO = NANO // 100
_GROUPED_FROM = 10_000
_CATEGORIES = ("zero", "one", "two", "few", "many", "other")
_packages = ["core.i18n"]


class Lazy(str):
    """A sentence as a field of another: its key, rendered in the language of the sentence around it."""

    __slots__ = ("fields",)
    fields: Mapping[str, object]

    def __new__(cls, key: str, **fields: object) -> Self:
        made = super().__new__(cls, key)
        made.fields = fields
        return made

    def render(self, language: str) -> str:
        return say(language, str(self), **self.fields)


class Refusal(ValueError):
    """A value that is refused: `reason` for a person in their language, the error's own text in English."""

    def __init__(self, key: str, **fields: object) -> None:
        self.reason = Lazy(key, **fields)
        super().__init__(self.reason.render(FALLBACK))


def say(language: str, key: str, /, **fields: object) -> str:
    """The sentence of `key`, filled. A missing field is "…"; an unknown key is returned as it is."""
    found = resolve(language) or FALLBACK
    sentence = _sentences(found).get(key)
    if sentence is None:
        found, sentence = FALLBACK, _sentences(FALLBACK).get(key)
    if sentence is None:
        return key
    ready = {name: value.render(language) if isinstance(value, Lazy) else value for name, value in fields.items()}
    return _Formatter(found).vformat(sentence, (), ready)


def add_sentences(package: str) -> None:
    """Add the sentences of a bot: `en.toml`, `zh.toml`, ... inside its package. Its sections must be its own."""
    if package not in _packages:
        _packages.append(package)
        _sentences.cache_clear()


@cache
def languages() -> tuple[str, ...]:
    """Codes of the languages that have a file, English first."""
    files = (path.name for path in resources.files("core.i18n").iterdir())
    found = {name.removesuffix(".toml") for name in files if name.endswith(".toml") and not name.startswith(".")}
    return (FALLBACK, *sorted(found - {FALLBACK}))


def resolve(tag: str) -> str:
    """The code of a language by its tag or name ("zh_CN", "zh-Hans", "中文"); "" for a language without a file."""
    wanted = tag.strip().lower().replace("_", "-")
    primary = wanted.partition(".")[0].partition("-")[0]
    return _names().get(wanted) or _names().get(primary, "")


def language_name(language: str) -> str:
    """The name of a language in itself: "English", "中文"."""
    return str(_locale(language).get_display_name())


def duration(language: str, seconds: float) -> str:
    """A duration, rounded up, in one unit: "25 s", "3 min", "2 h", "4 days"."""
    units = ((90, 1, "seconds"), (5400, 60, "minutes"), (129_600, 3600, "hours"), (math.inf, 86_400, "days"))
    unit_s, unit = next((unit_s, unit) for most_s, unit_s, unit in units if seconds <= most_s)
    return say(language, f"duration.{unit}", n=max(1, math.ceil(seconds / unit_s)))


def money(nano: int) -> str:
    """Nano-units in units of the currency; amounts below a hundredth with six decimals."""
    return f"{nano / NANO:,.2f}" if not nano or abs(nano) >= _SMALL_NANO else f"{nano / NANO:.6f}"


class _Formatter(string.Formatter):
    """Groups the digits of large integers and picks plural forms; a missing field becomes "…"."""

    def __init__(self, language: str) -> None:
        self.locale = _locale(language)

    def get_value(self, key: int | str, args: Any, kwargs: Mapping[str, Any]) -> Any:
        return kwargs.get(str(key), "…")

    def format_field(self, value: Any, format_spec: str) -> str:
        if value == "…":
            return "…"
        forms = dict(form.partition(" ")[::2] for form in format_spec.split("|"))
        if set(forms) <= set(_CATEGORIES):
            category = self.locale.plural_form(value) if isinstance(value, int | float) else "other"
            word = forms.get(category) or forms["other"]
            return f"{self.format_field(value, '')} {word}"
        if not format_spec and type(value) is int and abs(value) >= _GROUPED_FROM:
            return format_decimal(value, locale=self.locale)
        return str(super().format_field(value, format_spec))


@cache
def _locale(language: str) -> Locale:
    return Locale.parse(language, sep="-")


@cache
def _sentences(language: str) -> Mapping[str, str]:
    found: dict[str, str] = {}
    for package in _packages:
        file = resources.files(package).joinpath(f"{language}.toml")
        if not file.is_file():
            continue
        for section, named in tomllib.loads(file.read_text(encoding="utf-8")).items():
            found |= {f"{section}.{name}": text for name, text in named.items() if f"{section}.{name}" not in found}
    return found


@cache
def _names() -> Mapping[str, str]:
    """Codes, and each language's name in itself and in English, in small letters."""
    names = {language: language for language in languages()}
    for language in languages():
        for named in (_locale(language).get_display_name(), _locale(language).get_display_name("en")):
            names[str(named).lower()] = language
    return names


for _language in languages():  # read at import, so that no request waits for a disk
    _sentences(_language)
