"""What the Web API of a fake Slack does and refuses, method by method. Knows no HTTP, no rate and no fault."""

from __future__ import annotations

import json
import secrets
import time
from typing import Any

from tests.fakes.slack import rules
from tests.fakes.slack.held import APP_TOKEN, CLIENT, CLIENT_SECRET, Held, Workspace
from tests.fakes.slack.people import TRIGGER_S, People


class Methods(People):
    def __init__(self) -> None:
        super().__init__()
        self.messages: dict[tuple[str, str], Held] = {}
        self.files: dict[str, bytes] = {}
        self.codes: dict[str, Workspace] = {}
        self.views: list[dict[str, Any]] = []
        self.statuses: dict[tuple[str, str], str] = {}  # of the agent session of a thread
        self.locales: dict[str, str] = {}
        self.draws = True  # whether this Slack knows charts
        self.outside: dict[str, str] = {}  # channels in which the app is not, and what Slack says to it there
        self.refused: set[str] = set()  # blocks that it does not take when a message is updated

    def answer(self, method: str, token: str, body: dict[str, Any]) -> dict[str, Any]:
        if method not in rules.REQUIRED:
            return no("unknown_method")
        if any(not body.get(key) and body.get(key) != 0 for key in rules.REQUIRED[method]):
            return no("invalid_arguments")
        if method == "apps.connections.open":
            return (
                {"ok": True, "url": self.url.replace("http", "ws") + "/socket"}
                if token == APP_TOKEN
                else no("invalid_auth")
            )
        if method == "oauth.v2.access":
            return self._oauth(body)
        space = next((one for one in self.workspaces.values() if one.token == token and one.alive), None)
        if space is None:
            return no("invalid_auth")
        handler = getattr(self, "_" + method.replace(".", "_"), None)
        return handler(space, body) if handler else {"ok": True}

    def _auth_test(self, space: Workspace, body: dict[str, Any]) -> dict[str, Any]:
        org = {"is_enterprise_install": True, "enterprise_id": space.enterprise} if space.enterprise else {}
        return {"ok": True, "team_id": space.team, "user_id": space.bot, "bot_id": f"b{space.bot}", **org}

    def _oauth(self, body: dict[str, Any]) -> dict[str, Any]:
        if (body["client_id"], body["client_secret"]) != (CLIENT, CLIENT_SECRET):
            return no("bad_client_secret")
        if body.get("grant_type") == "refresh_token":
            space = next((one for one in self.workspaces.values() if one.refresh == body.get("refresh_token")), None)
            if space is None:
                return no("invalid_refresh_token")
            space.token, space.refresh = f"xoxe.xoxb-{secrets.token_hex(8)}", f"xoxe-{secrets.token_hex(8)}"
            return {"ok": True, "access_token": space.token, "refresh_token": space.refresh, "expires_in": 43200}
        space = self.codes.pop(str(body.get("code")), None)
        if space is None:
            return no("invalid_code")
        space.alive = True
        rotated = {"refresh_token": space.refresh, "expires_in": 43200} if space.refresh else {}
        return {
            "ok": True,
            "access_token": space.token,
            "token_type": "bot",
            "bot_user_id": space.bot,
            "team": {"id": space.team, "name": space.name},
            "enterprise": {"id": space.enterprise, "name": space.name} if space.enterprise else None,
            "is_enterprise_install": bool(space.enterprise),
            "authed_user": {"id": space.installer} if space.installer else {},
            **rotated,
        }

    def _chat_postMessage(self, space: Workspace, body: dict[str, Any]) -> dict[str, Any]:
        wrong = self._wrong(body)
        if wrong:
            return no(wrong)
        if body.get("unfurl_links") is not False or body.get("unfurl_media") is not False:
            return no("would_unfurl")  # not Slack's: this app never wants it
        if body["channel"] in self.outside:
            return no(self.outside[body["channel"]])
        channel = f"D{body['channel']}" if body["channel"][0] == "U" else body["channel"]
        held = Held(space.team, channel, self.ts(), body.get("thread_ts") or "")
        self.messages[channel, held.ts] = held
        self._set(held, body)
        return {"ok": True, "channel": channel, "ts": held.ts}

    def _chat_update(self, space: Workspace, body: dict[str, Any]) -> dict[str, Any]:
        held = self._mine(space, body)
        if held is None:
            return no("message_not_found")
        if held.streaming:
            return no("streaming_state_conflict")
        if any(block["type"] in self.refused for block in body.get("blocks") or []):
            return no("invalid_blocks")
        wrong = self._wrong(body)
        if wrong:
            return no(wrong)
        self._set(held, body)
        held.files = list(body.get("file_ids") or held.files)
        return {"ok": True, "channel": held.channel, "ts": held.ts}

    def _chat_startStream(self, space: Workspace, body: dict[str, Any]) -> dict[str, Any]:
        if body["channel"][0] != "D" and not body.get("recipient_user_id"):
            return no("missing_recipient_user_id")
        if body["channel"][0] != "D" and not body.get("recipient_team_id"):
            return no("missing_recipient_team_id")
        if body["channel"] in self.outside:
            return no(self.outside[body["channel"]])
        held = Held(space.team, body["channel"], self.ts(), body["thread_ts"], streaming=True, streamed=True)
        held.started = self.now
        self.messages[held.channel, held.ts] = held
        held.text = streamed_text(body)
        return {"ok": True, "channel": held.channel, "ts": held.ts}

    def _chat_appendStream(self, space: Workspace, body: dict[str, Any]) -> dict[str, Any]:
        held, text = self._mine(space, body), streamed_text(body)
        if held is None:
            return no("message_not_found")
        if not held.streaming:
            return no("message_not_in_streaming_state")
        if not text:
            return no("no_text")
        if len(text) > rules.MARKDOWN:
            return no("msg_too_long")
        held.text += text
        held.history.append(held.text)
        return {"ok": True, "channel": held.channel, "ts": held.ts}

    def _chat_stopStream(self, space: Workspace, body: dict[str, Any]) -> dict[str, Any]:
        held, text = self._mine(space, body), streamed_text(body)
        if held is None:
            return no("message_not_found")
        if not held.streaming:
            return no("message_not_in_streaming_state")
        if len(text) > rules.MARKDOWN:
            return no("msg_too_long")
        if "blocks" in body and (wrong := rules.wrong_blocks(body["blocks"])):
            return no(wrong)
        held.text += text
        held.blocks = body.get("blocks") or []
        held.streaming = False
        if "session_status" in body:
            self._status(held.channel, held.thread, body["session_status"])
        held.history.append(held.text)
        return {"ok": True, "channel": held.channel, "ts": held.ts}

    def _views_publish(self, space: Workspace, body: dict[str, Any]) -> dict[str, Any]:
        if body["view"]["type"] != "home" or (wrong := rules.wrong_view(body["view"], draws=self.draws)):
            return no(wrong if body["view"]["type"] == "home" else "invalid_arguments")
        self.homes[space.team, body["user_id"]] = body["view"]
        return {"ok": True}

    def _views_open(self, space: Workspace, body: dict[str, Any]) -> dict[str, Any]:
        made = self.triggers.pop(body["trigger_id"], None)  # once
        if made is None:
            return no("exchanged_trigger_id")
        if time.monotonic() - made > TRIGGER_S:
            return no("expired_trigger_id")
        if body["view"]["type"] != "modal" or (wrong := rules.wrong_view(body["view"], draws=self.draws)):
            return no(wrong if body["view"]["type"] == "modal" else "invalid_arguments")
        self.views.append(body["view"])
        return {"ok": True}

    def _users_info(self, space: Workspace, body: dict[str, Any]) -> dict[str, Any]:
        return {"ok": True, "user": {"id": body["user"], "locale": self.locales.get(body["user"], "en-US")}}

    def _agents_sessions_setStatus(self, space: Workspace, body: dict[str, Any]) -> dict[str, Any]:
        return self._status(body["channel_id"], body["thread_ts"], body["status"])

    def _status(self, channel: str, thread: str, status: str) -> dict[str, Any]:
        if status not in ("active", "processing", "suspended", "closed"):
            return no("invalid_arguments")
        self.statuses[channel, thread] = status
        return {"ok": True}

    def _files_info(self, space: Workspace, body: dict[str, Any]) -> dict[str, Any]:
        if body["file"] not in self.files:
            return no("file_not_found")
        return {"ok": True, "file": {"id": body["file"], "url_private_download": f"{self.url}/files/{body['file']}"}}

    def _files_getUploadURLExternal(self, space: Workspace, body: dict[str, Any]) -> dict[str, Any]:
        if not str(body["length"]).isdecimal():
            return no("invalid_arguments")
        made = f"F{next(self._tick)}"
        return {"ok": True, "file_id": made, "upload_url": f"{self.url}/upload/{made}"}

    def _files_completeUploadExternal(self, space: Workspace, body: dict[str, Any]) -> dict[str, Any]:
        files = json.loads(body["files"])
        return {"ok": True, "files": files} if all(one["id"] in self.files for one in files) else no("file_not_found")

    def _mine(self, space: Workspace, body: dict[str, Any]) -> Held | None:
        held = self.messages.get((body["channel"], body["ts"]))
        return held if held is not None and held.team == space.team else None

    def _wrong(self, body: dict[str, Any]) -> str:
        if body.get("markdown_text") and (body.get("blocks") or body.get("text")):
            return "markdown_text_conflict"
        if not (body.get("text") or body.get("blocks") or body.get("markdown_text")):
            return "no_text"
        if len(body.get("text") or "") > rules.TEXT:
            return "msg_too_long"
        return rules.wrong_blocks(body["blocks"]) if "blocks" in body else ""

    def _set(self, held: Held, body: dict[str, Any]) -> None:
        held.text, held.blocks = body.get("text", ""), body.get("blocks") or []
        held.history.append(held.said)


def streamed_text(body: dict[str, Any]) -> str:
    chunks = body.get("chunks") or []
    return (body.get("markdown_text") or "") + "".join(one.get("text", "") for one in chunks)


def no(error: str) -> dict[str, Any]:
    return {"ok": False, "error": error}
