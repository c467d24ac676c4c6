"""The `distributary` command: arguments, environment, errors for people. Knows what starts what."""

from __future__ import annotations

import argparse
import asyncio
import os
import shlex
import sys
import tomllib
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import entry_points, version
from pathlib import Path
from typing import Any

from bots import control
from bots.app import Parts, load_all, open_store, run_program
from bots.cli.benchmark import try_out
from bots.cli.doctor import Examined, Level, as_json, examine, report
from bots.cli.usage import usage
from bots.provisioning import greeting
from bots.terminal.bot import Surroundings, TerminalBot, is_interactive, read_settings
from core.channels.terminal import TERMINAL
from core.commands.parser import find
from core.commands.table import COMMANDS
from core.config.loader import FILE_NAME, load_config
from core.config.schema import Config
from core.config.show import show_config
from core.errors import AppError, BadConfig, UserError
from core.i18n.messages import resolve, say
from core.observability import logs
from core.platform import Bot
from core.storage.home import Home

COMMAND_GROUP = "distributary.commands"
HOME_VARIABLE, CONFIG_VARIABLE = "DISTRIBUTARY_HOME", "DISTRIBUTARY_CONFIG"
_CHAT_DRAIN_S, _SERVE_DRAIN_S = 5.0, 30.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; its exit status. 2 is a wrong argument or configuration, 1 any other failure."""
    given = _parser().parse_args(arguments)
    try:
        return int(given.run(given))
    except KeyboardInterrupt:  # while loading: all is closed, but a thread in torch would hold up the exit
        os._exit(130)
    except Exception as error:  # the outermost handler: one line for the person, the rest with --verbose
        return _complain(error, verbose=given.verbose)


def _complain(error: Exception, *, verbose: bool) -> int:
    leaf: BaseException = error
    while isinstance(leaf, BaseExceptionGroup):
        leaf = next((one for one in leaf.exceptions if isinstance(one, AppError)), leaf.exceptions[0])
    if isinstance(leaf, BrokenPipeError):  # who read our output has gone: `| head` is no failure
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0
    if verbose:
        traceback.print_exception(error)
    if isinstance(leaf, AppError):
        told = control.sentence(leaf)
    else:
        told = f"{say('en', 'error.internal')} ({type(leaf).__name__}: {leaf}; --verbose shows more)"
    sys.stderr.write(f"distributary: {told}\n")
    return 2 if isinstance(leaf, BadConfig | UserError) else 1


# --- the commands ---


def _chat(given: argparse.Namespace) -> int:
    config, home = _config(given), _home(given)
    interactive = is_interactive() and os.environ.get("TERM", "") not in ("", "dumb")
    logs.install("info" if given.verbose else "warning")
    table = config.bots.get("terminal")
    settings = read_settings(table.settings if table else {})
    language = settings.language or _language()

    async def terminal(parts: Parts) -> Mapping[str, Bot]:
        lines = await parts.database.read(
            lambda tx: greeting(tx, parts.engine.info, settings.place, language, _version())
        )
        surroundings = Surroundings(language, lines, home.path / "history", _commands(language))
        return {"terminal": TerminalBot(settings, surroundings, interactive=interactive)}

    return asyncio.run(run_program(config, home, terminal, drain_s=_CHAT_DRAIN_S, restart=False))


def _serve(given: argparse.Namespace) -> int:
    home = _home(given)
    config, bots = load_all(_file(given), os.environ)
    _register(config)
    logs.install("debug" if given.verbose else config.log.level)
    if not bots:
        raise BadConfig(
            detail="no bot is enabled: add a table [bots.NAME]; deploy/config.example.toml shows how",
            file=str(config.file or "the configuration"),
            problems="no [bots.NAME]",
        )

    async def configured(_: Parts) -> Mapping[str, Bot]:
        return bots

    return asyncio.run(run_program(config, home, configured, drain_s=_SERVE_DRAIN_S, restart=True))


def _doctor(given: argparse.Namespace) -> int:
    problem = ""
    config: Config | None = None
    try:
        config = _config(given)
    except BadConfig as error:
        problem = error.detail
    patient = Examined(_home(given), config, problem, _language())
    findings, trial = examine(patient), None
    if given.bench:
        logs.install("warning")
        measured, trial = try_out(patient)
        findings = sorted([*findings, *measured], key=lambda finding: finding.level)
    sys.stdout.write(as_json(findings, bench=trial and asdict(trial)) if given.json else report(findings))
    return 1 if any(finding.level is Level.BAD for finding in findings) else 0


def _usage(given: argparse.Namespace) -> int:
    sys.stdout.write(usage(_home(given), given.channel, as_json=given.json))
    return 0


def _command(given: argparse.Namespace) -> int:
    """`distributary channel ...` is the chat command /channel ..., given by the terminal's owner."""
    return _ask(given, {"command": f"/{given.name} {shlex.join(given.words)}".strip()})


