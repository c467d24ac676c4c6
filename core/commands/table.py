"""One table of commands: grammar, lane, who may run it, help. Knows nothing of what a command does.

The help of bots' menus, `/help`, the README table and every answer to a mistyped command are made from it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Self

from core.commands.words import Word, split_words
from core.errors import BadCommand
from core.i18n.messages import Lazy, say
from core.types import Grant, Lane

_SLASHES = "/／"
_SHOWN = 40


@dataclass(frozen=True, slots=True)
class Parameter:
    """`rest` takes what is left of the line as it stands; `choices` are the only words that it takes."""

    name: str
    optional: bool = False
    rest: bool = False
    choices: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Form:
    """One way to use a command. `word` "" is the form without a word; `settings` follow it as key=value.

    `bare`: the settings may be left out. `answers` a question: the buttons below it have done their work then.
    """

    word: str
    example: str
    parameters: tuple[Parameter, ...] = ()
    who: Grant = Grant.ANYONE
    settings: tuple[str, ...] = ()
    bare: bool = False
    answers: bool = False


@dataclass(frozen=True, slots=True)
class Command:
    """`patient` ignores words that it does not know: who wants it to stop must not be corrected first."""

    name: str
    forms: tuple[Form, ...]
    lane: Lane = Lane.TURN
    patient: bool = False

    @property
    def who(self) -> Grant:
        return min(form.who for form in self.forms)

    def help(self, language: str) -> str:
        """What it is for, in one line."""
        return say(language, f"help.{self.name}")

    def form(self, word: str) -> Form | None:
        return next((form for form in self.forms if form.word == word), None)


@dataclass(frozen=True, slots=True)
class Call:
    """A command as it was given. `arguments` holds what was given only, by parameter or setting."""

    command: Command
    form: Form
    arguments: Mapping[str, str]

    @property
    def key(self) -> tuple[str, str]:
        """By which the handlers are found: (command, word of the form)."""
        return self.command.name, self.form.word


SETTINGS = (
    "title",
    "instructions",
    "language",
    "questions",
    "per_minute",
    "per_hour",
    "tokens_in",
    "tokens_out",
    "temperature",
    "top_p",
    "adapter",
    "price_in",
    "price_out",
    "price_train",
    "share",
    "bind",
)
DATA_SETTINGS = ("preset", "question", "answer", "system", "licence")
_CHANNEL = Parameter("channel", optional=True)
_DATASET, _JOB = Parameter("dataset", optional=True), Parameter("job", optional=True)
_SOURCE = Parameter("source", choices=("feedback", "conversations"))
_YES = Parameter("go", optional=True, choices=("yes",))
_OPERATOR, _OWNER = Grant.OPERATOR, Grant.OWNER

COMMANDS: tuple[Command, ...] = (
    Command("start", (Form("", "/start", (Parameter("link", optional=True),)),)),
    Command("help", (Form("", "/help finetune", (Parameter("command", optional=True),)),)),
    Command("new", (Form("", "/new"),)),
    Command("stop", (Form("", "/stop"),), Lane.CONTROL, patient=True),
    Command("retry", (Form("", "/retry"),)),
    Command(
        "usage",
        (
            Form("", "/usage"),
            Form("chart", "/usage chart", (), _OPERATOR),
            Form("csv", "/usage csv", (), _OPERATOR),
        ),
    ),
    Command("privacy", (Form("", "/privacy"),)),
    Command(
        "consent",
        (
            Form("", "/consent on", (Parameter("choice", optional=True, choices=("on", "off")),)),
            Form(
                "reply",
                "/consent reply #5f3a9c01 no",
                (Parameter("reply"), Parameter("choice", choices=("yes", "no"))),
                answers=True,
            ),
        ),
    ),
    Command("forget", (Form("", "/forget", (Parameter("choice", optional=True, choices=("yes",)),)),)),
    Command("language", (Form("", "/language zh", (Parameter("language", optional=True),)),)),
    Command("whoami", (Form("", "/whoami"),)),
    Command("claim", (Form("", "/claim K7QM-2XWP-9RTA", (Parameter("code"),)),)),
    Command(
        "finetune",
        (
            Form("", "/finetune faq.jsonl", (_DATASET, _YES), _OPERATOR, DATA_SETTINGS, bare=True),
            Form("from", "/finetune from feedback", (_SOURCE, _YES), _OPERATOR),
            Form("start", "/finetune start 3", (_JOB,), _OPERATOR, answers=True),
            Form("preview", "/finetune preview 3", (_JOB,), _OPERATOR),
            Form("redact", "/finetune redact 3", (_JOB,), _OPERATOR, answers=True),
            Form("status", "/finetune status 3", (_JOB,), _OPERATOR),
            Form("list", "/finetune list", (), _OPERATOR),
            Form("data", "/finetune data", (), _OPERATOR),
            Form("cancel", "/finetune cancel 3", (_JOB,), _OPERATOR, answers=True),
            Form("resume", "/finetune resume 3", (_JOB,), _OPERATOR),
        ),
    ),
    Command(
        "correct",
        (Form("", "/correct It takes 20 working days.", (Parameter("text", optional=True, rest=True),), _OPERATOR),),
    ),
    Command(
        "adapter",
        (
            Form("list", "/adapter list", (), _OPERATOR),
            Form("show", "/adapter show acme@4", (Parameter("version"),), _OPERATOR),
            Form(
                "promote",
                "/adapter promote acme@4",
                (Parameter("version"), Parameter("reason", optional=True, rest=True)),
                _OPERATOR,
            ),
            Form("rollback", "/adapter rollback", (), _OPERATOR),
            Form(
                "compare",
                "/adapter compare acme@4 How long does a permit take?",
                (Parameter("version"), Parameter("question", optional=True, rest=True)),
                _OPERATOR,
            ),
            Form(
                "choose",
                "/adapter choose 3 a",
                (Parameter("comparison"), Parameter("choice", choices=("a", "b", "same"))),
                _OPERATOR,
                answers=True,
            ),
            Form("worst", "/adapter worst acme@5", (Parameter("version"),), _OPERATOR),
            Form("discard", "/adapter discard acme@5", (Parameter("version"),), _OPERATOR),
            Form(
                "import",
                "/adapter import my-adapter.zip faq.jsonl",
                (Parameter("file", optional=True), Parameter("dataset", optional=True)),
                _OPERATOR,
            ),
        ),
    ),
    Command(
        "channel",
        (
            Form("list", "/channel list", (), _OPERATOR),
            Form(
                "create",
                "/channel create acme Acme Building",
                (Parameter("name"), Parameter("title", optional=True, rest=True)),
                _OWNER,
            ),
            Form("show", "/channel show acme", (_CHANNEL,), _OPERATOR),
            Form("set", '/channel set acme title="Acme Building" per_minute=10', (_CHANNEL,), _OPERATOR, SETTINGS),
            Form("archive", "/channel archive acme", (Parameter("channel"),), _OWNER),
        ),
    ),
    Command(
        "operator",
        (
            Form(
                "invite",
                "/operator invite acme Kim",
                (_CHANNEL, Parameter("label", optional=True, rest=True)),
                _OPERATOR,
            ),
            Form("list", "/operator list", (), _OPERATOR),
            Form("remove", "/operator remove 7", (Parameter("operator"),), _OPERATOR),
        ),
    ),
)
_BY_NAME = {command.name: command for command in COMMANDS}


# --- reading ---


def parse(text: str) -> Call:
    """Read a line that begins with a slash. Raises BadCommand, which names the nearest command and its right form."""
    line = text.strip()
    if line[:1] not in tuple(_SLASHES):
        raise BadCommand("error.no_command")
    tokens = split_words(line[1:])
    if not tokens:
        raise BadCommand("error.no_command")
    command = find(tokens[0].text.partition("@")[0])
    given = tokens[1:]
    word = given[0].text.lower() if given and not given[0].quoted else ""
    form = command.form(word)
    if form is None or not word:
        form = _wordless(command, word, given)
    else:
        given = given[1:]
    return Call(command, form, _arguments(command, form, given, line[1:]))


def find(name: str) -> Command:
    """The command of that name, with or without its slash. Raises BadCommand naming the nearest."""
    wanted = name.strip(_SLASHES + " ").lower()
    if wanted in _BY_NAME:
        return _BY_NAME[wanted]
    near = _nearest(wanted, _BY_NAME)
    if not near:
        raise BadCommand("error.unknown_command", typed=f"/{_shown(wanted)}")
    command = _BY_NAME[near]
    raise BadCommand(
        typed=f"/{_shown(wanted)}",
        nearest=f"/{near}",
        example=command.forms[0].example,
        meaning=Lazy(help_key(command, command.forms[0])),
    )


def _wordless(command: Command, typed: str, given: Sequence[Word]) -> Form:
    """The form without a word, unless the first word looks like one that was mistyped."""
    form = command.form("")
    words = [form.word for form in command.forms if form.word]
    near = _nearest(typed, words) if typed.isalpha() else ""
    if form is not None and not near:
        return form
    right = command.form(near) or command.forms[0]
    key = "error.near_form" if near else "error.bad_form" if given else "error.no_form"
    raise BadCommand(
        key,
        command=f"/{command.name}",
        typed=_shown(given[0].text if given else ""),
        words=", ".join(words),
        nearest=f"/{command.name} {near}",
        **_right(command, right),
    )


def _arguments(command: Command, form: Form, given: Sequence[Word], line: str) -> dict[str, str]:
    taken: dict[str, str] = {}
    left = list(given)
    for parameter in form.parameters:
        if not left or (form.settings and left[0].setting):
            if not parameter.optional:
                raise BadCommand("error.missing", parameter=_parameter(parameter), **_right(command, form))
            continue
        if parameter.rest:
            taken[parameter.name] = left[0].text if len(left) == 1 else line[left[0].start :].strip()
            left.clear()
            continue
        taken[parameter.name] = _chosen(command, form, parameter, left.pop(0).text)
    if form.settings:
        return taken | _settings(command, form, left)
    if left and not command.patient:
        raise BadCommand("error.too_many", typed=_shown(left[0].text), **_right(command, form))
    return taken


def _chosen(command: Command, form: Form, parameter: Parameter, typed: str) -> str:
    if not typed:
        raise BadCommand("error.missing", parameter=_parameter(parameter), **_right(command, form))
    if parameter.choices and typed.lower() not in parameter.choices:
        choices = ", ".join(parameter.choices)
        raise BadCommand("error.bad_choice", typed=_shown(typed), choices=choices, **_right(command, form))
    return typed.lower() if parameter.choices else typed


def _settings(command: Command, form: Form, given: Sequence[Word]) -> dict[str, str]:
    """key=value, key=value ...; words without a key belong to the value before them."""
    found: dict[str, str] = {}
    key = ""
    for token in given:
        if token.setting:
            key, value = token.setting.lower(), token.text[len(token.setting) + 1 :]
            if key not in form.settings:
                near = _nearest(key, form.settings)
                raise BadCommand(
                    "error.near_setting" if near else "error.bad_setting",
                    typed=_shown(key),
                    nearest=near,
                    words=", ".join(form.settings),
                    **_right(command, form),
                )
            found[key] = value
        elif key:
            found[key] = f"{found[key]} {token.text}".strip()
        else:
            raise BadCommand("error.no_setting", typed=_shown(token.text), **_right(command, form))
    if not found and not form.bare:
        raise BadCommand("error.missing", parameter=Lazy("parameter.setting"), **_right(command, form))
    return found


# --- telling ---


class _FormUsage(Lazy):
    """The right form of a command; its parameters are named in the person's language."""

    __slots__ = ()

    def __new__(cls, command: Command, form: Form) -> Self:
        return super().__new__(cls, form.example, command=command, form=form)

    def render(self, language: str) -> str:
        command, form = self.fields["command"], self.fields["form"]
        assert isinstance(command, Command)
        assert isinstance(form, Form)
        return usage(language, command, form)


