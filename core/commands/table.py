"""The command table: name, forms, parameters, lane and required grant of every command.

The parser, `/help`, the menus of the bots, the documents and the answer to a mistyped command all derive from it.
"""

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


def _command(name: str, *forms: Form, lane: Lane = Lane.TURN, patient: bool = False) -> Command:
    return Command(name, forms, lane, patient)


def _operators(word: str, example: str, *parameters: Parameter, answers: bool = False) -> Form:
    return Form(word, example, parameters, Grant.OPERATOR, answers=answers)


def _optional(name: str, *choices: str, rest: bool = False) -> Parameter:
    return Parameter(name, optional=True, rest=rest, choices=choices)


_CHANNEL, _DATASET, _JOB, _YES = _optional("channel"), _optional("dataset"), _optional("job"), _optional("go", "yes")
_SOURCE, _VERSION = Parameter("source", choices=("feedback", "conversations")), Parameter("version")
_YES_NO, _A_B_SAME = Parameter("choice", choices=("yes", "no")), Parameter("choice", choices=("a", "b", "same"))
_NAME, _TITLE = Parameter("name"), _optional("title", rest=True)

COMMANDS: tuple[Command, ...] = (
    _command("start", Form("", "/start", (_optional("link"),))),
    _command("help", Form("", "/help finetune", (_optional("command", rest=True),))),
    _command("new", Form("", "/new")),
    _command("stop", Form("", "/stop"), lane=Lane.CONTROL, patient=True),
    _command("retry", Form("", "/retry")),
    _command("usage", Form("", "/usage"), _operators("chart", "/usage chart"), _operators("csv", "/usage csv")),
    _command("privacy", Form("", "/privacy")),
    _command(
        "consent",
        Form("", "/consent on", (_optional("choice", "on", "off"),)),
        Form("reply", "/consent reply #5f3a9c01 no", (Parameter("reply"), _YES_NO), answers=True),
    ),
    _command("forget", Form("", "/forget", (_optional("choice", "yes"),))),
    _command("language", Form("", "/language zh", (_optional("language"),))),
    _command("whoami", Form("", "/whoami")),
    _command("claim", Form("", "/claim K7QM-2XWP-9RTA", (Parameter("code"),))),
    _command(
        "finetune",
        Form("", "/finetune faq.jsonl", (_DATASET, _YES), Grant.OPERATOR, DATA_SETTINGS, bare=True),
        _operators("from", "/finetune from feedback", _SOURCE, _YES),
        _operators("start", "/finetune start 3", _JOB, answers=True),
        _operators("preview", "/finetune preview 3", _JOB),
        _operators("redact", "/finetune redact 3", _JOB, answers=True),
        _operators("status", "/finetune status 3", _JOB),
        _operators("list", "/finetune list"),
        _operators("data", "/finetune data"),
        _operators("cancel", "/finetune cancel 3", _JOB, answers=True),
        _operators("resume", "/finetune resume 3", _JOB),
    ),
    _command("inbox", _operators("list", "/inbox list"), _operators("retry", "/inbox retry 12", Parameter("message"))),
    _command("correct", _operators("", "/correct It takes 20 working days.", _optional("text", rest=True))),
    _command(
        "adapter",
        _operators("list", "/adapter list"),
        _operators("show", "/adapter show acme@4", _VERSION),
        _operators("promote", "/adapter promote acme@4", _VERSION, _optional("reason", rest=True)),
        _operators("rollback", "/adapter rollback"),
        _operators(
            "compare",
            "/adapter compare acme@4 How long does a permit take?",
            _VERSION,
            _optional("question", rest=True),
        ),
        _operators("choose", "/adapter choose 3 a", Parameter("comparison"), _A_B_SAME, answers=True),
        _operators("worst", "/adapter worst acme@5", _VERSION),
        _operators("discard", "/adapter discard acme@5", _VERSION),
        _operators("import", "/adapter import my-adapter.zip faq.jsonl", _optional("file"), _DATASET),
    ),
    _command(
        "channel",
        _operators("list", "/channel list"),
        Form("create", "/channel create acme Acme Building", (_NAME, _TITLE), Grant.OWNER),
        _operators("show", "/channel show acme", _CHANNEL),
        Form("set", '/channel set acme title="Acme Building" per_minute=10', (_CHANNEL,), Grant.OPERATOR, SETTINGS),
        Form("archive", "/channel archive acme", (Parameter("channel"),), Grant.OWNER),
    ),
    _command(
        "operator",
        _operators("invite", "/operator invite acme Kim", _CHANNEL, _optional("label", rest=True)),
        _operators("list", "/operator list"),
        _operators("remove", "/operator remove 7", Parameter("operator")),
    ),
)
BY_NAME: Mapping[str, Command] = {command.name: command for command in COMMANDS}
