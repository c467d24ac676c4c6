"""Finds the installed bots: classes named by entry points of the group `distributary.bots` (core/platform.py: Bot)."""

import logging
from collections.abc import Collection
from importlib.metadata import EntryPoint, entry_points

from core.platform import Bot

GROUP = "distributary.bots"
log = logging.getLogger(__name__)


def find_bots(broken: dict[str, str] | None = None, *, wanted: Collection[str] | None = None) -> dict[str, type[Bot]]:
    """The installed bots by name, only those in `wanted` where it is given: loading one may take seconds.

    A bot that cannot be loaded does not affect the others: its error goes into `broken` under its name.
    """
    found: dict[str, type[Bot]] = {}
    for entry in entry_points(group=GROUP):
        if wanted is not None and entry.name not in wanted:
            continue
        try:
            found[entry.name] = _load(entry)
        except Exception as error:  # third-party code may raise anything
            reason = f"{entry.value} cannot be used: {type(error).__name__}: {error}"
            log.warning("bots.broken", extra={"bot": entry.name, "error": type(error).__name__})
            if broken is not None:
                broken[entry.name] = reason
    return found


def _load(entry: EntryPoint) -> type[Bot]:
    bot: type[Bot] = entry.load()
    missing = [name for name in ("platform", "training_allowed", "configure", "run") if not hasattr(bot, name)]
    if missing:
        raise TypeError(f"it has no {', '.join(missing)}")
    return bot
