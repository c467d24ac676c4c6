"""The options that every command takes, and what they name: the home, the configuration, the language."""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import click

from bots.app import load_all
from bots.shared.render import printable
from core.config.loader import FILE_NAME, load_config
from core.config.schema import Config
from core.i18n.messages import resolve
from core.observability import logs
from core.platform import Bot
from core.storage.home import Home

HOME_VARIABLE, CONFIG_VARIABLE = "DISTRIBUTARY_HOME", "DISTRIBUTARY_CONFIG"
F = TypeVar("F", bound=Callable[..., Any])


@dataclass(slots=True)
class Options:
    """The shared options as given; None where an option is not given."""

    config_file: Path | None = None
    home_folder: Path | None = None
    verbose: bool = False

    @property
    def home(self) -> Home:
        """--home, else the environment's, else the platform's data folder."""
        chosen = self.home_folder or os.environ.get(HOME_VARIABLE)
        if chosen:
            return Home(Path(chosen).expanduser().absolute())
        from platformdirs import user_data_path

        return Home(user_data_path("distributary"))

    @property
    def file(self) -> Path | None:
        """--config, else the environment's file, else the home's if it exists."""
        named = self.config_file or os.environ.get(CONFIG_VARIABLE)
        file = Path(named).expanduser() if named else self.home.path / FILE_NAME
        return file if named or file.exists() else None

    def config(self) -> Config:
        """The configuration of the file, or the defaults; the log masks its secrets from then on. Raises BadConfig."""
        config = load_config(self.file, os.environ)
        _mask(config)
        return config

    def config_and_bots(self) -> tuple[Config, dict[str, Bot]]:
        """The configuration and its bots. Raises BadConfig with the problems of both."""
        config, bots = load_all(self.file, os.environ)
        _mask(config)
        return config, bots


pass_options = click.make_pass_decorator(Options, ensure=True)


def shared_options(command: F) -> F:
    """Add the shared options. They may stand before the command and after it; the later one counts."""

    def store(context: click.Context, parameter: click.Parameter, value: Any) -> None:
        options = context.ensure_object(Options)
        if value:
            setattr(options, str(parameter.name), value)

    folder, file = click.Path(path_type=Path), click.Path(path_type=Path, dir_okay=False)
    options: tuple[tuple[tuple[str, ...], dict[str, Any]], ...] = (
        (("--verbose", "-v"), {"is_flag": True, "help": "Log more, and show tracebacks."}),
        (
            ("--home", "home_folder"),
            {
                "type": folder,
                "metavar": "DIR",
                "help": f"Folder of all data; else ${HOME_VARIABLE}, else your data folder.",
            },
        ),
        (
            ("--config", "config_file"),
            {"type": file, "metavar": "FILE", "help": f"Else ${CONFIG_VARIABLE}, else {FILE_NAME} in the home."},
        ),
    )
    for flags, settings in options:
        command = click.option(*flags, callback=store, expose_value=False, **settings)(command)
    return command


def _mask(config: Config) -> None:
    for secret in config.secrets:
        logs.register_secret(secret)


def language() -> str:
    """The language of the environment if there are messages in it, else English."""
    variables = ("LC_ALL", "LC_MESSAGES", "LANG")
    wanted = next((os.environ[name] for name in variables if os.environ.get(name)), "")
    return resolve(wanted.partition(".")[0].replace("_", "-")) or "en"


def write_out(text: str) -> None:
    """Write to standard output: titles and labels of people must not steer the terminal."""
    sys.stdout.write(printable(text))
