"""Chat commands from the shell: `distributary channel list` is /channel list, given by the terminal's owner."""

import asyncio
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from bots import control
from bots.app import open_store
from bots.cli.options import Options, pass_options, shared_options, write_out
from core.channels.terminal import TERMINAL
from core.commands.parser import find
from core.commands.table import COMMANDS
from core.errors import BadConfig


def answer(options: Options, request: dict[str, Any]) -> str:
    """The answer of the process that owns the home, or of this one if none does. Raises BadConfig with its error."""
    found = control.ask(options.home, request)
    if found is None:
        return asyncio.run(_do_here(options, request)).rstrip()
    if "error" in found:
        raise BadConfig(detail=found["error"])
    return found["text"].rstrip()


async def _do_here(options: Options, request: dict[str, Any]) -> str:
    async with open_store(options.config(), options.home) as database:
        runner = control.CommandRunner(database, options.home)
        if "apply" in request:
            return await runner.apply(request["apply"], only_preview=bool(request.get("preview")))
        return (await runner.run(request["command"], request.get("channel", TERMINAL))).text


def _run(options: Options, name: str, words: Sequence[str], channel: str = "") -> int:
    request = {"command": f"/{name} {shlex.join(words)}".strip()}
    text = answer(options, {**request, "channel": channel} if channel else request)
    write_out(f"{text}\n")
    return 0


def _forms(context: click.Context, parameter: click.Parameter, typed: str) -> list[CompletionItem]:
    """Completion of a command's first word: list, show, set ... A data set's path is left to the shell."""
    if context.params.get("words"):
        return [CompletionItem(typed, type="file")]
    command = next(one for one in COMMANDS if one.name == context.command.name)
    words = [form.word for form in command.forms if form.word.startswith(typed) and form.word]
    return [CompletionItem(word) for word in words] or [CompletionItem(typed, type="file")]


@click.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.argument("words", nargs=-1, type=click.UNPROCESSED, metavar="...", shell_complete=_forms)
@shared_options
@pass_options
def channel(options: Options, words: tuple[str, ...]) -> int:
    """List, create, show, set or archive channels. The words are those of /channel."""
    return _run(options, "channel", words)


@click.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.argument("words", nargs=-1, type=click.UNPROCESSED, metavar="...", shell_complete=_forms)
@shared_options
@pass_options
def operator(options: Options, words: tuple[str, ...]) -> int:
    """Invite, list or remove operators. The words are those of /operator."""
    return _run(options, "operator", words)


@click.command()
@click.argument("words", nargs=-1, metavar="...", shell_complete=_forms)
@click.option("--channel", metavar="NAME", default="", help="The channel to improve; else the terminal's.")
@shared_options
@pass_options
def finetune(options: Options, words: tuple[str, ...], channel: str) -> int:
    """Improve a channel from a file; show its jobs. The words are those of /finetune."""
    if words and not find("finetune").form(words[0].lower()):
        words = (_absolute(words[0]), *words[1:])
    return _run(options, "finetune", words, channel)


@click.command()
@click.argument("words", nargs=-1, metavar="...", shell_complete=_forms)
@click.option("--channel", metavar="NAME", default="", help="The channel of the versions; else the terminal's.")
@shared_options
@pass_options
def adapter(options: Options, words: tuple[str, ...], channel: str) -> int:
    """Import, show, promote or roll back versions. The words are those of /adapter."""
    if words[:1] == ("import",):
        words = ("import", *map(_absolute, words[1:]))
    return _run(options, "adapter", words, channel)


@click.command()
@click.argument("words", nargs=-1, metavar="...", shell_complete=_forms)
@shared_options
@pass_options
def inbox(options: Options, words: tuple[str, ...]) -> int:
    """List messages that were given up, or try one again. The words are those of /inbox."""
    return _run(options, "inbox", words)


def _absolute(typed: str) -> str:
    """The absolute path of an existing file, since another process may read it; any other word unchanged."""
    path = Path(typed).expanduser()
    return str(path.absolute()) if path.exists() else typed