def _command_in_channel(given: argparse.Namespace) -> int:
    """The same, in a channel that is named. Files lie where this process runs, not the one that will read them."""
    words = list(given.words)
    first = words[:1]
    if given.name == "adapter" and first == ["import"]:
        words[1:] = map(_absolute, words[1:])
    elif given.name == "finetune" and first and not find("finetune").form(first[0].lower()):
        words[0] = _absolute(words[0])
    request = {"command": f"/{given.name} {shlex.join(words)}".strip()}
    return _ask(given, {**request, "channel": given.channel} if given.channel else request)


def _absolute(typed: str) -> str:
    """A path as every process understands it; the name of a data set as it is."""
    path = Path(typed).expanduser()
    return str(path.absolute()) if path.exists() else typed


def _plugin(given: argparse.Namespace) -> int:
    """A command that a bot brings: a function of its words that gives the text to print."""
    (entry,) = entry_points(group=COMMAND_GROUP, name=given.name)
    sys.stdout.write(entry.load()(given.words))
    return 0


def _apply(given: argparse.Namespace) -> int:
    """Show what would change, then change it if --yes was given or the question is answered so."""
    config = _config(given)
    if config.file is None:
        raise BadConfig(detail="there is no configuration file to apply; name one with --config", file="-", problems="")
    table = tomllib.loads(config.file.read_text(encoding="utf-8"))
    sections = ("generation", "limits", "partners", "channels")
    request = {"apply": {name: table[name] for name in sections if name in table}}
    told = _answer(given, {**request, "preview": True})
    sys.stdout.write(f"{told}\n")
    if told == say("en", "terminal.nothing_to_change"):
        return 0
    if not given.yes and not _agreed():
        sys.stdout.write(f"{say('en', 'terminal.not_applied')}\n")
        return 1
    _answer(given, request)
    return 0


def _agreed() -> bool:
    return sys.stdin.isatty() and input(say("en", "terminal.apply_question")).strip().lower() in ("y", "yes")


def _check(given: argparse.Namespace) -> int:
    config, _ = load_all(_file(given), os.environ)
    name = str(config.file) if config.file else say("en", "terminal.no_file")
    sys.stdout.write(f"{say('en', 'terminal.config_good', file=name)}\n")
    return 0


def _show(given: argparse.Namespace) -> int:
    sys.stdout.write(show_config(_config(given)))
    return 0


def _ask(given: argparse.Namespace, request: dict[str, Any]) -> int:
    sys.stdout.write(_answer(given, request) + "\n")
    return 0


def _answer(given: argparse.Namespace, request: dict[str, Any]) -> str:
    """The answer of the process that owns the home; if none does, of this one. Raises BadConfig with its error."""
    home = _home(given)
    answer = control.ask(home, request)
    if answer is None:
        answer = {"text": asyncio.run(_do_here(_config(given), home, request))}
    if "error" in answer:
        raise BadConfig(detail=answer["error"])
    return answer["text"].rstrip()


async def _do_here(config: Config, home: Home, request: dict[str, Any]) -> str:
    async with open_store(config, home) as database:
        desk = control.CommandRunner(database, home)
        if "apply" in request:
            return await desk.apply(request["apply"], only_preview=bool(request.get("preview")))
        return (await desk.run(request["command"], request.get("channel", TERMINAL))).text


# --- arguments and environment ---


