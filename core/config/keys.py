"""A setting is a dataclass field made by `key`: its default, its help and its bounds, once for every reader.

`keys(Section)` lists them. Each `Key` validates a value of a file (`read`) and the text of a command (`parse`) with
pydantic; a refusal is a `Refusal`, which says what is allowed in the language of the reader.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from difflib import get_close_matches
from functools import cache
from typing import Annotated, Any, Literal, TypeVar, cast, get_type_hints

import pydantic
from pydantic import AfterValidator, BeforeValidator, ConfigDict, TypeAdapter

from core.i18n.messages import Lazy, Refusal, languages, resolve

T = TypeVar("T")
NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
PLACE = re.compile(r"([a-z0-9_]+):([^\s:/]+)(?:[:/](\S+))?")
_LISTEN = re.compile(r"(?:\[[0-9a-fA-F:]+\]|[^\s:\[\]]+):([0-9]{1,5})")
_STRICT = ConfigDict(strict=True, allow_inf_nan=False)
_SHOWN = 80
_INTEGER = re.compile(r"-?[0-9]{1,20}")
_NUMBER = re.compile(r"-?[0-9]{1,20}(\.[0-9]{1,20})?([eE][-+]?[0-9]{1,3})?")


def key(
    default: T,
    help: str,
    *,
    chat: Literal["", "operator", "owner"] = "",
    file: bool = True,
    secret: bool = False,
    shape: str = "",
    example: object = None,
    **bounds: Any,
) -> T:
    """A field of a section. `bounds` are pydantic's: ge, gt, le, min_length, max_length, pattern.

    chat: who may also set it with /channel set. file: whether a file may. secret: its value is never shown. shape: how
    a value that has a pattern looks, for people. example: the value in the example file, where it is not the default.
    """
    if pattern := bounds.get("pattern"):
        bounds["pattern"] = f"^(?:{pattern})$"
    metadata = dict(help=help, chat=chat, file=file, secret=secret, shape=shape, example=example, bounds=bounds)  # noqa: C408
    made: Any = field(default=default, metadata=metadata, repr=not secret)
    return made  # type: ignore[no-any-return]


def table(made: type[T], help: str) -> T:
    """A field that is a section of its own."""
    return field(default_factory=made, metadata={"help": help})


@dataclass(frozen=True, slots=True)
class Key:
    """One setting. `schema` is the JSON schema of its values; `section` is its type where it is a table of keys."""

    name: str
    default: Any
    help: str
    chat: str = ""
    file: bool = True
    secret: bool = False
    shape: str = ""
    example: object = None
    optional: bool = False  # "auto" in a file is None
    section: type | None = None
    schema: Mapping[str, Any] = field(default_factory=dict)
    adapter: TypeAdapter[Any] | None = field(default=None, repr=False)

    @property
    def low(self) -> int | float:
        return self.schema.get("minimum", self.schema.get("exclusiveMinimum", 0))  # type: ignore[no-any-return]

    @property
    def high(self) -> int | float:
        return self.schema["maximum"]  # type: ignore[no-any-return]

    @property
    def longest(self) -> int:  # characters of a text; 0 is no bound
        return int(self.schema.get("maxLength", 0))

    @property
    def choices(self) -> tuple[str, ...]:
        return tuple(self.schema.get("enum", ()))

    def read(self, value: object) -> Any:
        """The typed value of what TOML or JSON holds. Raises Refusal."""
        assert self.adapter is not None, self.name
        if value == "auto" and self.optional:
            return None
        inside = value if isinstance(value, list | tuple) else (value,)
        if any(isinstance(one, str) and "\0" in one for one in inside):
            raise Refusal("setting.no_nul")
        try:
            return self.adapter.validate_python(tuple(value) if isinstance(value, list) else value)
        except pydantic.ValidationError as error:
            own = (one.get("ctx", {}).get("error") for one in error.errors())
            wrong = refusal(self.needs(), value, self.choices)
            raise next((one for one in own if isinstance(one, Refusal)), wrong) from None

    def parse(self, text: str) -> Any:
        """The typed value of what a person types. Raises Refusal."""
        match self.schema.get("type"):
            case "boolean":
                return self.read({"true": True, "false": False}.get(text.lower(), text))
            case "integer" if _INTEGER.fullmatch(text):
                return self.read(int(text))
            case "number" if _NUMBER.fullmatch(text):
                return self.read(float(text))
            case "array":
                return self.read([one.strip() for one in re.split(r"[|\n]", text) if one.strip()])
        return self.read(text)

    def needs(self) -> Lazy:
        """What is allowed, as a clause."""
        schema = self.schema
        bounds = {"low": _plain(self.low), "high": _plain(schema.get("maximum", 0))}
        if self.choices:
            return Lazy("setting.one_of", choices=", ".join(one or '""' for one in self.choices))
        if self.shape:
            return Lazy("setting.like", shape=self.shape)
        match schema.get("type"):
            case "boolean":
                return Lazy("setting.boolean")
            case "integer":
                return Lazy("setting.whole", **bounds)
            case "number" if "exclusiveMinimum" in schema:
                return Lazy("setting.above", **bounds)
            case "number":
                return Lazy("setting.auto_number" if self.optional else "setting.number", **bounds)
            case "array" if longest := schema["items"].get("maxLength"):
                return Lazy("setting.list_bounded", most=schema["maxItems"], limit=longest)
            case "array":
                return Lazy("setting.list")
        return Lazy("setting.shorter", limit=self.longest) if self.longest else Lazy("setting.text")


def _keys(section: Any) -> Mapping[str, Key]:
    """The settings of a section, by name, in the order of its fields; `kind`, which says what the others do, first."""
    hints = get_type_hints(section, include_extras=True)
    made = (one for one in fields(section) if "help" in one.metadata)
    return {one.name: _key(one, hints[one.name]) for one in sorted(made, key=lambda one: one.name != "kind")}


keys: Callable[[Any], Mapping[str, Key]] = cache(_keys)  # a plain `cache` takes no generic type


def _key(one: Field[Any], hint: Any) -> Key:
    default = one.default_factory() if one.default_factory is not MISSING else one.default
    given = {name: value for name, value in one.metadata.items() if name != "bounds"}
    if is_dataclass(hint):
        return Key(one.name, default, section=cast("type", hint), **given)
    bounded = Annotated[hint, pydantic.Field(**one.metadata["bounds"])] if one.metadata.get("bounds") else hint
    adapter: TypeAdapter[Any] = TypeAdapter(bounded, config=_STRICT)
    schema = adapter.json_schema()
    optional = "anyOf" in schema
    schema = schema["anyOf"][0] if optional else schema
    return Key(one.name, default, optional=optional, schema=schema, adapter=adapter, **given)


# --- kinds of values ---


def _language(text: str) -> str:
    if text.lower() in ("", "auto"):
        return ""
    if found := resolve(text):
        return found
    raise Refusal("setting.language", codes=", ".join(languages()))


def _place(text: str) -> str:
    found = PLACE.fullmatch(text)
    if found is None:
        raise Refusal("setting.place")
    return f"{found[1]}:{found[2]}" + (f"/{found[3]}" if found[3] else "")


def _listen(text: str) -> str:
    if text and not ((found := _LISTEN.fullmatch(text)) and int(found[1]) <= 65535):
        raise Refusal("setting.listen")
    return text


def _percent(value: object) -> object:
    """A number of percent, or a text that ends with the sign. Refuses what looks like a fraction of one."""
    if isinstance(value, str) and value.endswith("%") and _NUMBER.fullmatch(bare := value[:-1].strip()):
        return float(bare)
    if isinstance(value, float) and 0 < value < 1:
        raise Refusal("setting.fraction", value=_plain(value), percent=_plain(value * 100))
    return value


Line = Annotated[str, AfterValidator(lambda text: " ".join(text.split()))]  # text without line breaks
Language = Annotated[str, AfterValidator(_language)]  # of a file in core/i18n; "" is each person's own
Place = Annotated[str, AfterValidator(_place)]  # platform:account or platform:account/place
Listen = Annotated[str, AfterValidator(_listen)]  # host:port; "" is off
_HUNDREDTHS = AfterValidator(lambda percent: round(percent, 2))  # as it is stored
Percent = Annotated[float, pydantic.Field(ge=0, le=100), BeforeValidator(_percent), _HUNDREDTHS]  # 30 and "30%" are one


def host_and_port(listen: str) -> tuple[str, int]:
    """The two parts of a `Listen` that is on."""
    host, _, port = listen.rpartition(":")
    return host.strip("[]"), int(port)


# --- whole tables ---


class Problems:
    """What is wrong with a configuration, a line for each mistake; and the values that must never be shown."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.secrets: set[str] = set()

    def section(self, made: type[T], path: str, given: object, base: T | None = None, **fixed: object) -> T:
        """A table as its dataclass. A wrong key is noted and takes its default, or its value in `base`."""
        known = {name: one for name, one in keys(made).items() if one.file}
        if not isinstance(given, Mapping):
            self.lines.append(f"{path} = {shown(given)} must be a table: [{path}]")
            given = {}
        values: dict[str, Any] = {} if base is None else {name: getattr(base, name) for name in known}
        for name, value in given.items():
            one = known.get(name)
            if one is None:
                self.lines.append(f"{path}.{name} is unknown; [{path}] has {', '.join(known)}{nearest(name, known)}")
            elif one.section is None:
                try:
                    values[name] = one.read(value)
                except Refusal as refusal:
                    self.lines.append(refused(one, value, refusal, path).render("en"))
                if one.secret:
                    self.secrets.add(str(value))
        return made(**{**values, **fixed})


