"""Incoming values that all platforms build the same way."""

import hashlib
import json

from core.types import Address, Incoming, Kind, Lane


def digest(raw: object) -> str:
    """The update key of a payload without an id, equal for its repeats."""
    return f"sha256:{hashlib.sha256(json.dumps(raw, sort_keys=True).encode()).hexdigest()[:32]}"


def notice(at: Address, user: str, key: str, sentence: str, language: str = "") -> Incoming:
    """A notice of the bot itself, sent once for `key`."""
    return Incoming(Lane.TURN, Kind.MESSAGE, at, user, key, "", language=language, action="notice", value=sentence)


def press(at: Address, user: str, key: str, message_key: str, action: str, value: str, label: str) -> Incoming:
    """A pressed button: "say" asks its value, "command" runs it, "stop" stops a reply, "feedback" votes."""
    return Incoming(
        Lane.TURN if action == "say" else Lane.CONTROL,
        {"stop": Kind.STOP, "say": Kind.MESSAGE}.get(action, Kind.PRESS),
        at,
        user,
        key,
        message_key,
        text={"say": value, "command": label}.get(action, ""),
        command=value if action == "command" else "",
        action="feedback" if action == "feedback" else "",
        value=value if action == "feedback" else "",
    )
