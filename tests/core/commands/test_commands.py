"""The grammar: every example is read, every mistake is answered with the nearest match and the right form."""

from __future__ import annotations

import shlex
from itertools import product

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from core.commands import registry
from core.commands.help import details
from core.commands.parser import find, lane_of, parse
from core.commands.table import COMMANDS, SETTINGS
from core.errors import BadCommand
from core.i18n.messages import languages, say
from core.types import Body, Grant, Lane, Outcome
from tests.support.documents import command_table

FORMS = [(command, form) for command in COMMANDS for form in command.forms]


def refusal(text: str, language: str = "en") -> str:
    with pytest.raises(BadCommand) as raised:
        parse(text)
    return say(language, raised.value.key, **raised.value.fields)


def test_every_example_is_read_as_its_form() -> None:
    for command, form in FORMS:
        call = parse(form.example)
        assert (call.command, call.form) == (command, form)
        assert call.key == (command.name, form.word)


def test_every_form_has_help_with_its_example() -> None:
    for language, (command, form) in product(languages(), FORMS):
        for said in (details(language, Grant.OWNER, command), details(language, Grant.OWNER, command, form.word)):
            assert form.example in said
            assert "help." not in said
            assert "parameter." not in said
        assert command.help(language) != f"help.{command.name}"


def test_help_of_one_form_shows_that_form_alone() -> None:
    said = details("en", Grant.ANYONE, find("channel"), "set")
    assert "/channel set" in said
    assert "/channel archive" not in said
    assert say("en", "help.who_operator") in said


def test_every_form_has_a_handler_and_a_missing_one_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import core.chat.dispatch  # noqa: F401 - registers all handlers

    monkeypatch.delitem(registry._registered, ("adapter", "promote"))
    with pytest.raises(LookupError, match="/adapter promote"):
        registry.check_complete()


def test_a_handler_for_no_form_or_a_second_one_is_refused() -> None:
    import core.chat.dispatch  # noqa: F401 - registers all handlers

    for name, word in (("adapter", "praise"), ("adapter", "promote")):
        with pytest.raises(LookupError, match=f"/adapter {word}"):
            registry.command(name, word)(lambda tx, caller, call: Outcome(Body("")))


def test_only_stop_is_in_the_control_lane() -> None:
    assert [command.name for command in COMMANDS if command.lane is Lane.CONTROL] == ["stop"]
    assert [lane_of(line) for line in ("/stop now", " ／STOP@acme_bot", "/stopp", "/")] == [Lane.CONTROL] * 2 + [
        Lane.TURN
    ] * 2


