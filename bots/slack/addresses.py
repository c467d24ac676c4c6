"""Slack's channels and threads as the core's addresses.

account       the id of the workspace, or of the organisation for an org-wide installation
place         the id of a channel or DM
conversation  the ts of the thread's first message; "@U1" for a slash command of U1
reply_to      the ts of the answered message; "/" for a slash command; "" for jobs and the App Home
"""

import re

from core.types import Address

PLATFORM = "slack"
_TS = re.compile(r"\d{1,12}\.\d{1,9}")


def thread_of(to: Address) -> str | None:
    """The ts of the thread, or None."""
    return to.conversation if _TS.fullmatch(to.conversation) else None


def goes_to(to: Address) -> str:
    """The Slack channel of a reply: the place, or the DM of whoever used the slash command."""
    return to.conversation[1:] if to.conversation[:1] == "@" else to.place


def is_dm(place: str) -> bool:
    return place[:1] == "D"
