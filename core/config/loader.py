"""One TOML file and the environment -> one frozen Config. Unknown keys are refused. Knows nothing of who uses a value.

A string "env:NAME" is read from the environment, so that no secret needs to stand in the file.
All problems of a file are reported together; each names the key, the value and what is allowed.
"""

from __future__ import annotations

import re
import tomllib
import types
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from core.config.schema import GROUPS, KEYS, NAME, SECTIONS, BotTable, ChannelSeed, Config, nearest, presets
from core.config.sections import PRESETS
from core.errors import BadConfig
from core.types import Limits

FILE_NAME = "config.toml"
_ENV = "env:"
_SECRET_KEY = re.compile(r"token|secret|password|passphrase|api_key|signing|credential", re.IGNORECASE)


# --- reading ---


def load_config(file: Path | None, environment: Mapping[str, str]) -> Config:
    """Read the file, or take the defaults where there is none. Raises BadConfig with every problem found."""
    if file is None:
        return Config()
    try:
        given = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise _bad(file, [f"cannot be read: {error.strerror}"]) from error
    except ValueError as error:
        raise _bad(file, [f"is not TOML: {error}"]) from error
    return read_config(given, environment, file)


def read_config(given: Mapping[str, Any], environment: Mapping[str, str], file: Path | None = None) -> Config:
    """A parsed file -> Config. Raises BadConfig with every problem found."""
    reader = _Reader(environment)
    filled = reader.fill(given)
    config = reader.config(filled, file)
    if reader.problems:
        raise _bad(file, reader.problems)
    return config


@dataclass(slots=True)
class _Reader:
    environment: Mapping[str, str]
    problems: list[str] = field(default_factory=list)
    secrets: set[str] = field(default_factory=set)

    def config(self, given: Mapping[str, Any], file: Path | None) -> Config:
        known = [name for name in SECTIONS if "." not in name] + list(GROUPS)
        for name in given:
            if name not in known:
                self.problems.append(f"[{name}] is unknown; there are {', '.join(known)}{nearest(name, known)}")
        parts = {name: self.section(name, name, given.get(name, {})) for name in known if name not in GROUPS}
        if parts["engine"].kind == "remote" and not parts["engine"].url:
            self.problems.append("engine.url is empty; engine.kind = 'remote' needs the address of its server")
        limits: Limits = parts["limits"]
        channels = {n: self.channel(n, t, limits) for n, t in self.tables(given, "channels")}
        self.bound_once(channels)
        chosen, written = parts["finetune"], given.get("finetune", {})
        if isinstance(written, Mapping):
            own = {key: getattr(chosen, key) for key in written if key in KEYS["finetune"]}
            parts["finetune_presets"] = presets(own)
            parts["finetune"] = replace(chosen, **{**PRESETS[chosen.preset], **own})
        return Config(
            **parts,
            partners={n: self.section(f"partners.{n}", "partners.NAME", t) for n, t in self.tables(given, "partners")},
            channels=channels,
            bots={n: self.bot(n, t) for n, t in self.tables(given, "bots") if t.get("enabled", True) is not False},
            file=file,
            secrets=frozenset(self.secrets - {""}),
        )

    def tables(self, given: Mapping[str, Any], group: str) -> list[tuple[str, Mapping[str, Any]]]:
        """The named tables of a group. Names are checked."""
        tables = given.get(group, {})
        found = []
        for name, table in tables.items() if isinstance(tables, Mapping) else [("", None)]:
            if not isinstance(table, Mapping):
                self.problems.append(f"[{group}] holds tables: [{group}.NAME]")
            elif not NAME.fullmatch(name):
                self.problems.append(f"[{group}.{name}]: a name has small letters, digits, dots, dashes, underscores")
            else:
                found.append((name, table))
        return found

    def channel(self, name: str, table: Mapping[str, Any], limits: Limits) -> ChannelSeed:
        own = self.section(f"channels.{name}.limits", "limits", table.get("limits", {}), base=limits)
        rest = {key: value for key, value in table.items() if key != "limits"}
        seed = self.section(f"channels.{name}", "channels.NAME", rest, limits=own)
        for place in seed.bind:
            if not re.fullmatch(r"[a-z0-9_]+:[^/\s]+(/\S+)?", place):
                self.problems.append(
                    f"channels.{name}.bind: {place!r} must look like platform:account or platform:account/place"
                )
        return seed  # type: ignore[no-any-return]

    def bound_once(self, channels: Mapping[str, ChannelSeed]) -> None:
        holders: dict[str, str] = {}
        for name, seed in channels.items():
            for place in seed.bind:
                holder = holders.setdefault(place, name)
                if holder != name:
                    self.problems.append(f"channels.{name}.bind: {place!r} is bound in channels.{holder} already")

    def bot(self, name: str, table: Mapping[str, Any]) -> BotTable:
        kind = table.get("kind", name)
        if not isinstance(kind, str):
            self.problems.append(f"bots.{name}.kind = {kind!r} must be text")
        if not isinstance(table.get("enabled", True), bool):
            self.problems.append(f"bots.{name}.enabled = {table['enabled']!r} must be true or false")
        settings = {key: value for key, value in table.items() if key not in ("kind", "enabled")}
        self.secrets |= {str(value) for key, value in settings.items() if _SECRET_KEY.search(key)}
        return BotTable(str(kind), types.MappingProxyType(settings))

    def section(self, path: str, kind: str, given: object, base: object = None, **fixed: object) -> Any:
        """One table as its dataclass. What is wrong is noted, and the default stands in its place."""
        made, keys = SECTIONS[kind], KEYS[kind]
        if not isinstance(given, Mapping):
            self.problems.append(f"{path} = {given!r} must be a table: [{path}]")
            given = {}
        values: dict[str, Any] = {} if base is None else {one.name: getattr(base, one.name) for one in fields(made)}
        hints = get_type_hints(made)
        for name, value in given.items():
            if name not in keys:
                self.problems.append(
                    f"{path}.{name} is unknown; [{path}] has {', '.join(keys)}{nearest(name, list(keys))}"
                )
                continue
            try:
                value = _typed(value, hints[name])
                wrong = keys[name].refuse(value)
            except (ValueError, OverflowError) as error:
                wrong = str(error)
            if keys[name].secret:
                self.secrets.add(str(value))
            if wrong:
                self.problems.append(f"{path}.{name} = {'***' if keys[name].secret else repr(value)} {wrong}")
            else:
                values[name] = value
        return made(**{**values, **fixed})

    def fill(self, value: Any, path: str = "") -> Any:
        """Put the environment's values in the place of "env:NAME"."""
        if isinstance(value, Mapping):
            return {key: self.fill(inner, f"{path}.{key}" if path else key) for key, inner in value.items()}
        if isinstance(value, list):
            return [self.fill(inner, path) for inner in value]
        if isinstance(value, str) and value.startswith(_ENV):
            name = value.removeprefix(_ENV)
            self.secrets.add(self.environment.get(name, ""))
            if not self.environment.get(name):
                self.problems.append(f"{path} = {value!r}: the environment variable {name} is not set")
            return self.environment.get(name, "")
        return value


