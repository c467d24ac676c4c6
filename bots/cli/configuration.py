"""`distributary config`: shows or checks the configuration, or applies its channels and partners to the database."""

import sys
import tomllib

import click

from bots.cli.options import Options, pass_options, shared_options, write_out
from bots.cli.owner_commands import answer
from core.config.show import show_config
from core.errors import BadConfig
from core.i18n.messages import say

_APPLIED = ("generation", "limits", "partners", "channels")


@click.group()
@shared_options
def config() -> None:
    """Show, check or apply the configuration."""


@config.command()
@shared_options
@pass_options
def show(options: Options) -> int:
    """Show the configuration in use, secrets masked."""
    write_out(show_config(options.config()))
    return 0


@config.command()
@shared_options
@pass_options
def check(options: Options) -> int:
    """Tell every mistake of the file, those of the bots' tables too."""
    given, _ = options.config_and_bots()
    file = str(given.file) if given.file else say("en", "terminal.no_file")
    write_out(f"{say('en', 'terminal.config_good', file=file)}\n")
    return 0


@config.command()
@click.option("--yes", "-y", is_flag=True, help="Do not ask.")
@shared_options
@pass_options
def apply(options: Options, yes: bool) -> int:
    """Show what would change in existing channels and partners, ask, and change it."""
    given = options.config()
    if given.file is None:
        raise BadConfig(detail="there is no configuration file to apply; name one with --config", file="-", problems="")
    table = tomllib.loads(given.file.read_text(encoding="utf-8"))
    request = {"apply": {name: table[name] for name in _APPLIED if name in table}}
    changes = answer(options, {**request, "preview": True})
    write_out(f"{changes}\n")
    if changes == say("en", "terminal.nothing_to_change"):
        return 0
    if not yes and not _agreed():
        write_out(f"{say('en', 'terminal.not_applied')}\n")
        return 1
    answer(options, request)
    return 0


def _agreed() -> bool:
    return sys.stdin.isatty() and input(say("en", "terminal.apply_question")).strip().lower() in ("y", "yes")
