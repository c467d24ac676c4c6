"""Checks of the configuration: the file, its bots, and the channels that they are bound to."""

import sqlite3
from collections.abc import Iterator
from contextlib import closing

from bots.app import examine_bots
from bots.cli.doctor.findings import Finding, Level, Setup
from core.channels.bindings import bound_platforms
from core.config.schema import Config
from core.storage.database import open_read_only
from core.storage.home import Home

_TERMINAL = "terminal"  # bound at every start


def configuration(setup: Setup) -> Iterator[Finding]:
    """The file, or each of its problems."""
    if setup.config is None:
        for problem in setup.problems:
            yield Finding(Level.BAD, setup.say("config"), problem, setup.say("config_do"))
        return
    where = str(setup.config.file) if setup.config.file else setup.say("config_defaults")
    yield setup.finding(Level.GOOD, "config", "config_read", path=where)


def bots(setup: Setup) -> Iterator[Finding]:
    """The bots that `serve` would run: configured, and bound to a channel."""
    if setup.config is None:
        return
    if not setup.config.bots:
        yield setup.finding(Level.WARNING, "bots", "bots_none")
        return
    found, problems = examine_bots(setup.config.bots)
    for problem in problems:
        yield Finding(Level.BAD, setup.say("bots"), problem, setup.say("config_do"))
    if not found:
        return
    yield setup.finding(Level.GOOD, "bots", "bots_enabled", names=", ".join(found))
    bound = {_TERMINAL, *_bound(setup.config, setup.home)}
    for name, bot in found.items():
        if bot.platform not in bound:
            yield setup.finding(Level.WARNING, "bots", "bot_unbound", name=name, platform=bot.platform)


def _bound(config: Config, home: Home) -> set[str]:
    """The platforms on which a channel is bound, by the file or in the database."""
    bound = {place.partition(":")[0] for channel in config.channels.values() for place in channel.bind}
    try:
        with closing(open_read_only(home.database)) as connection:
            return bound | bound_platforms(connection)
    except sqlite3.Error:  # no database yet, or one that another check reports
        return bound