def _typed(value: Any, hint: Any) -> Any:
    """`value` as the field's type; raises ValueError saying which that is."""
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):  # float | None: "auto" is None
        return None if value == "auto" else _typed(value, next(a for a in get_args(hint) if a is not type(None)))
    if origin is Literal:
        hint = str
    if origin is tuple:
        if isinstance(value, list) and all(isinstance(one, str) for one in value):
            return tuple(value)
        raise ValueError('must be a list of texts: ["..."]')
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, hint) and not (isinstance(value, bool) and hint is not bool):
        return value
    raise ValueError(f"must be {_TYPE_NAMES[hint]}")


_TYPE_NAMES: Mapping[Any, str] = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}


def _bad(file: Path | None, problems: list[str]) -> BadConfig:
    where = str(file) if file else "the configuration"
    lines = "\n".join(f"  {problem}" for problem in problems)
    return BadConfig(detail=f"{where}:\n{lines}", file=where, problems="\n".join(problems))


# --- showing ---


def show_config(config: Config) -> str:
    """The whole configuration as TOML, defaults included, secrets masked."""
    lines = [f"# {config.file or 'no file: all defaults'}"]
    for name in SECTIONS:
        if "." not in name:
            lines += _table(name, getattr(config, name), config.secrets)
    for group in ("partners", "channels"):
        for name, seed in getattr(config, group).items():
            lines += _table(f"{group}.{name}", seed, config.secrets)
    for name, bot in config.bots.items():
        lines += ["", f"[bots.{name}]", f"kind = {_toml(bot.kind)}"]
        lines += [
            f"{key} = {_masked(f'bots.{name}.{key}', value, config.secrets)}" for key, value in bot.settings.items()
        ]
    return "\n".join(lines) + "\n"


def _table(path: str, section: Any, secrets: frozenset[str]) -> list[str]:
    lines = ["", f"[{path}]"]
    inner: list[str] = []
    for one in fields(section):
        value = getattr(section, one.name)
        if is_dataclass(value):
            inner += _table(f"{path}.{one.name}", value, secrets)
        else:
            lines.append(f"{one.name} = {_masked(f'{path}.{one.name}', value, secrets)}")
    return lines + inner


def _masked(path: str, value: object, secrets: frozenset[str]) -> str:
    inside = value if isinstance(value, list | tuple) else [value]
    hidden = path.startswith("bots.") and _SECRET_KEY.search(path.rpartition(".")[2])
    if value and (hidden or any(isinstance(one, str) and one in secrets for one in inside)):
        return '"***"'
    if isinstance(value, Mapping):
        shown = (f"{key} = {_masked(f'{path}.{key}', inner, secrets)}" for key, inner in value.items())
        return "{ " + ", ".join(shown) + " }"
    return _toml(value)


def _toml(value: object) -> str:
    match value:
        case None:
            return '"auto"'
        case bool():
            return str(value).lower()
        case str():
            escaped = value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
            return f'"{escaped}"'
        case list() | tuple():
            return "[" + ", ".join(_toml(inner) for inner in value) + "]"
        case float():
            return f"{value:g}" if value != int(value) or abs(value) > 1e15 else f"{value:.1f}"
        case _:
            return str(value)


def config_table_markdown() -> str:
    """Every key with its default and its meaning, for the README."""
    lines = ["| key | default | meaning |", "|---|---|---|"]
    for section, keys in KEYS.items():
        defaults = {one.name: _default(one) for one in fields(SECTIONS[section])}
        for name, key in keys.items():
            shown = "" if is_dataclass(defaults[name]) else f"`{_toml(defaults[name])}`"
            choices = f" ({', '.join(choice or '(empty)' for choice in key.choices)})" if key.choices else ""
            lines.append(f"| `{section}.{name}` | {shown} | {key.meaning}{choices} |")
    return "\n".join(lines) + "\n"


def _default(one: Field[Any]) -> Any:
    return one.default_factory() if one.default_factory is not MISSING else one.default
