"""Where things are in Slack, as the core's addresses. Pure.

account       the workspace's id; the organisation's where the app is installed for all of it
place         the id of a Slack channel or DM
conversation  the ts of the thread's first message; "@U1" for what a person asked by the slash command
reply_to      the ts of the message that is answered; "/" for the slash command; "" for a job's and a home's
"""

from __future__ import annotations

import re

from core.types import Address

PLATFORM = "slack"
_TS = re.compile(r"\d{1,12}\.\d{1,9}")


def thread_of(to: Address) -> str | None:
    """The thread that an answer belongs to."""
    return to.conversation if _TS.fullmatch(to.conversation) else None


def goes_to(to: Address) -> str:
    """The Slack channel that an answer is written in; what was asked by the slash command is answered in a DM."""
    return to.conversation[1:] if to.conversation[:1] == "@" else to.place


def is_dm(place: str) -> bool:
    return place[:1] == "D"
