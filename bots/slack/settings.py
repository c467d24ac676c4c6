"""The table [bots.NAME] of a Slack bot."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from core.config.keys import Listen, host_and_port, key
from core.config.loader import read_table


@dataclass(frozen=True, slots=True)
class SlackSettings:
    """One Slack app. With `app_token` it listens by Socket Mode, with `signing_secret` over HTTP.

    With `token` it serves the one workspace that gave it; with `client_id` and `client_secret` all that install it.
    """

    token: str = key(
        "",
        "bot token of one workspace",
        secret=True,
        pattern=r"(xoxb-[A-Za-z0-9-]{6,})?",
        shape="xoxb-...",
        example="env:SLACK_TOKEN",
    )
    app_token: str = key(
        "",
        "app-level token, for Socket Mode",
        secret=True,
        pattern=r"(xapp-[A-Za-z0-9-]{6,})?",
        shape="xapp-...",
        example="env:SLACK_APP_TOKEN",
    )
    signing_secret: str = key("", "signing secret, for HTTP instead", secret=True)
    client_id: str = key("", "client id, to be installed by many workspaces over HTTP")
    client_secret: str = key("", "client secret, with client_id", secret=True)
    url: str = key(
        "",
        "address at which browsers and Slack find this machine",
        pattern=r"(https?://[^\s?#]+)?",
        shape="https://bot.example.org",
    )
    listen: Listen = key("127.0.0.1:8082", "host:port that HTTP is served at", min_length=1)
    transport: Literal["stream", "edit"] = key("stream", "how an answer is shown while it is generated")
    api: str = key(
        "https://slack.com/api/", "address of the Web API", pattern=r"https?://[^\s?#]+", shape="https://slack.com/api/"
    )

    @property
    def host_and_port(self) -> tuple[str, int]:
        return host_and_port(self.listen)


def read_settings(given: Mapping[str, object]) -> SlackSettings:
    """Raises BadConfig naming every key that is unknown, missing or wrong; never the value of a secret."""
    return read_table(SlackSettings, "bots.slack", given, *_missing({key for key, value in given.items() if value}))


def _missing(given: set[str]) -> list[str]:
    """What the chosen way of listening and installing needs and does not have."""
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
    if "client_id" in given:
        problems += [
            f"bots.slack.{name} is missing: installing by OAuth needs it"
            for name in ("client_secret", "url")
            if name not in given
        ]
    return problems
