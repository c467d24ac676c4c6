"""The table [bots.NAME] of a Slack bot: what can be set, and what is wrong with it. Knows nothing of who uses it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields

from core.config.schema import nearest
from core.errors import BadConfig

TRANSPORTS = ("stream", "edit")
_LISTEN = re.compile(r"(\[[0-9a-fA-F:]+\]|[^\s:]+):([0-9]{1,5})")
_URL = re.compile(r"https?://[^\s?#]+")


@dataclass(frozen=True, slots=True)
class SlackSettings:
    """One Slack app. With `app_token` it listens by Socket Mode, with `signing_secret` over HTTP.

    With `token` it serves the one workspace that gave it; with `client_id` and `client_secret` all that install it.
    `transport` is how an answer is shown while it is written.
    """

    token: str = field(default="", repr=False)
    app_token: str = field(default="", repr=False)
    signing_secret: str = field(default="", repr=False)
    client_id: str = ""
    client_secret: str = field(default="", repr=False)
    url: str = ""
    listen: str = "127.0.0.1:8082"
    transport: str = "stream"
    api: str = "https://slack.com/api/"

    @property
    def host_and_port(self) -> tuple[str, int]:
        host, _, port = self.listen.rpartition(":")
        return host.strip("[]"), int(port)


def read_settings(given: Mapping[str, object]) -> SlackSettings:
    """Raises BadConfig naming every key that is unknown, missing or wrong. A secret's value is never named."""
    known = [one.name for one in fields(SlackSettings)]
    problems = [
        f"bots.slack.{key} is unknown; there are {', '.join(known)}{nearest(key, known)}"
        for key in given
        if key not in known
    ]
    problems += [f"bots.slack.{key} {wrong}" for key, value in given.items() if (wrong := _wrong(key, value))]
    problems += _missing({key for key, value in given.items() if value})
    if problems:
        raise BadConfig(detail="\n".join(problems), file="[bots.slack]", problems="\n".join(problems))
    return SlackSettings(**given)  # type: ignore[arg-type]


def _missing(given: set[str]) -> list[str]:
    """What the chosen ways need and do not have."""
    problems = []
    if not given & {"app_token", "signing_secret"}:
        problems.append(
            "bots.slack needs app_token (xapp-..., for Socket Mode) or signing_secret (for HTTP): "
            "both stand under Basic Information of your app at api.slack.com/apps"
        )
    oauth = given & {"client_id", "client_secret", "url"}
    if "token" not in given and not oauth:
        problems.append(
            "bots.slack needs token (xoxb-..., of one workspace: OAuth & Permissions), "
            "or client_id, client_secret and url to be installed by many"
        )
    if oauth and "client_id" in given:
        problems += [
            f"bots.slack.{key} is missing: installing by OAuth needs it"
            for key in ("client_secret", "url")
            if key not in given
        ]
    return problems


def _wrong(key: str, value: object) -> str:
    """What is allowed, if `value` is not; else nothing."""
    if not isinstance(value, str):
        return "must be text"
    match key:
        case "token" if value and not re.fullmatch(r"xoxb-[A-Za-z0-9-]{6,}", value):
            return "is no bot token: it begins with xoxb-"
        case "app_token" if value and not re.fullmatch(r"xapp-[A-Za-z0-9-]{6,}", value):
            return "is no app-level token: it begins with xapp-"
        case "transport" if value not in TRANSPORTS:
            return f"= {value!r} must be one of {', '.join(TRANSPORTS)}{nearest(value, TRANSPORTS)}"
        case "url" if value and not _URL.fullmatch(value):
            return f"= {value!r} must be the https:// address at which browsers and Slack find this machine"
        case "listen" if not (found := _LISTEN.fullmatch(value)) or int(found[2]) > 65535:
            return f"= {value!r} must be host:port, for example 127.0.0.1:8082"
        case "api" if not _URL.fullmatch(value):
            return f"= {value!r} must be an address such as https://slack.com/api/"
    return ""
