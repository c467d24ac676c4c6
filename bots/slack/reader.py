"""What Slack sends -> Incoming, and what is said in the acknowledgement. Pure: knows no store and no network.

Both keys are made here: the update key (event id, trigger id) and the message key (Slack channel + ts), under which a
mention that comes as two events, or a retry under another event id, is one message.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bots.outlet import Address, Attachment, Incoming, Kind, Lane
from bots.slack.blocks import ACTIONS, LIMITS, STOP, where
from bots.slack.places import PLATFORM, is_dm
from bots.slack.text import read as read_text
from core.commands import COMMANDS
from core.texts import say

Payload = Mapping[str, Any]
ASK = "ask"  # the callback id of the message shortcut, and of its modal
_TALK = (None, "file_share", "thread_broadcast")
_QUOTE = 1_000


class Unreadable(Exception):
    """A payload that lacks what its kind must have."""


@dataclass(frozen=True, slots=True)
class Read:
    """`answer` is the body of the acknowledgement. `gone`: the workspace has thrown the app out."""

    account: str = ""
    incoming: Incoming | None = None
    answer: dict[str, Any] | str | None = None
    gone: bool = False
    user_team: str = ""


def read(body: Payload) -> Read:
    """Raises Unreadable. What needs no answer is a Read without `incoming`: it is acknowledged and forgotten."""
    try:
        return _read(body)
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        raise Unreadable(type(error).__name__) from error


def account_of(body: Payload) -> str:
    """The installation that a payload is for: a workspace, or the organisation."""
    first: Payload = next(iter(body.get("authorizations") or []), {})
    if first:
        of_org = first.get("is_enterprise_install") and first.get("enterprise_id")
        return str(of_org or first.get("team_id") or "")
    enterprise = body.get("enterprise") or {}
    if body.get("is_enterprise_install") in (True, "true"):
        return str(body.get("enterprise_id") or enterprise.get("id") or "")
    return str(body.get("team_id") or (body.get("team") or {}).get("id") or "")


def update_key(body: Payload) -> str:
    """The same for a repeat of the same update."""
    for key in ("event_id", "trigger_id"):
        if isinstance(body.get(key), str) and body[key]:
            return str(body[key])
    return f"sha256:{hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()[:32]}"


def _read(body: Payload) -> Read:
    kind = body.get("type")
    if kind == "event_callback":
        return _event(body, body["event"])
    if "command" in body:
        return _command(body)
    if kind == "block_actions":
        return _press(body)
    if kind == "view_submission":
        return _submitted(body)
    return Read(account_of(body))


# --- events ---


def _event(body: Payload, event: Payload) -> Read:
    account, kind = account_of(body), event["type"]
    if kind in ("app_uninstalled", "tokens_revoked"):
        return Read(account, gone=kind == "app_uninstalled" or bool((event.get("tokens") or {}).get("bot")))
    if kind == "agent_session_stopped":
        at = Address(PLATFORM, account, event["channel"], event["thread_ts"])
        return Read(account, _control(body, at, event["user"], Kind.STOP))
    if kind in ("message", "app_mention"):
        return _message(body, event, account)
    if kind == "member_joined_channel" and event["user"] == _bot_user(body):
        return Read(account, _joined(body, event, account))
    return Read(account)


def _message(body: Payload, event: Payload, account: str) -> Read:
    subtype = event.get("subtype")
    if subtype in ("message_changed", "message_deleted") and is_dm(event["channel"]):
        return Read(account, _quiet(body, event, account))
    if subtype not in _TALK or event.get("bot_id") or event.get("bot_profile"):
        return Read(account)
    place, ts, user, bot = event["channel"], event["ts"], event["user"], _bot_user(body)
    if user == bot:
        return Read(account)
    named, text = read_text(event.get("text") or "", bot)
    named = named or event["type"] == "app_mention"
    thread = event.get("thread_ts") or ts
    if not (named or is_dm(place) or (bot and event.get("parent_user_id") == bot)):
        return Read(account)
    files = tuple(_file(one) for one in event.get("files") or [])
    if text[:1] not in ("/", "／") and files and not is_dm(place) and not named:
        return Read(account)
    incoming = Incoming(
        lane=Lane.TURN,
        kind=Kind.MESSAGE,
        address=Address(PLATFORM, account, place, thread, ts),
        user=str(user),
        update_key=update_key(body),
        message_key=f"{place}:{ts}",
        text=text,
        attachments=files,
    )
    return Read(account, incoming, user_team=str(event.get("user_team") or event.get("team") or account))


def _quiet(body: Payload, event: Payload, account: str) -> Incoming | None:
    """An edit or a deletion runs nothing: it is kept and closed."""
    before = event.get("previous_message") or event.get("message") or {}
    if before.get("bot_id") or not before.get("user"):
        return None
    at = Address(PLATFORM, account, event["channel"], before.get("thread_ts") or before.get("ts") or "")
    return _control(body, at, before["user"], Kind.EDIT)


def _joined(body: Payload, event: Payload, account: str) -> Incoming:
    at = Address(PLATFORM, account, event["channel"], "joined")
    user = str(event.get("inviter") or event["user"])
    return Incoming(
        lane=Lane.TURN,
        kind=Kind.MESSAGE,
        address=at,
        user=user,
        update_key=update_key(body),
        message_key="",
        action="notice",
        value="slack.joined",
    )


# --- what people press, type after a slash, submit ---


def _command(body: Payload) -> Read:
    """`/distributary`: one of the commands, or a question. It is answered in a DM; the channel stays the place."""
    account, user, place = account_of(body), body["user_id"], body["channel_id"]
    _, text = read_text(body.get("text") or "")
    word = text.partition(" ")[0].lstrip("/").lower()
    if not text:
        text = "/help"
    elif word in {command.name for command in COMMANDS} and text[:1] != "/":
        text = f"/{text}"
    key = update_key(body)
    incoming = Incoming(
        lane=Lane.TURN,
        kind=Kind.MESSAGE,
        address=Address(PLATFORM, account, place, f"@{user}", ""),
        user=user,
        update_key=key,
        message_key=f"command:{key}",
        text=text,
    )
    said = say("en", "slack.answered_in_dm")
    answer = {"response_type": "ephemeral", "text": said}
    return Read(account, incoming, answer=None if is_dm(place) else answer)


def _press(body: Payload) -> Read:
    account, user = account_of(body), body["user"]["id"]
    pressed = body["actions"][0]
    action = str(pressed.get("action_id", "")).partition(":")[0]
    if action not in ACTIONS:
        return Read(account)
    place, conversation = where(str(pressed.get("block_id", "")))
    message, container = body.get("message") or {}, body.get("container") or {}
    ts = str(message.get("ts") or container.get("message_ts") or "")
    place = place or str((body.get("channel") or {}).get("id") or container["channel_id"])
    conversation = conversation or str(message.get("thread_ts") or container.get("thread_ts") or ts)
    value = str(pressed.get("value") or "")
    said = action == "say"
    incoming = Incoming(
        lane=Lane.TURN if said else Lane.CONTROL,
        kind={STOP: Kind.STOP, "say": Kind.MESSAGE}.get(action, Kind.PRESS),
        address=Address(PLATFORM, account, place, conversation, "" if action == STOP else ts),
        user=user,
        update_key=update_key(body),
        message_key=f"press:{place}:{ts}:{pressed.get('action_ts') or update_key(body)}",
        text=value if said else "",
        action=action if action in ("command", "feedback") else "",
        value=value if action in ("command", "feedback") else "",
    )
    return Read(account, incoming, user_team=str(body["user"].get("team_id") or account))


def _submitted(body: Payload) -> Read:
    """The modal of "Ask about this message": an empty question is said in the modal itself."""
    account, view = account_of(body), body["view"]
    if view.get("callback_id") == LIMITS:
        return _limits(body, account, view)
    if view.get("callback_id") != ASK:
        return Read(account)
    question = str(view["state"]["values"]["question"]["text"].get("value") or "").strip()
    if not question:
        return Read(
            account,
            answer={"response_action": "errors", "errors": {"question": say("en", "slack.ask_empty")}},
        )
    about = json.loads(view["private_metadata"])
    quoted = "\n".join(f"> {line}" for line in str(about["text"]).splitlines())
    key = f"view:{view['id']}:{view.get('hash', '')}"
    incoming = Incoming(
        lane=Lane.TURN,
        kind=Kind.MESSAGE,
        address=Address(PLATFORM, account, about["place"], about["thread"], about["ts"]),
        user=body["user"]["id"],
        update_key=key,
        message_key=key,
        text=f"{quoted}\n\n{question}" if quoted else question,
    )
    return Read(account, incoming, user_team=str(body["user"].get("team_id") or account))


def _limits(body: Payload, account: str, view: Payload) -> Read:
    """The modal of the limits is the command that it stands for; what is no number is said in the modal itself."""
    values = {name: str(given["number"].get("value") or "").strip() for name, given in view["state"]["values"].items()}
    wrong = {
        name: say("en", "slack.limits_number") for name, value in values.items() if value and not _is_number(value)
    }
    if wrong:
        return Read(account, answer={"response_action": "errors", "errors": wrong})
    wanted = " ".join(f"{name}={value}" for name, value in values.items() if value)
    about, key = json.loads(view["private_metadata"]), f"view:{view['id']}:{view.get('hash', '')}"
    incoming = Incoming(
        lane=Lane.TURN,
        kind=Kind.MESSAGE,
        address=Address(PLATFORM, account, about["place"], about["conversation"]),
        user=body["user"]["id"],
        update_key=key,
        message_key=key,
        text=f"/channel set {wanted}",
    )
    return Read(account, incoming if wanted else None)


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdecimal()


def ask_view(body: Payload) -> dict[str, Any]:
    """The modal that the message shortcut opens."""
    message = body["message"]
    _, text = read_text(str(message.get("text") or ""))
    ts = str(message["ts"])
    about = {
        "place": body["channel"]["id"],
        "thread": str(message.get("thread_ts") or ts),
        "ts": ts,
        "text": text[:_QUOTE],
    }

    def words(key: str) -> dict[str, str]:
        return {"type": "plain_text", "text": say("en", f"slack.{key}")}

    return {
        "type": "modal",
        "callback_id": ASK,
        "private_metadata": json.dumps(about, ensure_ascii=False),
        "title": words("ask_title"),
        "submit": words("ask_submit"),
        "blocks": [
            {
                "type": "input",
                "block_id": "question",
                "label": words("ask_label"),
                "optional": True,
                "element": {"type": "plain_text_input", "action_id": "text", "multiline": True},
            }
        ],
    }


# --- parts ---


def _bot_user(body: Payload) -> str:
    first: Payload = next(iter(body.get("authorizations") or []), {})
    return str(first.get("user_id") or "") if first.get("is_bot") else ""


def _control(body: Payload, at: Address, user: str, kind: Kind) -> Incoming:
    return Incoming(
        lane=Lane.CONTROL, kind=kind, address=at, user=str(user), update_key=update_key(body), message_key=""
    )


def _file(given: Payload) -> Attachment:
    return Attachment(
        str(given["id"]),
        str(given.get("name") or "file"),
        int(given.get("size") or 0),
        str(given.get("mimetype") or ""),
    )
