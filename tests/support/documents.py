"""What the documents generate from the code: the tables of commands and settings, and config.example.toml."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from dataclasses import asdict

from core.commands.help import help_key, usage
from core.commands.table import COMMANDS
from core.config.keys import Key, keys, toml
from core.config.schema import SECTIONS
from core.config.sections import MOST
from core.i18n.messages import say
from core.types import Grant

_ABOUT = {
    "generation": "of channels made later; a channel that exists keeps its own temperature and top_p",
    "limits": "of one person in channels made later; a channel that exists keeps its own",
}
_HEAD = """\
# Distributary reads --config FILE, else $DISTRIBUTARY_CONFIG, else config.toml in its home.
# Every key is shown with its default: delete what you do not change. `distributary config check` tells all mistakes,
# `distributary config show` prints what is in use. "env:NAME" in place of any text is read from the environment.
"""
_SEEDS = """
# Partners and channels are created at start where they are missing. What exists stays as it is in the database; a start
# tells where it differs from this file, and `distributary config apply` changes it to what is written here.
"""
_BOTS = """
# A bot is a table: its name is the bot's, or `kind` says which bot it is. `enabled = false` leaves it out.
"""


def command_table(language: str = "en") -> str:
    """The table of the README: every form, its purpose, and the grant that it needs."""
    lines = ["| command | what it does | who |", "|---|---|---|"]
    for command in COMMANDS:
        for form in command.forms:
            who = {Grant.ANYONE: "anyone", Grant.OPERATOR: "operators", Grant.OWNER: "operators of all"}[form.who]
            shown = usage(language, command, form).replace("|", "\\|")
            lines.append(f"| `{shown}` | {say(language, help_key(command, form))} | {who} |")
    return "\n".join(lines) + "\n"


def configuration_table(bots: Mapping[str, type] | None = None) -> str:
    """Every key of a file with its default, its help and what it takes. `bots` are the tables of bots, by name."""
    lines = ["| key | default | meaning |", "|---|---|---|"]
    for section, made in [*SECTIONS.items(), *((f"bots.{name}", made) for name, made in (bots or {}).items())]:
        for name, one in keys(made).items():
            if one.file:
                default = "" if one.section else f"`{toml(one.default)}`"
                lines.append(f"| `{section}.{name}` | {default} | {_meaning(one)} |")
    return "\n".join(lines) + "\n"


def _meaning(one: Key) -> str:
    bounds = ""
    if one.choices:
        bounds = f" ({', '.join(one.choices)})"
    elif "maximum" in one.schema:
        above = "above " if "exclusiveMinimum" in one.schema else ""
        bounds = f" ({above}{one.low:.10g} to {one.high:.10g})" if one.high < MOST else f" (at least {one.low:g})"
    elif one.longest:
        bounds = f" (at most {one.longest} characters)"
    return f"{one.help}{bounds}".replace("|", "\\|")


def example_toml(bots: Mapping[str, type]) -> str:
    """The text of deploy/config.example.toml. `bots` are the tables of bots, by name."""
    lines = [_HEAD.rstrip()]
    for section, made in SECTIONS.items():
        if section == "partners.NAME":
            lines += _SEEDS.rstrip().split("\n")
        lines += _example(section.replace("NAME", "acme"), made, commented="NAME" in section)
    lines += _BOTS.rstrip().split("\n")
    for name, made in bots.items():
        lines += _example(f"bots.{name}", made, commented=True)
    return "\n".join(lines) + "\n"


def _example(section: str, made: type, *, commented: bool) -> list[str]:
    mark = "# " if commented else ""
    about = f"  # {_ABOUT[section]}" if section in _ABOUT else ""
    lines = ["", f"{mark}[{section}]{about}"]
    for name, one in keys(made).items():
        if not one.file:
            continue
        value = one.default if one.example is None else one.example
        if one.section:
            value = dict(list(asdict(one.default).items())[:1])
        setting = f"{mark}{name} = {toml(value)}"
        wraps = len(setting) > 40
        if wraps:
            lines += [*_comment(f"{mark}# ", _meaning(one)), setting]
        else:
            first, *rest = _comment("", _meaning(one), 76)
            lines += [f"{setting:<42}# {first}", *(f"{mark:<42}# {line}" for line in rest)]
    return lines


def _comment(mark: str, text: str, width: int = 116) -> list[str]:
    return [f"{mark}{line}" for line in textwrap.wrap(text.replace("\\|", "|"), width)]