_READ: tuple[tuple[str, dict[str, str]], ...] = (
    ("/finetune faq.jsonl", {"dataset": "faq.jsonl"}),
    ('/finetune "my faq.jsonl"', {"dataset": "my faq.jsonl"}),
    ("/finetune “my faq.jsonl” yes", {"dataset": "my faq.jsonl", "go": "yes"}),
    (
        "/finetune a.csv question=Fråga answer=Mitt svar",
        {"dataset": "a.csv", "question": "Fråga", "answer": "Mitt svar"},
    ),
    ("/finetune", {}),
    ("/FineTune@acme_bot   STATUS 3", {"job": "3"}),
    ("／language　zh", {"language": "zh"}),
    ("/ help usage", {"command": "usage"}),
    ("/adapter promote 4 it's better, isn't it", {"version": "4", "reason": "it's better, isn't it"}),
    ("/adapter promote base 'as agreed'", {"version": "base", "reason": "as agreed"}),
    ("/channel create acme Acme's House", {"name": "acme", "title": "Acme's House"}),
    ("/channel set title=A b per_minute=6", {"title": "A b", "per_minute": "6"}),
    (
        '/channel set acme instructions="Don\'t guess. a=b" title=x',
        {"channel": "acme", "instructions": "Don't guess. a=b", "title": "x"},
    ),
    ("/channel set acme title＝标题", {"channel": "acme", "title": "标题"}),
    ("/channel set acme instructions=", {"channel": "acme", "instructions": ""}),
    ('/channel set acme instructions="one\ntwo"', {"channel": "acme", "instructions": "one\ntwo"}),
    ("/stop it please", {}),
    ("/consent ON", {"choice": "on"}),
)
_REFUSED: tuple[tuple[str, list[str]], ...] = (
    ("/fintune faq.jsonl", ["/fintune", "Did you mean /finetune?", "/finetune faq.jsonl", "check the file"]),
    ("/adaptor list", ["/adapter"]),
    ("/lang zh", ["/language zh"]),
    ("/hlep", ["/help"]),
    ("/qqq", ["/qqq", "/help"]),
    ("/adapter", ["list, show, promote, rollback"]),
    ("/adapter promot acme@4", ["/adapter promote <version> [reason]", "/adapter promote acme@4"]),
    ("/finetune statsu", ["/finetune status"]),
    ("/channel 7", ["list, create, show, set, archive"]),
    ("/adapter show", ["version is missing", "/adapter show <version>"]),
    ("/adapter list all", ['"all"', "/adapter list"]),
    ("/consent maybe", ["maybe", "on, off"]),
    ("/channel set acme", ["/channel set"]),
    ("/channel set acme titel=x", ["titel", "Did you mean title?"]),
    ("/channel set acme zzz=x", ["zzz", "per_minute"]),
    ("/channel set acme delta title=x", ["delta", "key=value"]),
    ("/claim", ["code is missing", "/claim <code>"]),
    ("/claim ''", ["code is missing"]),
    ("/", ["/help"]),
    ("hello", ["/help"]),
)


def test_arguments() -> None:
    for text, arguments in _READ:
        assert parse(text).arguments == arguments, text


def test_a_mistake_is_answered_with_the_right_form() -> None:
    for text, parts in _REFUSED:
        said = refusal(text)
        assert [part for part in parts if part not in said] == [], text


def test_an_answer_to_a_mistake_speaks_the_persons_language_throughout() -> None:
    said = refusal("/adapter promot 4", "zh")
    assert "/adapter promote <版本> [原因]" in said
    assert say("zh", "help.adapter_promote") in said


def test_what_was_typed_comes_back_short_and_without_markup() -> None:
    said = refusal("/`[x](http://evil)`" + "a" * 1000)
    assert "`[" not in said
    assert len(said) < 300


_NAMES = st.sampled_from(["", *(form.example for _, form in FORMS), *(f"/{command.name} " for command, _ in FORMS)])


@given(_NAMES, st.text(max_size=60))
@example("/channel set ", "title=\"'“")
@example("/finetune ", "\x00\ud800")
def test_whatever_is_typed_is_read_or_refused(start: str, rest: str) -> None:
    try:
        call = parse(start + rest)
    except BadCommand as error:
        for language in languages():
            said = say(language, error.key, **error.fields)
            assert said
            assert "…" not in said.replace(f"{rest[:40]}…", "") or len(rest) > 40
    else:
        names = {parameter.name for parameter in call.form.parameters} | set(call.form.settings)
        assert set(call.arguments) <= names


@given(st.sampled_from(["title", "instructions"]), st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
@example("title", "it's \"so\" 'x'=")
def test_what_the_command_line_quotes_arrives_as_it_was(key: str, value: str) -> None:
    call = parse(f"/channel {shlex.join(['set', 'acme', f'{key}={value}'])}")
    assert call.arguments == {"channel": "acme", key: value}


def test_a_command_is_found_with_and_without_its_slash() -> None:
    assert {find(name).name for name in ("finetune", "/finetune", "FINETUNE", "／finetune")} == {"finetune"}


def test_the_table_for_the_readme_has_every_form() -> None:
    lines = command_table().splitlines()
    assert len(lines) == len(FORMS) + 2
    assert all(line.count(" | ") == 2 for line in lines[2:])


def test_settings_are_explained() -> None:
    for language in languages():
        said = details(language, Grant.OWNER, find("channel"))
        assert [name for name in SETTINGS if f"`{name}`" not in said] == []
