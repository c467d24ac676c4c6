"""The `distributary` command: its subcommands, errors as sentences, exit codes.

Completion for bash, zsh and fish: `eval "$(_DISTRIBUTARY_COMPLETE=bash_source distributary)"`.
"""

import os
import sys
import traceback
from collections.abc import Sequence
from importlib.metadata import EntryPoint, entry_points

import click

from bots import control
from bots.cli.configuration import config
from bots.cli.doctor.command import doctor
from bots.cli.options import Options, shared_options, write_out
from bots.cli.owner_commands import adapter, channel, finetune, inbox, operator
from bots.cli.run import chat, serve
from bots.cli.usage import usage
from bots.shared.render import printable
from core.errors import AppError, BadConfig, UserError
from core.i18n.messages import say
from core.observability.logs import mask

COMMAND_GROUP = "distributary.commands"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; its exit status. 2 is a wrong argument or configuration, 1 any other failure."""
    try:
        status = distributary.main(arguments, prog_name="distributary", standalone_mode=False)
    except click.ClickException as error:  # a wrong argument
        error.show()
        return error.exit_code
    return int(status or 0)


class _Program(click.Group):
    """The group of commands; those that a bot brings are entry points of `distributary.commands`."""

    def list_commands(self, context: click.Context) -> list[str]:
        return [*self.commands, *(entry.name for entry in entry_points(group=COMMAND_GROUP))]

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name in self.commands:
            return self.commands[name]
        found = tuple(entry_points(group=COMMAND_GROUP, name=name))
        return _plugin_command(found[0]) if found else None

    def invoke(self, context: click.Context) -> int:
        try:
            return int(super().invoke(context) or 0)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except KeyboardInterrupt:  # while loading: all is closed, but a thread in torch would delay the exit
            os._exit(130)
        except Exception as error:  # the outermost handler: a sentence for the person, the rest with --verbose
            return _report(error, verbose=context.ensure_object(Options).verbose)


@click.group(cls=_Program, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="distributary", message="distributary %(version)s")
@shared_options
def distributary() -> None:
    """A language model for people, through partner channels."""


for command in (chat, serve, doctor, usage, channel, operator, finetune, adapter, inbox, config):
    distributary.add_command(command)


def _plugin_command(entry: EntryPoint) -> click.Command:
    """A bot's own command: the entry point names a function from words to the text to print."""

    @click.command(
        entry.name,
        help=f"Commands of the {entry.name} bot.",
        context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
    )
    @click.argument("words", nargs=-1, type=click.UNPROCESSED, metavar="...")
    @shared_options
    def plugin(words: tuple[str, ...]) -> int:
        write_out(entry.load()(words))
        return 0

    return plugin


def _report(error: Exception, *, verbose: bool) -> int:
    """Write the error as a sentence on standard error; the exit status."""
    leaf: BaseException = error
    while isinstance(leaf, BaseExceptionGroup):
        leaf = next((one for one in leaf.exceptions if isinstance(one, AppError)), leaf.exceptions[0])
    if isinstance(leaf, BrokenPipeError):  # the reader of the output has gone: `| head` is no failure
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0
    if verbose:
        traceback.print_exception(error)
    if isinstance(leaf, AppError):
        sentence = control.sentence(leaf)
    else:
        sentence = f"{say('en', 'error.internal')} ({type(leaf).__name__}: {leaf}; --verbose shows more)"
    sys.stderr.write(printable(mask(f"distributary: {sentence}\n")))
    return 2 if isinstance(leaf, BadConfig | UserError) else 1


if __name__ == "__main__":
    sys.exit(main())
