"""The command table: name, forms, parameters, lane and required grant of every command.

The parser, `/help`, the menus of the bots, the documents and the answer to a mistyped command all derive from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from core.config.schema import channel_keys
from core.i18n.messages import say
from core.types import Grant, Lane


@dataclass(frozen=True, slots=True)
class Parameter:
    """`rest` takes the remainder of the line verbatim; `choices` are the only accepted words."""

    name: str
    optional: bool = False
    rest: bool = False
    choices: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Form:
    """One form of a command: `word` is the subcommand ("" for none), `settings` follow as key=value.

    `bare`: the settings are optional. `answers`: the command answers a question, whose buttons are then replaced.
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
    """`patient`: surplus words are ignored, so that "/stop please" stops."""

    name: str
    forms: tuple[Form, ...]
    lane: Lane = Lane.TURN
    patient: bool = False

    @property
    def who(self) -> Grant:
        return min(form.who for form in self.forms)

    def help(self, language: str) -> str:
        """Its purpose in one line."""
        return say(language, f"help.{self.name}")

    def form(self, word: str) -> Form | None:
        return next((form for form in self.forms if form.word == word), None)


@dataclass(frozen=True, slots=True)
class Call:
    """A parsed command. `arguments` holds the given values by the name of their parameter or setting."""

    command: Command
    form: Form
    arguments: Mapping[str, str]

    @property
    def key(self) -> tuple[str, str]:
        """(command, word of the form): the key of its handler."""
        return self.command.name, self.form.word

    @property
    def action(self) -> str:
        """The name of the command in the audit log: "adapter promote"."""
        return " ".join(self.key).strip()


SETTINGS = tuple(channel_keys())
DATA_SETTINGS = ("preset", "question", "answer", "system", "licence")
_CHANNEL = Parameter("channel", optional=True)
_DATASET, _JOB = Parameter("dataset", optional=True), Parameter("job", optional=True)
_SOURCE = Parameter("source", choices=("feedback", "conversations"))
_YES = Parameter("go", optional=True, choices=("yes",))
_OPERATOR, _OWNER = Grant.OPERATOR, Grant.OWNER

COMMANDS: tuple[Command, ...] = (
    Command("start", (Form("", "/start", (Parameter("link", optional=True),)),)),
    Command("help", (Form("", "/help finetune", (Parameter("command", optional=True, rest=True),)),)),
    Command("new", (Form("", "/new"),)),
    Command("stop", (Form("", "/stop"),), Lane.CONTROL, patient=True),
    Command("retry", (Form("", "/retry"),)),
    Command(
        "usage",
        (Form("", "/usage"), Form("chart", "/usage chart", (), _OPERATOR), Form("csv", "/usage csv", (), _OPERATOR)),
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
BY_NAME: Mapping[str, Command] = {command.name: command for command in COMMANDS}
