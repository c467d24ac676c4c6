"""Reads config.toml and the environment into one frozen Config; all mistakes of a file are reported together.

A string "env:NAME" is replaced by the environment variable NAME, so that no secret stands in the file.
"""

import re
import tomllib
import types
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from core.config.keys import NAME, Problems, keys, nearest, refusal, refused, shown
from core.config.schema import (
    OWNER_PARTNER,
    RESERVED,
    SECTIONS,
    BotTable,
    ChannelSettings,
    Config,
    PartnerSettings,
    presets,
)
from core.config.sections import PRESETS
from core.errors import BadConfig
from core.i18n.messages import Lazy
from core.types import Limits

FILE_NAME = "config.toml"
GROUPS = ("partners", "channels", "bots")
SECRET_KEY = re.compile(r"token|secret|password|passphrase|api_key|signing|credential", re.IGNORECASE)
_ENV = "env:"
T = TypeVar("T")


def load_config(file: Path | None, environment: Mapping[str, str]) -> Config:
    """The file's configuration, or the defaults if there is no file. Raises BadConfig with every problem."""
    config, problems = examine_file(file, environment)
    if problems:
        raise bad_config(file, problems)
    return config


def examine_file(file: Path | None, environment: Mapping[str, str]) -> tuple[Config, list[str]]:
    """The file's configuration with the default in place of each wrong value, and every problem.

    Raises BadConfig for a file that cannot be read at all.
    """
    try:
        given = tomllib.loads(file.read_text(encoding="utf-8")) if file else {}
    except OSError as error:
        raise bad_config(file, [f"cannot be read: {error.strerror}"]) from error
    except ValueError as error:
        raise bad_config(file, [f"is not TOML: {error}"]) from error
    reader = _Reader(environment)
    return reader.config(reader.fill(given), file), reader.lines


def read_config(given: Mapping[str, Any], environment: Mapping[str, str]) -> Config:
    """The configuration of a parsed file. Raises BadConfig with every problem."""
    reader = _Reader(environment)
    config = reader.config(reader.fill(given), None)
    if reader.lines:
        raise bad_config(None, reader.lines)
    return config


def read_table(made: type[T], path: str, given: Mapping[str, object], *missing: str) -> T:
    """The table of a bot as its dataclass. Raises BadConfig with every problem; `missing` are those of the bot."""
    problems = Problems()
    section = problems.section(made, path, given)
    if lines := [*problems.lines, *missing]:
        raise BadConfig(detail="\n".join(lines), file=f"[{path}]", problems="\n".join(lines))
    return section


def bad_config(file: Path | None, problems: list[str]) -> BadConfig:
    where = str(file) if file else "the configuration"
    lines = "\n".join(f"  {problem}" for problem in problems)
    return BadConfig(detail=f"{where}:\n{lines}", file=where, problems="\n".join(problems))


