"""What is said of the commands: `/help`, and the table of the README. Made from core.commands.table alone."""

from __future__ import annotations

from core.commands.table import COMMANDS, Command, find, help_key, usage
from core.i18n.messages import say
from core.types import Grant


def help_text(language: str, grant: Grant, topic: str = "") -> str:
    """Markdown: the commands that a person with this grant may use, or all about one of them. Raises BadCommand."""
    if topic:
        return _help_of(language, find(topic), grant)
    lines = [say(language, "help.intro"), ""]
    lines += [
        say(language, "help.line", form=f"/{command.name}", meaning=command.help(language))
        for command in COMMANDS
        if command.who <= grant
    ]
    return "\n".join([*lines, "", say(language, "help.more")])


def _help_of(language: str, command: Command, grant: Grant) -> str:
    lines = [f"**/{command.name}**", ""]
    for form in command.forms:
        meaning = say(language, help_key(command, form))
        lines.append(say(language, "help.line", form=usage(language, command, form), meaning=meaning))
        lines.append(say(language, "help.example", example=form.example))
    if any(form.settings for form in command.forms):
        lines += ["", say(language, f"help.settings_{command.name}")]
    if command.who > grant:
        lines += ["", say(language, f"help.who_{command.who.name.lower()}")]
    return "\n".join(lines)


def table_markdown(language: str = "en") -> str:
    """The table of the README: every form, what it does, and who may."""
    lines = ["| command | what it does | who |", "|---|---|---|"]
    for command in COMMANDS:
        for form in command.forms:
            who = {Grant.ANYONE: "anyone", Grant.OPERATOR: "operators", Grant.OWNER: "operators of all"}[form.who]
            shown = usage(language, command, form).replace("|", "\\|")
            lines.append(f"| `{shown}` | {say(language, help_key(command, form))} | {who} |")
    return "\n".join(lines) + "\n"
