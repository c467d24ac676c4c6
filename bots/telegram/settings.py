"""The table [bots.NAME] of a Telegram bot: what can be set, and what is wrong with it. Knows nothing of who uses it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields

from core.config.schema import nearest
from core.errors import BadConfig

TRANSPORTS = ("draft", "edit", "draft_direct", "off")
_TOKEN = re.compile(r"[0-9]{3,}:[A-Za-z0-9_-]{20,}")
_SECRET = re.compile(r"[A-Za-z0-9_-]{16,256}")
_LISTEN = re.compile(r"(\[[0-9a-fA-F:]+\]|[^\s:]+):([0-9]{1,5})")


@dataclass(frozen=True, slots=True)
class TelegramSettings:
    """`transport` is how an answer is shown while it is written. A `webhook` URL takes the place of long polling."""

    token: str = field(repr=False)
    transport: str = "draft"
    rich: bool = False  # answers with tables or formulas as rich messages
    webhook: str = ""
    webhook_secret: str = field(default="", repr=False)
    listen: str = "127.0.0.1:8081"
    api: str = "https://api.telegram.org"

    @property
    def host_and_port(self) -> tuple[str, int]:
        host, _, port = self.listen.rpartition(":")
        return host.strip("[]"), int(port)


def read_settings(given: Mapping[str, object]) -> TelegramSettings:
    """Raises BadConfig naming every key that is unknown, missing or wrong. A secret's value is never named."""
    known = {one.name: one for one in fields(TelegramSettings)}
    problems = [
        f"bots.telegram.{key} is unknown; there are {', '.join(known)}{nearest(key, known)}"
        for key in given
        if key not in known
    ]
    problems += [f"bots.telegram.{key} {wrong}" for key, value in given.items() if (wrong := _wrong(key, value))]
    problems += [
        f"bots.telegram.{name} is missing: it is what @BotFather gave you"
        for name, one in known.items()
        if one.default is MISSING and name not in given
    ]
    if given.get("webhook") and not given.get("webhook_secret"):
        problems.append("bots.telegram.webhook_secret is missing: without it anyone could speak in Telegram's name")
    if problems:
        raise BadConfig(detail="\n".join(problems), file="[bots.telegram]", problems="\n".join(problems))
    return TelegramSettings(**given)  # type: ignore[arg-type]


def _wrong(key: str, value: object) -> str:
    """What is allowed, if `value` is not; else nothing."""
    if key == "rich":
        return "" if isinstance(value, bool) else "must be true or false"
    if not isinstance(value, str):
        return "must be text"
    match key:
        case "token" if not _TOKEN.fullmatch(value):
            return "is no bot token: it looks like 123456:ABC-DEF..., as @BotFather gave it"
        case "transport" if value not in TRANSPORTS:
            return f"= {value!r} must be one of {', '.join(TRANSPORTS)}{nearest(value, TRANSPORTS)}"
        case "webhook" if value and not re.fullmatch(r"https?://[^\s?#]+", value):
            return f"= {value!r} must be the https:// address at which Telegram finds this machine"
        case "webhook_secret" if value and not _SECRET.fullmatch(value):
            return "must have 16 to 256 of A-Z a-z 0-9 _ -"
        case "listen" if not (found := _LISTEN.fullmatch(value)) or int(found[2]) > 65535:
            return f"= {value!r} must be host:port, for example 127.0.0.1:8081"
        case "api" if not re.fullmatch(r"https?://[^\s?#]+", value):
            return f"= {value!r} must be an address such as https://api.telegram.org"
    return ""
