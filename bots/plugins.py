"""The contract of a bot, ours or anyone's: how it is found, configured, run, and what door it talks to.

A bot is a class named by an entry point of the group `distributary.bots`. It turns what people send into `Incoming`
and gives an `MessageSink` for what is said to them. Knows no platform.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Protocol, Self

from core.channels.installations import Installations
from core.chat.overview import Choice, Overview, Overviews
from core.errors import BadConfig
from core.platform import MessageSink, Reopen, Unreachable
from core.types import Address, Attachment, Body, Button, Grant, Handle, Incoming, Kind, Lane, Receipt

__all__ = [
    "Address",
    "Attachment",
    "BadConfig",
    "Body",
    "Bot",
    "Button",
    "Choice",
    "Door",
    "Grant",
    "Handle",
    "Incoming",
    "Installations",
    "Kind",
    "Lane",
    "MessageSink",
    "Overview",
    "Overviews",
    "Receipt",
    "Reopen",
    "Unreachable",
    "find_bots",
]

GROUP = "distributary.bots"
log = logging.getLogger(__name__)


class Door(Protocol):
    """What a bot may ask of the service."""

    @property
    def installations(self) -> Installations:
        """Where a bot keeps what a platform hands out for each account."""
        ...

    @property
    def lookups(self) -> Overviews:
        """What a bot's own pages and menus show of a place."""
        ...

    def register(self, platform: str, account: str, sink: MessageSink) -> None:
        """Say where replies to an account are written; before the first `accept` of that account."""
        ...

    async def accept(self, *incoming: Incoming) -> None:
        """Returns once all are committed: only then may the platform be told. A repeat is a no-op.

        Raises Overloaded, StorageFull or StorageError: nothing was kept, and nothing may be acknowledged.
        """
        ...

    async def accept_dead(self, platform: str, account: str, update_key: str, raw: str) -> None:
        """Keep an update that cannot be read, so that it can be acknowledged."""
        ...

    async def grant(self, at: Address, user: str) -> Grant:
        """What this person may do in the channel of that place: for menus, never for deciding."""
        ...

    async def stops_all(self, at: Address, user: str) -> bool:
        """Whether this person may stop what others asked for in that place, whatever a platform knows of them."""
        ...

    async def settled(self, platform: str, account: str) -> None:
        """Returns when nothing that was accepted for this account is still open."""
        ...


class Bot(Protocol):
    """Speaks one platform. Made once per table [bots.NAME] of the configuration."""

    platform: str

    @classmethod
    def configure(cls, settings: Mapping[str, object]) -> Self:
        """Raises BadConfig naming every key that is unknown, missing or wrong, and the allowed ones."""
        ...

    async def run(self, door: Door) -> None:
        """Register sinks, then listen until cancelled or until the input ends."""
        ...


def find_bots(broken: dict[str, str] | None = None, *, wanted: Collection[str] | None = None) -> dict[str, type[Bot]]:
    """The installed bots by name, or those of them that are wanted: to load one may take seconds.

    One that cannot be used stops no other: its reason goes into `broken` by its name.
    """
    found: dict[str, type[Bot]] = {}
    for entry in entry_points(group=GROUP):
        if wanted is not None and entry.name not in wanted:
            continue
        try:
            found[entry.name] = _load(entry)
        except Exception as error:  # foreign code: whatever it raises is about that plugin alone
            reason = f"{entry.value} cannot be used: {type(error).__name__}: {error}"
            log.warning("bots.broken", extra={"bot": entry.name, "error": type(error).__name__})
            if broken is not None:
                broken[entry.name] = reason
    return found


def _load(entry: EntryPoint) -> type[Bot]:
    bot: type[Bot] = entry.load()
    missing = [name for name in ("platform", "configure", "run") if not hasattr(bot, name)]
    if missing:
        raise TypeError(f"it has no {', '.join(missing)}")
    return bot
