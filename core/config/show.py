"""The configuration in use as text."""

from collections.abc import Mapping
from dataclasses import is_dataclass
from typing import Any

from core.config.keys import keys, toml
from core.config.loader import SECRET_KEY
from core.config.schema import SECTIONS, Config


def show_config(config: Config) -> str:
    """The whole configuration as TOML, defaults included, secrets masked."""
    lines = [f"# {config.file or 'no file: all defaults'}"]
    tables = {name: getattr(config, name) for name in SECTIONS if "." not in name}
    tables |= {f"partners.{name}": settings for name, settings in config.partners.items()}
    tables |= {f"channels.{name}": settings for name, settings in config.channels.items()}
    for name, settings in tables.items():
        lines += _table(name, settings, config.secrets)
    for name, bot in config.bots.items():
        lines += ["", f"[bots.{name}]", f"kind = {toml(bot.kind)}", *_settings(bot.settings, config.secrets)]
    return "\n".join(lines) + "\n"


def _table(path: str, section: Any, secrets: frozenset[str]) -> list[str]:
    lines, inner = ["", f"[{path}]"], []
    for name, one in keys(type(section)).items():
        if is_dataclass(value := getattr(section, name)):
            inner += _table(f"{path}.{name}", value, secrets)
        elif one.file:
            lines.append(f"{name} = {_masked(value, secrets)}")
    return lines + inner


def _masked(value: object, secrets: frozenset[str], *, hidden: bool = False) -> str:
    inside = value if isinstance(value, list | tuple) else [value]
    if value and (hidden or any(isinstance(one, str) and one in secrets for one in inside)):
        return '"***"'
    if isinstance(value, Mapping):
        return "{ " + ", ".join(_settings(value, secrets)) + " }"
    return toml(value)


def _settings(table: Mapping[str, object], secrets: frozenset[str]) -> list[str]:
    return [f"{k} = {_masked(v, secrets, hidden=bool(SECRET_KEY.search(k)))}" for k, v in table.items()]