def refusal(need: Lazy, value: object, known: Iterable[str] = ()) -> Refusal:
    """What to raise for a value: what it `needs`, and the known one that was meant."""
    if meant := get_close_matches(str(value), [one for one in known if one], 1):
        return Refusal("setting.nearest", need=need, nearest=meant[0])
    return Refusal(str(need), **need.fields)


def refused(one: Key, value: object, refusal: Refusal, path: str = "") -> Lazy:
    """What is wrong, as a clause: key, value and what is allowed. Without a path, the value is what a person typed."""
    name = f"{path}.{one.name}" if path else one.name
    told = brief(value) if not path and isinstance(value, str) else shown(value)
    return Lazy("setting.refused", setting=name, value="***" if one.secret else told, need=refusal.reason)


def shown(value: object) -> str:
    """A value as TOML has it, in one short line."""
    return f'"{brief(value)}"' if isinstance(value, str) else brief(toml(value))


def brief(text: str) -> str:
    """One short line of a text."""
    line = " ".join(text.split())
    return line if len(line) <= _SHOWN else f"{line[:_SHOWN]}…"


def nearest(name: str, known: Iterable[str]) -> str:
    """The known name that was meant, as the end of a sentence."""
    found = get_close_matches(name, list(known), 1)
    return f"; did you mean {found[0]}?" if found else ""


def toml(value: object) -> str:
    """A value as TOML; None is "auto"."""
    match value:
        case None:
            return '"auto"'
        case bool():
            return str(value).lower()
        case str():
            return '"' + value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'
        case list() | tuple():
            return "[" + ", ".join(toml(inner) for inner in value) + "]"
        case Mapping():
            return "{ " + ", ".join(f"{name} = {toml(inner)}" for name, inner in value.items()) + " }"
        case float():
            return f"{value:g}" if value != value or abs(value) > 1e15 or value != int(value) else f"{value:.1f}"
        case _:
            return str(value)


def _plain(number: float) -> str:
    return f"{number:.10g}"