class _Reader(Problems):
    def __init__(self, environment: Mapping[str, str]) -> None:
        super().__init__()
        self.environment = environment

    def config(self, given: Mapping[str, Any], file: Path | None) -> Config:
        single = [name for name in SECTIONS if "." not in name]
        known = [*single, *GROUPS]
        self.lines += [
            f"[{name}] is unknown; there are {', '.join(known)}{nearest(name, known)}"
            for name in given
            if name not in known
        ]
        parts: dict[str, Any] = {name: self.section(SECTIONS[name], name, given.get(name, {})) for name in single}
        if parts["engine"].kind == "remote" and not parts["engine"].url:
            self.lines.append('engine.url is empty; engine.kind = "remote" needs the address of its server')
        parts |= _with_preset(parts["finetune"], given.get("finetune", {}))
        partners = {
            name: self.section(PartnerSettings, f"partners.{name}", table, written=frozenset(table))
            for name, table in self.tables(given, "partners")
        }
        found = self.tables(given, "channels")
        channels = {name: self.channel(name, table, parts["limits"], partners) for name, table in found}
        self.bound_once(channels)
        enabled = [one for one in self.tables(given, "bots") if one[1].get("enabled", True) is not False]
        bots = {name: self.bot(name, table) for name, table in enabled}
        secrets = frozenset(self.secrets - {""})
        return Config(**parts, partners=partners, channels=channels, bots=bots, file=file, secrets=secrets)

    def tables(self, given: Mapping[str, Any], group: str) -> list[tuple[str, Mapping[str, Any]]]:
        """The named tables of a group. Names are checked."""
        tables = given.get(group, {})
        found = []
        for name, table in tables.items() if isinstance(tables, Mapping) else [("", None)]:
            if not isinstance(table, Mapping):
                self.lines.append(f"[{group}] holds tables: [{group}.NAME]")
            elif not NAME.fullmatch(name):
                self.lines.append(f"[{group}.{name}]: a name has small letters, digits, dots, dashes, underscores")
            elif group == "channels" and name in RESERVED:
                self.lines.append(f"[{group}.{name}]: {name} is reserved; choose another name")
            else:
                found.append((name, table))
        return found

    def channel(
        self, name: str, table: Mapping[str, Any], limits: Limits, partners: Mapping[str, PartnerSettings]
    ) -> ChannelSettings:
        path, own = f"channels.{name}", table.get("limits", {})
        written = frozenset({*table, *(own if isinstance(own, Mapping) else ())})
        own_limits = self.section(Limits, f"{path}.limits", own, limits)
        settings = self.section(ChannelSettings, path, table, limits=own_limits, written=written)
        if settings.partner not in (known := list(dict.fromkeys([OWNER_PARTNER, *partners]))):
            need = Lazy("setting.partner", partners=", ".join(known), name=settings.partner)
            wrong = refusal(need, settings.partner, known)
            self.lines.append(refused(keys(ChannelSettings)["partner"], settings.partner, wrong, path).render("en"))
        return settings

    def bound_once(self, channels: Mapping[str, ChannelSettings]) -> None:
        holders: dict[str, str] = {}
        for name, settings in channels.items():
            for place in settings.bind:
                holder = holders.setdefault(place, name)
                if holder != name:
                    self.lines.append(f"channels.{name}.bind: {shown(place)} is bound in channels.{holder} already")

    def bot(self, name: str, table: Mapping[str, Any]) -> BotTable:
        kind = table.get("kind", name)
        if not isinstance(kind, str):
            self.lines.append(f"bots.{name}.kind = {shown(kind)} must be text")
        if not isinstance(table.get("enabled", True), bool):
            self.lines.append(f"bots.{name}.enabled = {shown(table['enabled'])} must be true or false")
        settings = {key: value for key, value in table.items() if key not in ("kind", "enabled")}
        self.secrets |= {str(value) for key, value in settings.items() if SECRET_KEY.search(key)}
        return BotTable(str(kind), types.MappingProxyType(settings))

    def fill(self, value: Any, path: str = "") -> Any:
        """Replace "env:NAME" by the environment's value."""
        if isinstance(value, Mapping):
            return {key: self.fill(inner, f"{path}.{key}" if path else key) for key, inner in value.items()}
        if isinstance(value, list):
            return [self.fill(inner, path) for inner in value]
        if isinstance(value, str) and value.startswith(_ENV):
            name = value.removeprefix(_ENV)
            self.secrets.add(self.environment.get(name, ""))
            if not self.environment.get(name):
                self.lines.append(f"{path} = {shown(value)}: the environment variable {name} is not set")
            return self.environment.get(name, "")
        return value


def _with_preset(chosen: Any, written: object) -> dict[str, Any]:
    """[finetune] with its preset, and the hyper-parameters under every preset; what the file sets wins."""
    names = keys(type(chosen)).keys() & (written if isinstance(written, Mapping) else ())
    own = {name: getattr(chosen, name) for name in names}
    return {"finetune": replace(chosen, **{**PRESETS[chosen.preset], **own}), "finetune_presets": presets(own)}