def usage(language: str, command: Command, form: Form) -> str:
    """/adapter promote <version> [reason]"""
    words = [f"/{command.name}", form.word] if form.word else [f"/{command.name}"]
    for parameter in form.parameters:
        named = "|".join(parameter.choices) or say(language, f"parameter.{parameter.name}")
        words.append(f"[{named}]" if parameter.optional else f"<{named}>")
    if form.settings:
        setting = say(language, "parameter.setting")
        words.append(f"[{setting}]" if form.bare else setting)
    return " ".join(words)


def _right(command: Command, form: Form) -> dict[str, str]:
    return {
        "form": _FormUsage(command, form),
        "example": form.example,
        "meaning": Lazy(help_key(command, form)),
    }


def help_key(command: Command, form: Form) -> str:
    """A form with a word has a sentence of its own; one without a word shares that of the form that does the same."""
    same = (one.word for one in command.forms if (one.parameters, one.who) == (form.parameters, form.who) and one.word)
    word = form.word or next(same, "")
    return f"help.{command.name}_{word}" if word else f"help.{command.name}"


def _parameter(parameter: Parameter) -> Lazy:
    return Lazy(f"parameter.{parameter.name}")


def _nearest(typed: str, known: Iterable[str]) -> str:
    """The known word that was meant, or ""."""
    words = [word for word in known if word]
    begun = [word for word in words if len(typed) >= 3 and word.startswith(typed)]
    return next(iter(begun or get_close_matches(typed, words, 1, 0.6)), "")


def _shown(typed: str) -> str:
    """What a person typed, as it may stand in our answer: one short line, no markup."""
    line = re.sub(r"[\s`*_\[\]<>|\\]+", " ", "".join(c for c in typed if c.isprintable() or c.isspace())).strip()
    return line if len(line) <= _SHOWN else f"{line[:_SHOWN]}…"
