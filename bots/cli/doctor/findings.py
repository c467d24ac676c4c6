"""What a check finds: level, sentence, what to do; and the report of all findings."""

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from enum import IntEnum

from core.config.schema import Config
from core.i18n.messages import say
from core.storage.home import Home


class Level(IntEnum):
    BAD, WARNING, GOOD = range(3)


_SIGNS = {Level.BAD: "✗", Level.WARNING: "!", Level.GOOD: "✓"}
_WIDE = 70  # a longer sentence gets no column beside it


@dataclass(frozen=True, slots=True)
class Finding:
    """`name` is the thing that was checked, `text` its state, `action` what to do, "" if nothing."""

    level: Level
    name: str
    text: str
    action: str = ""


@dataclass(frozen=True, slots=True)
class Setup:
    """What is examined. `config` is None if it cannot be read; `problems` then holds one line each."""

    home: Home
    config: Config | None
    problems: tuple[str, ...] = ()
    language: str = "en"

    def say(self, key: str, /, **fields: str | int | float) -> str:
        return say(self.language, f"doctor.{key}", **fields)

    def finding(self, level: Level, name: str, key: str, /, **fields: str | int | float) -> Finding:
        """A finding with the message `key`; if it is not good, the action is the message `key_do`."""
        action = "" if level is Level.GOOD else self.say(f"{key}_do", **fields)
        return Finding(level, self.say(name), self.say(key, **fields), action)


Check = Callable[[Setup], Iterable[Finding]]


def report(findings: Iterable[Finding]) -> str:
    """The findings as lines of three columns."""
    rows = [(f"{_SIGNS[one.level]} {one.name}", one.text, one.action) for one in findings]
    first = max(len(row[0]) for row in rows)
    second = max((len(row[1]) for row in rows if row[2] and len(row[1]) < _WIDE), default=0)
    return "\n".join(f"{a:<{first}}   {b:<{second}}   {c}".rstrip() for a, b, c in rows) + "\n"


def as_json(findings: Iterable[Finding], **more: object) -> str:
    """The findings as JSON, `more` beside them."""
    rows = [{**asdict(one), "level": one.level.name.lower()} for one in findings]
    return json.dumps({"findings": rows, **more}, ensure_ascii=False, indent=2) + "\n"
