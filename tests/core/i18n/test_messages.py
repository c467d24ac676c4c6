"""Every sentence is there in every language, with the same fields; every key in the code has its sentence."""

from __future__ import annotations

import ast
import string
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import core.i18n
from core.i18n import messages
from core.i18n.messages import Lazy, duration, language_name, languages, resolve, say
from tests.support.paths import ROOT

FOLDER = Path(core.i18n.__file__).parent
NO_KEYS = {"users.info", "slack.away", "slack.no_socket"}  # a method of Slack's and log events, written as keys are
OTHERS = ["zh"]  # the shipped languages beside English; others may be incomplete


def sentences(language: str) -> dict[str, str]:
    table = tomllib.loads((FOLDER / f"{language}.toml").read_text(encoding="utf-8"))
    return {f"{section}.{name}": text for section, named in table.items() for name, text in named.items()}


ENGLISH = sentences("en")
SECTIONS = {key.partition(".")[0] for key in ENGLISH} | {"terminal", "training", "privacy", "doctor"}


def fields(sentence: str) -> set[str]:
    return {name for _, name, _, _ in string.Formatter().parse(sentence) if name is not None}


def keys_in(path: Path) -> set[str]:
    """The keys that a file names, but for the events that it logs."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    logged = {
        inside
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func).startswith(("log.", "logging."))
        for argument in node.args
        for inside in ast.walk(argument)
    }
    return {
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in logged and _is_key(node.value)
    }


def _is_key(text: str) -> bool:
    section, _, name = text.partition(".")
    return section in SECTIONS and name.replace("_", "").isalnum() and name.islower() and not name.endswith("_")


def test_english_and_chinese_are_there() -> None:
    assert set(languages()) >= {"en", "zh"}
    assert languages()[0] == "en"


@pytest.mark.parametrize("language", OTHERS)
def test_no_sentence_is_missing(language: str) -> None:
    assert set(sentences(language)) == set(ENGLISH)


@pytest.mark.parametrize("language", OTHERS)
def test_a_sentence_has_the_same_fields_in_every_language(language: str) -> None:
    other = sentences(language)
    assert {key for key in ENGLISH if key in other and fields(ENGLISH[key]) != fields(other[key])} == set()


@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_tone(language: str) -> None:
    for key, text in sentences(language).items():
        assert text.strip(), key
        assert "!" not in text, key
        assert "！" not in text, key
        assert not any(0x1F300 <= ord(c) <= 0x1FAFF for c in text), key


def test_every_key_in_the_code_has_its_sentence() -> None:
    files = [path for package in ("core", "bots", "finetune") for path in (ROOT / package).rglob("*.py")]
    missing = {(str(path.relative_to(ROOT)), key) for path in files for key in keys_in(path) - set(ENGLISH) - NO_KEYS}
    assert missing == set()


def test_a_missing_field_or_language_does_not_cost_the_sentence() -> None:
    assert "…" in say("en", "error.limit_minute")
    assert say("xx", "error.engine") == say("en", "error.engine")
    assert say("zh-Hans-CN", "error.engine") == say("zh", "error.engine") != say("en", "error.engine")
    assert say("en", "no.such") == "no.such"


def test_fields_are_filled_and_never_read_as_templates() -> None:
    assert say("en", "error.unknown", name="{x} {0} %s") == "There is no {x} {0} %s here."
    assert "1,000,000" in say("en", "service.message_too_large", size=1_000_000, limit=9999)
    assert "9999" in say("en", "service.message_too_large", size=1_000_000, limit=9999)


def test_a_sentence_in_a_sentence_speaks_its_language() -> None:
    need = Lazy("setting.whole", low=0, high=9)
    said = say("zh", "setting.refused", setting="per_minute", value="x", need=need)
    assert say("zh", "setting.whole", low=0, high=9) in said


def test_a_number_picks_the_plural_form_of_its_language(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [duration("en", n * 86_400) for n in (2, 3)] == ["2 days", "3 days"]
    assert say("en", "duration.days", n=1) == "1 day"
    assert say("en", "duration.days", n=12_345) == "12,345 days"
    assert say("zh", "duration.days", n=1) == "1 天"
    assert say("en", "duration.days") == "…"


@pytest.fixture
def german(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A third language of three sentences, beside the shipped ones."""
    for path in FOLDER.glob("*.toml"):
        (tmp_path / path.name).write_text(path.read_text("utf-8"), "utf-8")
    (tmp_path / "de.toml").write_text(
        '[duration]\ndays = "{n:one Tag|other Tage}"\n\n[service]\nstopped = "Angehalten."\nempty_message = "Leer."\n',
        "utf-8",
    )
    caches = (messages.languages, messages._sentences, messages._names)
    monkeypatch.setattr(messages.resources, "files", lambda package: tmp_path)
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


@pytest.mark.usefixtures("german")
def test_a_language_is_one_file_and_english_says_the_rest() -> None:
    assert languages() == ("en", "de", "zh")
    assert (resolve("de-AT"), resolve("Deutsch"), resolve("german")) == ("de", "de", "de")
    assert language_name("de") == "Deutsch"
    assert say("de", "service.stopped") == "Angehalten."
    assert [say("de", "duration.days", n=n) for n in (1, 2, 12_345)] == ["1 Tag", "2 Tage", "12.345 Tage"]
    assert say("de", "error.limit_minute", limit=1, wait="25 s") == say(
        "en", "error.limit_minute", limit=1, wait="25 s"
    )


def test_a_bot_brings_sentences_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "echo_bot"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "en.toml").write_text('[echo]\nhello = "Hello, {name}"\n[error]\nengine = "stolen"\n', "utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(messages, "_packages", ["core.i18n"])
    messages.add_sentences("echo_bot")
    assert say("en", "echo.hello", name="Kim") == say("zh", "echo.hello", name="Kim") == "Hello, Kim"
    assert say("en", "error.engine") == ENGLISH["error.engine"]
    messages._sentences.cache_clear()


@pytest.mark.parametrize(
    ("tag", "language"),
    [
        ("en", "en"),
        ("en-GB", "en"),
        ("EN_us.UTF-8", "en"),
        ("zh-hans", "zh"),
        ("zh_CN", "zh"),
        ("中文", "zh"),
        ("Chinese", "zh"),
        ("sv", ""),
        ("", ""),
        ("auto", ""),
        ("../en", ""),
    ],
)
def test_a_tag_means_a_language_or_none(tag: str, language: str) -> None:
    assert resolve(tag) == language


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0, "1 s"), (24.2, "25 s"), (90, "90 s"), (91, "2 min"), (180, "3 min"), (7200, "2 h"), (8 * 86_400, "8 days")],
)
def test_durations_are_rounded_up_in_one_unit(seconds: float, said: str) -> None:
    assert duration("en", seconds) == said
    assert duration("zh", seconds) != said
