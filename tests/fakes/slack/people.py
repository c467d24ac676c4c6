"""What people do in a fake Slack, as the payloads that Slack makes of it. Knows no network and no rule."""

from __future__ import annotations

import itertools
import time
from typing import Any

from tests.fakes.slack.held import Held, Workspace

TRIGGER_S = 3.0


class People:
    """`now` is the clock of messages; the time of events is the machine's, as the signatures' is."""

    def __init__(self) -> None:
        self.workspaces: dict[str, Workspace] = {}
        self.homes: dict[tuple[str, str], dict[str, Any]] = {}
        self.triggers: dict[str, float] = {}
        self.url = ""
        self.now = 1_700_000_000.0
        self._tick = itertools.count(1)

    def workspace(self, team: str = "T1", **more: Any) -> Workspace:
        made = Workspace(team, f"xoxb-{team}-secret", f"B{team}", more.pop("name", f"Space {team}"), **more)
        self.workspaces[team] = made
        return made

    def ts(self) -> str:
        return f"{int(self.now)}.{next(self._tick):06d}"

    def event(self, team: str, event: dict[str, Any], *, event_id: str = "") -> dict[str, Any]:
        space = self.workspaces[team]
        return {
            "type": "event_callback",
            "team_id": team,
            "api_app_id": "A1",
            "event_id": event_id or f"Ev{next(self._tick)}",
            "event_time": int(time.time()) + 1,
            "authorizations": [
                {
                    "team_id": team,
                    "enterprise_id": space.enterprise or space.belongs_to or None,
                    "user_id": space.bot,
                    "is_bot": True,
                    "is_enterprise_install": bool(space.enterprise),
                }
            ],
            "event": event,
        }

    def message(self, user: str, text: str, *, team: str = "T1", channel: str = "", **more: Any) -> dict[str, Any]:
        """An event of somebody who writes: into the DM with the bot, unless a channel is named.

        What begins with a slash is no message: Slack's own clients take it for a slash command.
        """
        assert text[:1] != "/", f"{text!r} can be given by the slash command, or behind a space"
        place = channel or f"D{user}"
        kind = "im" if place[0] == "D" else "channel"
        event = {"type": "message", "channel_type": kind, "channel": place, "user": user, "text": text, "team": team}
        return self.event(team, {**event, "ts": more.pop("ts", "") or self.ts(), **more})

    def command(self, user: str, text: str, *, team: str = "T1", channel: str = "C1") -> dict[str, Any]:
        return {
            "command": "/distributary",
            "text": text,
            "team_id": team,
            "user_id": user,
            "channel_id": channel,
            "trigger_id": self.trigger(),
            "response_url": f"{self.url}/response",
            "api_app_id": "A1",
            **self._form_of_org(team),
        }

    def press(self, user: str, held: Held, label: str, *, value: str = "") -> dict[str, Any]:
        """Somebody presses a button, or a thumb ("+" or "-")."""
        if label in "+-":
            (pressed,) = [one for one in held.buttons if one["type"] == "feedback_buttons"]
            chosen = pressed["positive_button" if label == "+" else "negative_button"]
            value = value or chosen["value"]
        else:
            pressed = held.button(label)
            value = value or pressed.get("value", "")
        named = {"text": pressed["text"]} if "text" in pressed else {}
        action = {"action_id": pressed["action_id"], "block_id": pressed["block_id"], "action_ts": self.ts()}
        return {
            **self._interactive("block_actions", user, held.team),
            "channel": {"id": held.channel},
            "message": {
                **{"ts": held.ts, "text": held.text, "blocks": held.blocks},
                **({"thread_ts": held.thread} if held.thread else {}),
            },
            "container": {"type": "message", "message_ts": held.ts, "channel_id": held.channel},
            "actions": [{**action, **named, "type": pressed["type"], "value": value}],
        }

    def opens_home(self, user: str, *, tab: str = "home", team: str = "T1") -> dict[str, Any]:
        event = {"type": "app_home_opened", "tab": tab, "user": user, "channel": f"D{user}"}
        return self.event(team, event)

    def press_home(self, user: str, label: str, *, of: str = "", team: str = "T1") -> dict[str, Any]:
        """A button of somebody's home; `of` is whose home it was shown on, where that is another's."""
        home = Held(team, "", "", "", blocks=self.homes[team, of or user]["blocks"])
        pressed = self.press(user, home, label)
        del pressed["channel"], pressed["message"]
        return pressed | {"container": {"type": "view", "view_id": "V0"}}

    def shortcut(self, user: str, message: dict[str, Any], *, channel: str = "C1", team: str = "T1") -> dict[str, Any]:
        """ "Ask about this message", in the menu of a message."""
        made = self._interactive("message_action", user, team)
        return {**made, "callback_id": "ask", "channel": {"id": channel}, "message": message}

    def submit(
        self, user: str, view: dict[str, Any], values: dict[str, dict[str, Any]], *, team: str = "T1", id: str = ""
    ) -> dict[str, Any]:
        """A modal is sent off; of each input block `values` holds what stands in its element."""
        state = {}
        for block in view["blocks"]:
            element = block["element"]
            kept = {"value": element["initial_value"]} if "initial_value" in element else {}
            given = {"type": element["type"], **kept, **values.get(block["block_id"], {})}
            state[block["block_id"]] = {element["action_id"]: given}
        made = {**view, "id": id or f"V{next(self._tick)}", "hash": "h1", "state": {"values": state}}
        return {**self._interactive("view_submission", user, team), "view": made}

    def look_up(self, user: str, view: dict[str, Any], block_id: str, typed: str = "", *, team: str = "T1") -> Any:
        """A list in a modal is opened."""
        (block,) = [one for one in view["blocks"] if one["block_id"] == block_id]
        made = self._interactive("block_suggestion", user, team)
        return {**made, "action_id": block["element"]["action_id"], "block_id": block_id, "value": typed, "view": view}

    def trigger(self) -> str:
        made = f"trigger.{next(self._tick)}"
        self.triggers[made] = time.monotonic()
        return made

    def _interactive(self, kind: str, user: str, team: str) -> dict[str, Any]:
        org, of_all = self._organisation(team)
        of_org = {"enterprise": {"id": org} if org else None, "is_enterprise_install": of_all}
        return {
            "type": kind,
            "team": {"id": team},
            "user": {"id": user, "team_id": team},
            "trigger_id": self.trigger(),
            "api_app_id": "A1",
            **of_org,
        }

    def _form_of_org(self, team: str) -> dict[str, str]:
        org, of_all = self._organisation(team)
        return {**({"enterprise_id": org} if org else {}), "is_enterprise_install": str(of_all).lower()}

    def _organisation(self, team: str) -> tuple[str, bool]:
        """Whose the workspace is, and whether the app was installed for all of it."""
        space = self.workspaces.get(team)
        return (space.enterprise or space.belongs_to, bool(space.enterprise)) if space else ("", False)
