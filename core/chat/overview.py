"""Reads what a bot's pages and menus show of a place: channel, grant, usage, jobs, versions."""

from itertools import islice

from core.adapters import registry
from core.channels import adapter_names, bindings, operators, people
from core.chat import inbox
from core.i18n.messages import resolve
from core.jobs import jobs
from core.platform import Choice, JobLine, Overview
from core.storage.database import Database, Tx
from core.storage.lifecycle import HOUR_MS
from core.types import Address, Channel, Grant
from core.usage.reports import daily

DAYS = 14
_JOBS, _CHOICES = 5, 99


class Overviews:
    """core.platform.PlaceReader over the database."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def overview(self, at: Address, user: str) -> Overview | None:
        return await self._database.read(lambda tx: _overview(tx, at, user))

    async def language(self, at: Address, user: str) -> str:
        def work(tx: Tx) -> str:
            who = tx.cipher.hash_user(at.platform, at.account, user)
            channel = bindings.channel_of_person(tx, at.platform, at.account, at.place, who)
            return people.language_of(tx, who) or (resolve(channel.language) if channel else "")

        return await self._database.read(work)

    async def heard(self, at: Address, message_key: str) -> bool:
        """Whether that message was accepted: a thread below it is ours."""
        return await self._database.read(lambda tx: inbox.has_message(tx, at.platform, at.account, message_key))


def _overview(tx: Tx, at: Address, user: str) -> Overview | None:
    who = tx.cipher.hash_user(at.platform, at.account, user)
    channel = bindings.channel_of_person(tx, at.platform, at.account, at.place, who)
    if channel is None:
        return None
    grant = operators.grant_of(tx, who, channel.id)
    operates = grant >= Grant.OPERATOR
    rows = daily(tx, channel.id, DAYS) if operates else []
    return Overview(
        channel,
        grant,
        people.language_of(tx, who) or resolve(channel.language) or "en",
        _left(tx, channel, who),
        adapter_names.champion(tx, channel.adapter)[1],
        _age_s(tx, channel.adapter),
        tuple((str(row["day"]), int(row["replies"])) for row in rows),
        _jobs(tx, channel.id) if operates else (),
        _choices(tx, channel.adapter) if operates else (),
    )


def _left(tx: Tx, channel: Channel, who: str) -> int | None:
    if not channel.limits.per_hour:
        return None
    sql = "SELECT count(*) FROM generation WHERE user_hash = ? AND channel_id = ? AND started_ms > ?"
    return max(channel.limits.per_hour - int(tx.value(sql, [who, channel.id, tx.now_ms - HOUR_MS])), 0)


def _age_s(tx: Tx, adapter: str) -> float | None:
    """Seconds since the newest promotion or rollback."""
    since = tx.value("SELECT max(max(at_ms, ifnull(undone_ms, 0))) FROM promotion WHERE name = ?", [adapter])
    return None if since is None else _ago_s(tx, int(since))


def _ago_s(tx: Tx, at_ms: int) -> float:
    return max(tx.now_ms - at_ms, 0) / 1000


def _jobs(tx: Tx, channel_id: int) -> tuple[JobLine, ...]:
    return tuple(
        JobLine(job.id, job.label, job.dataset, job.state, job.keeps_checkpoint, _ago_s(tx, job.created_ms))
        for job in jobs.of_channel(tx, channel_id, _JOBS)
    )


def _choices(tx: Tx, adapter: str) -> tuple[Choice, ...]:
    """Versions that could be promoted, newest first, base last."""
    champion, _ = adapter_names.champion(tx, adapter)
    others = (one for one in registry.versions(tx, adapter) if one.sha256 != champion and registry.is_usable(tx, one))
    found = [Choice(one.label, one.passed) for one in islice(others, _CHOICES)]
    return (*found, *((Choice(adapter_names.BASE),) if champion is not None else ()))
