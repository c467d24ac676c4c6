"""The texts of the command table: `/help`, and the right form in an error."""

from core.commands.table import COMMANDS, Command, Form
from core.config.schema import channel_keys
from core.i18n.messages import languages, say
from core.types import Grant


def overview(language: str, grant: Grant) -> str:
    """Markdown: the commands that are allowed with this grant."""
    lines = [say(language, "help.intro"), ""]
    lines += [
        say(language, "help.line", form=f"/{command.name}", meaning=command.help(language))
        for command in COMMANDS
        if command.who <= grant
    ]
    return "\n".join([*lines, "", say(language, "help.more")])


def details(language: str, grant: Grant, command: Command, word: str = "") -> str:
    """Markdown: the form of that word, or all forms of the command."""
    form = command.form(word) if word else None
    shown = (form,) if form else command.forms
    lines = [f"**/{command.name}{f' {form.word}' if form else ''}**", ""]
    for one in shown:
        meaning = say(language, help_key(command, one))
        lines.append(say(language, "help.line", form=usage(language, command, one), meaning=meaning))
        lines.append(say(language, "help.example", example=one.example))
    if any(one.settings for one in shown):
        lines += ["", _settings(language, command)]
    needed = min(one.who for one in shown)
    if needed > grant:
        lines += ["", say(language, f"help.who_{needed.name.lower()}")]
    return "\n".join(lines)


def _settings(language: str, command: Command) -> str:
    """The settings of a command; one that the sentence does not name is told by its definition, in English."""
    told = say(language, f"help.settings_{command.name}", codes=", ".join(languages()))
    if command.name != "channel":
        return told
    more = [f"- `{name}`: {one.help}" for name, one in channel_keys().items() if f"`{name}`" not in told]
    return "\n".join([told.rstrip(), *more])


def usage(language: str, command: Command, form: Form) -> str:
    """The form with its parameters named in that language: `/adapter promote <version> [reason]`."""
    words = [f"/{command.name}", form.word] if form.word else [f"/{command.name}"]
    for parameter in form.parameters:
        named = "|".join(parameter.choices) or say(language, f"parameter.{parameter.name}")
        words.append(f"[{named}]" if parameter.optional else f"<{named}>")
    if form.settings:
        setting = say(language, "parameter.setting")
        words.append(f"[{setting}]" if form.bare else setting)
    return " ".join(words)


def help_key(command: Command, form: Form) -> str:
    """The key of a form's sentence; a form without a word shares the sentence of the form with the same parameters."""
    same = (one.word for one in command.forms if (one.parameters, one.who) == (form.parameters, form.who) and one.word)
    word = form.word or next(same, "")
    return f"help.{command.name}_{word}" if word else f"help.{command.name}"