def _shared() -> argparse.ArgumentParser:
    """What may stand before the command and after it. New each time: parsers change the defaults of their parents."""
    shared = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    shared.add_argument(
        "--config", type=Path, metavar="FILE", help=f"else ${CONFIG_VARIABLE}, else {FILE_NAME} in the home"
    )
    shared.add_argument(
        "--home",
        type=Path,
        metavar="DIR",
        help=f"where everything is kept; else ${HOME_VARIABLE}, else your data folder",
    )
    shared.add_argument("--verbose", "-v", action="store_true", help="log more; show tracebacks")
    return shared


def _parser() -> argparse.ArgumentParser:
    about = "A language model for people, through partner channels."
    parser = argparse.ArgumentParser("distributary", description=about, parents=[_shared()])
    parser.set_defaults(config=None, home=None, verbose=False)
    parser.add_argument("--version", action="version", version=f"distributary {version('distributary')}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def add(to: Any, name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        made: argparse.ArgumentParser = to.add_parser(name, help=text, description=text, parents=[_shared()])
        made.set_defaults(run=run, name=name)
        return made

    add(commands, "chat", _chat, "talk to the model here; piped lines are answered one by one")
    add(commands, "serve", _serve, "run the bots that the configuration enables")
    doctor = add(commands, "doctor", _doctor, "look for what is wrong, and say what to do")
    doctor.add_argument("--bench", action="store_true", help="load the model and measure how fast it answers, ~1 min")
    doctor.add_argument("--json", action="store_true")
    used = add(commands, "usage", _usage, "what was used, by day and channel")
    used.add_argument("channel", nargs="?", default="")
    used.add_argument("--json", action="store_true")
    for name, text in (
        ("channel", "list, create, show, set or archive channels"),
        ("operator", "invite, list or remove operators"),
    ):
        add(commands, name, _command, text).add_argument("words", nargs=argparse.REMAINDER, metavar="...")
    for name, text in (
        ("finetune", "improve a channel from a FILE; start, preview, status, list, data, cancel or resume a job"),
        ("adapter", "import an adapter from a folder or archive; list, show, promote, roll back or discard versions"),
    ):
        ordered = add(commands, name, _command_in_channel, text)
        ordered.add_argument("words", nargs="*", metavar="...", help=f"as /{name} takes them in a chat")
        ordered.add_argument("--channel", metavar="NAME", default="", help="whose it is; else the terminal's")
    for entry in entry_points(group=COMMAND_GROUP):
        add(commands, entry.name, _plugin, f"what the {entry.name} bot brings").add_argument(
            "words", nargs=argparse.REMAINDER, metavar="..."
        )
    config = add(commands, "config", _show, "show or check the configuration, or apply its channels and partners")
    what = config.add_subparsers(metavar="show|check|apply", required=True)
    add(what, "show", _show, "what is in use, secrets masked")
    add(what, "check", _check, "every mistake of the file, those of the bots' tables too")
    applied = add(what, "apply", _apply, "change existing channels and partners to what the file says")
    applied.add_argument("--yes", "-y", action="store_true", help="do not ask")
    return parser


def _home(given: argparse.Namespace) -> Home:
    chosen = given.home or os.environ.get(HOME_VARIABLE)
    if chosen:
        return Home(Path(chosen).expanduser().absolute())
    from platformdirs import user_data_path

    return Home(user_data_path("distributary"))


def _file(given: argparse.Namespace) -> Path | None:
    """The file that was named; else the home's, if there is one."""
    named = given.config or os.environ.get(CONFIG_VARIABLE)
    file = Path(named).expanduser() if named else _home(given).path / FILE_NAME
    return file if named or file.exists() else None


def _config(given: argparse.Namespace) -> Config:
    return _register(load_config(_file(given), os.environ))


def _register(config: Config) -> Config:
    for secret in config.secrets:
        logs.register_secret(secret)
    return config


def _language() -> str:
    """What the environment asks for, if we speak it."""
    variables = ("LC_ALL", "LC_MESSAGES", "LANG")
    wanted = next((os.environ[name] for name in variables if os.environ.get(name)), "")
    return resolve(wanted.partition(".")[0].replace("_", "-")) or "en"


def _commands(language: str) -> dict[str, str]:
    return {command.name: command.help(language) for command in COMMANDS}


def _version() -> str:
    return ".".join(version("distributary").split(".")[:2])


if __name__ == "__main__":
    sys.exit(main())
