"""Parses the line of a command: words and quotes, the form, its arguments.

`read` decides whether a message is a command at all; nothing else looks at the slash.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

from core.commands.help import help_key, usage
from core.commands.table import BY_NAME, Call, Command, Form, Parameter
from core.errors import BadCommand
from core.i18n.messages import Lazy
from core.types import Lane

_SLASHES = ("/", "／")  # the second is typed by Chinese input methods
_MAX_SHOWN = 40
_QUOTES = {'"': '"', "'": "'", "“": "”", "‘": "’", "「": "」", "«": "»", "＂": "＂"}
_CLOSING = "".join(_QUOTES.values())
_SETTING = re.compile(r"([A-Za-z_]+)[=＝]")


def is_command(text: str) -> bool:
    """Whether a message is a command."""
    return text.lstrip().startswith(_SLASHES)


def lane_of(line: str) -> Lane:
    """The lane of a command line; TURN for an unknown command, whose error is reported in order."""
    words = split_words(line.strip()[1:])
    command = BY_NAME.get(_name(words[0])) if words else None
    return command.lane if command else Lane.TURN


def read(line: str) -> Call | BadCommand:
    """Parse a command line; the error is returned, to be reported later."""
    try:
        return parse(line)
    except BadCommand as error:
        return error


def parse(text: str) -> Call:
    """Parse a command line. Raises BadCommand with the nearest command and its right form."""
    line = text.strip()
    tokens = split_words(line[1:])
    if not is_command(line) or not tokens:
        raise BadCommand("error.no_command")
    command = find(_name(tokens[0]))
    given = tokens[1:]
    word = given[0].text.lower() if given and not given[0].quoted else ""
    form = command.form(word)
    if form is None or not word:
        form = _wordless(command, word, given)
    else:
        given = given[1:]
    return Call(command, form, _arguments(command, form, given, line[1:]))


def find(name: str) -> Command:
    """The command of that name, with or without its slash. Raises BadCommand with the nearest one."""
    wanted = name.strip("".join(_SLASHES) + " ").lower()
    if wanted in BY_NAME:
        return BY_NAME[wanted]
    near = _nearest(wanted, BY_NAME)
    if not near:
        raise BadCommand("error.unknown_command", typed=f"/{_shown(wanted)}")
    command = BY_NAME[near]
    raise BadCommand(
        typed=f"/{_shown(wanted)}",
        nearest=f"/{near}",
        example=command.forms[0].example,
        meaning=Lazy(help_key(command, command.forms[0])),
    )


def _name(word: Word) -> str:
    """The name of a command without the bot that it is addressed to: `/stop@acme_bot`."""
    return word.text.partition("@")[0].lower()


def _wordless(command: Command, typed: str, given: Sequence[Word]) -> Form:
    """The form without a word, unless the first word resembles the word of another form."""
    form = command.form("")
    words = [form.word for form in command.forms if form.word]
    near = _nearest(typed, words) if typed.isalpha() else ""
    if form is not None and not near:
        return form
    key = "error.near_form" if near else "error.bad_form" if given else "error.no_form"
    first, name = given[0].text if given else "", f"/{command.name}"
    fields = {"command": name, "words": ", ".join(words), "nearest": f"{name} {near}"}
    raise _wrong(key, command, command.form(near) or command.forms[0], first, **fields)


def _arguments(command: Command, form: Form, given: Sequence[Word], line: str) -> dict[str, str]:
    taken: dict[str, str] = {}
    left = list(given)
    for parameter in form.parameters:
        if not left or (form.settings and left[0].setting):
            if not parameter.optional:
                raise _wrong("error.missing", command, form, parameter=Lazy(f"parameter.{parameter.name}"))
            continue
        if parameter.rest:
            taken[parameter.name] = left[0].text if len(left) == 1 else line[left[0].start :].strip()
            left.clear()
            continue
        taken[parameter.name] = _chosen(command, form, parameter, left.pop(0).text)
    if form.settings:
        return taken | _settings(command, form, left)
    if left and not command.patient:
        raise _wrong("error.too_many", command, form, left[0].text)
    return taken


def _chosen(command: Command, form: Form, parameter: Parameter, typed: str) -> str:
    if not typed:
        raise _wrong("error.missing", command, form, parameter=Lazy(f"parameter.{parameter.name}"))
    if parameter.choices and typed.lower() not in parameter.choices:
        raise _wrong("error.bad_choice", command, form, typed, choices=", ".join(parameter.choices))
    return typed.lower() if parameter.choices else typed


def _settings(command: Command, form: Form, given: Sequence[Word]) -> dict[str, str]:
    """key=value pairs; a word without a key continues the value before it."""
    found: dict[str, str] = {}
    key = ""
    for token in given:
        if token.setting:
            key, value = token.setting.lower(), token.text[len(token.setting) + 1 :]
            if key not in form.settings:
                near, words = _nearest(key, form.settings), ", ".join(form.settings)
                wrong = "error.near_setting" if near else "error.bad_setting"
                raise _wrong(wrong, command, form, key, nearest=near, words=words)
            found[key] = value
        elif key:
            found[key] = f"{found[key]} {token.text}".strip()
        else:
            raise _wrong("error.no_setting", command, form, token.text)
    if not found and not form.bare:
        raise _wrong("error.missing", command, form, parameter=Lazy("parameter.setting"))
    return found


class _FormUsage(Lazy):
    """The right form of a command, rendered in the reader's language."""

    __slots__ = ()

    def render(self, language: str) -> str:
        command, form = self.fields["command"], self.fields["form"]
        assert isinstance(command, Command)
        assert isinstance(form, Form)
        return usage(language, command, form)


