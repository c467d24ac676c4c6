"""`distributary chat` and `distributary serve`: the commands that run bots."""

import asyncio
import os
from collections.abc import Mapping
from importlib.metadata import version

import click

from bots.app import Parts, run_program
from bots.cli.options import Options, language, pass_options, shared_options
from bots.provisioning import greeting
from bots.terminal.bot import TerminalBot, TerminalContext, is_interactive, read_settings
from core.errors import BadConfig
from core.observability import logs
from core.platform import Bot

_CHAT_DRAIN_S, _SERVE_DRAIN_S = 5.0, 30.0


@click.command()
@shared_options
@pass_options
def chat(options: Options) -> int:
    """Talk to the model in this terminal. Piped lines are answered one by one."""
    config, home = options.config(), options.home
    interactive = is_interactive() and os.environ.get("TERM", "") not in ("", "dumb")
    logs.install("info" if options.verbose else "warning")
    table = config.bots.get("terminal")
    settings = read_settings(table.settings if table else {})
    spoken = settings.language or language()

    async def terminal(parts: Parts) -> Mapping[str, Bot]:
        release = ".".join(version("distributary").split(".")[:2])
        lines = await parts.database.read(lambda tx: greeting(tx, parts.engine.info, settings.place, spoken, release))
        context = TerminalContext(spoken, lines, home.path / "history")
        return {"terminal": TerminalBot(settings, context, interactive=interactive)}

    return asyncio.run(run_program(config, home, terminal, drain_s=_CHAT_DRAIN_S, restart=False))


@click.command()
@shared_options
@pass_options
def serve(options: Options) -> int:
    """Run the bots that the configuration enables."""
    config, bots = options.config_and_bots()
    logs.install("debug" if options.verbose else config.log.level)
    if not bots:
        raise BadConfig(
            detail="no bot is enabled: add a table [bots.NAME]; deploy/config.example.toml shows how",
            file=str(config.file or "the configuration"),
            problems="no [bots.NAME]",
        )

    async def configured(_: Parts) -> Mapping[str, Bot]:
        return bots

    return asyncio.run(run_program(config, options.home, configured, drain_s=_SERVE_DRAIN_S, restart=True))
