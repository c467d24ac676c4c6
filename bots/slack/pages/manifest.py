"""The app manifest, made from the command table."""

import json
from collections.abc import Sequence
from typing import Any

from bots.slack.pages.text import COMMAND
from core.commands.table import COMMANDS
from core.errors import BadInput
from core.i18n.messages import say
from core.types import Grant

EVENTS = (
    "agent_session_stopped app_home_opened app_mention app_uninstalled member_joined_channel"
    " message.channels message.groups message.im message.mpim tokens_revoked"
).split()
SCOPES = (
    "app_mentions:read assistant:write channels:history channels:read chat:write commands files:read files:write"
    " groups:history groups:read im:history im:read im:write mpim:history users:read"
).split()


def manifest(url: str = "") -> dict[str, Any]:
    """The manifest for Socket Mode, or with a public `url` for HTTP and OAuth installation."""
    events = f"{url.rstrip('/')}/slack/events" if url else ""
    at = {"request_url": events} if events else {}
    names = ", ".join(command.name for command in COMMANDS if command.who == Grant.ANYONE)
    shortcut = {"type": "message", "callback_id": "ask"}
    shortcut |= {"name": say("en", "slack.ask_title"), "description": say("en", "slack.ask_about")}
    made: dict[str, Any] = {
        "display_information": {"name": "Distributary", "description": say("en", "slack.about")},
        "features": {
            "app_home": {
                "home_tab_enabled": True,
                "messages_tab_enabled": True,
                "messages_tab_read_only_enabled": False,
            },
            "agent_view": {"agent_description": say("en", "slack.about")},
            "bot_user": {"display_name": "Distributary", "always_online": True},
            "slash_commands": [
                {
                    "command": COMMAND,
                    **({"url": events} if events else {}),
                    "description": say("en", "slack.command"),
                    "usage_hint": names[:1000],
                    "should_escape": True,
                }
            ],
            "shortcuts": [shortcut],
        },
        "oauth_config": {"scopes": {"bot": SCOPES}},
        "settings": {
            "event_subscriptions": {**at, "bot_events": EVENTS},
            "interactivity": {"is_enabled": True, **at},
            "org_deploy_enabled": bool(url),
            "socket_mode_enabled": not url,
            "token_rotation_enabled": bool(url),
        },
    }
    if url:
        made["oauth_config"]["redirect_urls"] = [f"{url.rstrip('/')}/slack/oauth_redirect"]
    return made


def command(words: Sequence[str]) -> str:
    """`distributary slack manifest [URL]`. Raises BadInput."""
    if not words or words[0] != "manifest" or len(words) > 2:
        raise BadInput("slack.usage")
    return manifest_json(*words[1:])


def manifest_json(url: str = "") -> str:
    return json.dumps(manifest(url), indent=2, ensure_ascii=False) + "\n"
