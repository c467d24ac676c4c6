"""Slack payloads -> Incoming, and the body of the acknowledgement.

The update key is the event or trigger id. The message key is channel and ts, so that a mention that comes as two
events, or a retry with another event id, is one message.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from bots.shared.incoming import digest, notice, press
from bots.slack.addresses import PLATFORM, is_dm
from bots.slack.pages.blocks import ACTIONS, STOP, where
from bots.slack.pages.modals import ModalContext, attachment, submission
from bots.slack.pages.text import COMMAND, plain_text
from core.commands.table import BY_NAME
from core.i18n.messages import say
from core.types import Address, Attachment, Incoming, Kind, Lane

Payload = Mapping[str, Any]
Files = tuple[Attachment, ...]
_TALK = (None, "file_share", "thread_broadcast")
_SLACKBOT = "USLACKBOT"
_NAMES_SOMEBODY = re.compile(r"\s*<[@!]")
_WITH_FILE = re.compile(rf"(?:{COMMAND}\s+|[/／])?((?:finetune|adapter\s+import)\b.*)", re.IGNORECASE | re.DOTALL)


class UnreadableEvent(Exception):
    """A payload without a field that its type requires."""


@dataclass(frozen=True, slots=True)
class Person:
    """The person behind a payload. `team` is their own workspace, or their organisation if it is another than ours."""

    user: str = ""
    team: str = ""


@dataclass(frozen=True, slots=True)
class ReadEvent:
    """A parsed payload. `answer` is the body of the acknowledgement; `gone`: the app was uninstalled.

    `below`: the key of a thread's first message; this one is for the bot only if that one was.
    `options`: the context of a modal whose list was opened, and the text that filters the list.
    """

    account: str = ""
    incoming: Incoming | None = None
    answer: dict[str, Any] | str | None = None
    gone: bool = False
    person: Person = Person()
    below: str = ""
    options: tuple[ModalContext, str] | None = None


def read(body: Payload, language: str = "en") -> ReadEvent:
    """Parse a payload. One that needs no reply has no `incoming`. Raises UnreadableEvent.

    `language` is that of the acknowledgement of a slash command.
    """
    try:
        return _read(body, language)
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        raise UnreadableEvent(type(error).__name__) from error


def account_of(body: Payload) -> str:
    """The installation of a payload: a workspace or an organisation."""
    if first := _authorization(body):
        of_org = first.get("is_enterprise_install") and first.get("enterprise_id")
        return str(of_org or first.get("team_id") or "")
    enterprise = body.get("enterprise") or {}
    if body.get("is_enterprise_install") in (True, "true"):
        return str(body.get("enterprise_id") or enterprise.get("id") or "")
    return str(body.get("team_id") or (body.get("team") or {}).get("id") or "")


def update_key(body: Payload) -> str:
    """The key of an update, equal for its repeats."""
    ids = (body.get(key) for key in ("event_id", "trigger_id"))
    return next((id for id in ids if id and isinstance(id, str)), "") or digest(body)


def _read(body: Payload, language: str) -> ReadEvent:
    kind = body.get("type")
    if kind == "event_callback":
        return _event(body, body["event"])
    if "command" in body:
        return _command(body, language)
    if kind == "block_actions":
        return _press(body)
    if kind == "view_submission":
        return _submitted(body)
    if kind == "block_suggestion":
        options = ModalContext.read(body["view"]), str(body.get("value") or "")
        return ReadEvent(account_of(body), options=options, person=_presser(body))
    return ReadEvent(account_of(body))


# --- events ---


def _event(body: Payload, event: Payload) -> ReadEvent:
    account, kind = account_of(body), event["type"]
    if kind in ("app_uninstalled", "tokens_revoked"):
        return ReadEvent(account, gone=kind == "app_uninstalled" or bool((event.get("tokens") or {}).get("bot")))
    if kind == "agent_session_stopped":
        at = Address(PLATFORM, account, event["channel"], event["thread_ts"])
        stop = _control(body, at, event["user"], Kind.STOP)
        return ReadEvent(account, replace(stop, moderates=True))  # Slack's own button has ended the stream already
    if kind in ("message", "app_mention"):
        return _message(body, event, account)
    if kind == "member_joined_channel" and event["user"] == _bot_user(body):
        at = Address(PLATFORM, account, event["channel"], "joined")
        inviter = str(event.get("inviter") or event["user"])
        return ReadEvent(account, notice(at, inviter, update_key(body), "slack.joined"))
    return ReadEvent(account)


def _message(body: Payload, event: Payload, account: str) -> ReadEvent:
    """A message for the bot: in a DM, with a mention, or in a thread whose first message was for the bot."""
    subtype = event.get("subtype")
    if subtype in ("message_changed", "message_deleted") and is_dm(event["channel"]):
        return ReadEvent(account, _edited(body, event, account))
    if subtype not in _TALK or event.get("bot_id") or event.get("bot_profile"):
        return ReadEvent(account)
    place, ts, user, bot = event["channel"], event["ts"], event["user"], _bot_user(body)
    if user in (bot, _SLACKBOT):
        return ReadEvent(account)
    written = event.get("text") or ""
    named, text = plain_text(written, bot)
    addressed = named or event["type"] == "app_mention" or is_dm(place)
    thread = str(event.get("thread_ts") or ts)
    files = tuple(attachment(one) for one in event.get("files") or [])
    below = ""
    if not addressed:
        if thread == ts or _NAMES_SOMEBODY.match(written) or (files and not text):
            return ReadEvent(account)
        below = "" if bot and event.get("parent_user_id") == bot else f"{place}:{thread}"
    if files and (asked := _WITH_FILE.fullmatch(text)):
        text = f"/{asked[1]}"
    person = Person(str(user), _team(body, event.get("user_team"), event.get("source_team"), event.get("team")))
    at, user = Address(PLATFORM, account, place, thread, ts), _user_id(person, body)
    incoming = _asked(at, user, update_key(body), f"{place}:{ts}", text, files, public=not is_dm(place))
    return ReadEvent(account, incoming, person=person, below=below)


def _edited(body: Payload, event: Payload, account: str) -> Incoming | None:
    """An edit or deletion, which runs nothing."""
    before = event.get("previous_message") or event.get("message") or {}
    if before.get("bot_id") or not before.get("user"):
        return None
    at = Address(PLATFORM, account, event["channel"], before.get("thread_ts") or before.get("ts") or "")
    return _control(body, at, before["user"], Kind.EDIT)


# --- slash command, buttons, modals ---


def _command(body: Payload, language: str) -> ReadEvent:
    """`/distributary`: a command or a question, answered in a DM about the channel it was typed in."""
    account, user, place = account_of(body), body["user_id"], body["channel_id"]
    _, text = plain_text(body.get("text") or "")
    if not text:
        text = "/help"
    elif text.partition(" ")[0].lower() in BY_NAME:
        text = f"/{text}"
    key = update_key(body)
    incoming = _asked(Address(PLATFORM, account, place, f"@{user}", "/"), user, key, f"command:{key}", text)
    answer = {"response_type": "ephemeral", "text": say(language, "slack.answered_in_dm")}
    return ReadEvent(account, incoming, answer=None if is_dm(place) else answer, person=Person(user))


def _press(body: Payload) -> ReadEvent:
    account, person = account_of(body), _presser(body)
    pressed = body["actions"][0]
    action = str(pressed.get("action_id", "")).partition(":")[0]
    if action not in ACTIONS:
        return ReadEvent(account, person=person)
    place, conversation = where(str(pressed.get("block_id", "")))
    message, container = body.get("message") or {}, body.get("container") or {}
    ts = str(message.get("ts") or container.get("message_ts") or "")
    place = place or str((body.get("channel") or {}).get("id") or container["channel_id"])
    conversation = conversation or str(message.get("thread_ts") or container.get("thread_ts") or ts)
    at = Address(PLATFORM, account, place, conversation, "" if action == STOP else ts)
    key, user = update_key(body), _user_id(person, body)
    value, label = str(pressed.get("value") or ""), str((pressed.get("text") or {}).get("text") or "")
    message_key = f"press:{place}:{ts}:{pressed.get('action_ts') or key}"
    return ReadEvent(account, press(at, user, key, message_key, action, value, label), person=person)


def _submitted(body: Payload) -> ReadEvent:
    """A submitted modal; its errors are shown in the modal."""
    account, person, view = account_of(body), _presser(body), body["view"]
    found = submission(view)
    if found is None:
        return ReadEvent(account)
    context, given = found
    if given.errors:
        return ReadEvent(account, answer={"response_action": "errors", "errors": dict(given.errors)})
    if not given.text:
        return ReadEvent(account)
    key = f"view:{view['id']}:{view.get('hash', '')}"
    at = Address(PLATFORM, account, context.place, context.conversation, context.reply_to)
    asked = _asked(at, _user_id(person, body), key, key, given.text, given.attachments)
    return ReadEvent(account, asked, person=person)


# --- parts ---


def _presser(body: Payload) -> Person:
    return Person(str(body["user"]["id"]), _team(body, body["user"].get("team_id")))


def _team(body: Payload, *named: object) -> str:
    """The workspace of a person, or their organisation (Grid) if Slack names another than ours."""
    given = [str(one) for one in named if one]
    enterprise = (body.get("enterprise") or {}).get("id") or body.get("enterprise_id") or ""
    if given and given[0][:1] == "E" and given[0] != str(_authorization(body).get("enterprise_id") or enterprise):
        return given[0]
    return next((one for one in given if one[:1] == "T"), "")


def _authorization(body: Payload) -> Payload:
    return next(iter(body.get("authorizations") or []), {})


def _user_id(person: Person, body: Payload) -> str:
    """The id of a person; that of a Slack Connect guest has the prefix of their own workspace.

    In an organisation, ids are the same in all its workspaces.
    """
    first = _authorization(body)
    of_org = first.get("is_enterprise_install") or body.get("is_enterprise_install") in (True, "true")
    home = str(first.get("team_id") or (body.get("team") or {}).get("id") or account_of(body))
    ours = person.team in ("", home) or (of_org and person.team[:1] != "E")
    return person.user if ours else f"{person.team}/{person.user}"


def _bot_user(body: Payload) -> str:
    first = _authorization(body)
    return str(first.get("user_id") or "") if first.get("is_bot") else ""


def _control(body: Payload, at: Address, user: str, kind: Kind) -> Incoming:
    return Incoming(Lane.CONTROL, kind, at, str(user), update_key(body), "")


def _asked(
    at: Address, user: str, key: str, message_key: str, text: str, files: Files = (), *, public: bool = False
) -> Incoming:
    return Incoming(Lane.TURN, Kind.MESSAGE, at, user, key, message_key, text, attachments=files, public=public)