def _wrong(key: str, command: Command, form: Form, typed: str = "", /, **fields: str) -> BadCommand:
    """The error that shows what was typed and the right form."""
    right = _FormUsage(form.example, command=command, form=form)
    meaning = Lazy(help_key(command, form))
    return BadCommand(key, typed=_shown(typed), form=right, example=form.example, meaning=meaning, **fields)


def _nearest(typed: str, known: Iterable[str]) -> str:
    """The known word that the typed one resembles, or ""."""
    words = [word for word in known if word]
    begun = [word for word in words if len(typed) >= 3 and word.startswith(typed)]
    return next(iter(begun or get_close_matches(typed, words, 1, 0.6)), "")


def _shown(typed: str) -> str:
    """Typed text made safe for our answer: one short line without markup."""
    line = re.sub(r"[\s`*_\[\]<>|\\]+", " ", "".join(c for c in typed if c.isprintable() or c.isspace())).strip()
    return line if len(line) <= _MAX_SHOWN else f"{line[:_MAX_SHOWN]}…"


# --- words and quotes ---


@dataclass(frozen=True, slots=True)
class Word:
    """One word. `start` is its offset in the line; `setting` is the key of key=value, else ""."""

    text: str
    start: int
    quoted: bool = False

    @property
    def setting(self) -> str:
        found = _SETTING.match(self.text)
        return found[1] if found else ""


def split_words(line: str) -> list[Word]:
    """Words, quoted in any of the ways of common keyboards.

    A quote opens before a word or after "=" and closes before a space; any other quote is text.
    """
    tokens, at = [], 0
    while at < len(line):
        if line[at].isspace():
            at += 1
            continue
        start, text, quoted = at, "", line[at] in _QUOTES
        while at < len(line) and not line[at].isspace():
            opens = at == start or line[at - 1] in "=＝" or line[at - 1] in _CLOSING
            end = _closing(line, at) if opens and line[at] in _QUOTES else -1
            if end < 0:
                text, at = text + line[at], at + 1
            else:
                text, at = text + line[at + 1 : end], end + 1
        tokens.append(Word(text, start, quoted))
    return tokens


def as_word(text: str) -> str:
    """The text as it is typed to be parsed as one word: in quotes where it needs them."""
    return text if split_words(text) == [Word(text, 0)] and not Word(text, 0).setting else f'"{text}"'


def _closing(line: str, opened: int) -> int:
    """The offset of the closing quote: before a space, the end or another quote; -1 where there is none."""
    close = _QUOTES[line[opened]]
    at = line.find(close, opened + 1)
    while at >= 0:
        following = line[at + 1 : at + 2]
        if not following or following.isspace() or following in _QUOTES:
            return at
        at = line.find(close, at + 1)
    return -1
