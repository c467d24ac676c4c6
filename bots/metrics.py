"""What a scrape reports: the program, the engine, and counts from the database.

Counts are read from indexes and small tables, so that a scrape every few seconds does not disturb the work.
"""

from collections.abc import Iterator, Mapping
from importlib.metadata import version

from prometheus_client.core import Metric

from core.chat import inbox
from core.chat.service import Service
from core.config.schema import Config
from core.engine.protocol import Engine
from core.jobs import jobs
from core.observability.metrics import MAX_LABELS, OTHER, counter, engine_families, gauge
from core.storage.database import Database, Tx
from core.usage import reports

_NANO = 1_000_000_000
_CHARGES = (
    ("charges_total", "replies", 1, "Replies charged, of all times."),
    ("jobs_total", "jobs", 1, "Fine-tunes charged, of all times."),
    ("gross_total", "gross", _NANO, "What both are worth, in units of the currency."),
    ("partner_total", "partner", _NANO, "The partners' share of it."),
)


async def collect(config: Config, database: Database, engine: Engine, service: Service, orphans: int) -> list[Metric]:
    """All families, read now. Raises AppError."""
    stored = await database.read(stored_families)
    age_s = max(0, database.now_ms - database.committed_ms) / 1000
    commits = gauge("store_commit_age_seconds", "Time since the last commit of the database.", ({}, age_s))
    return [*_program(config, service, orphans), *engine_families(engine.info, engine.stats()), *stored, commits]


def stored_families(tx: Tx) -> list[Metric]:
    """Messages, fine-tunes and charges."""
    charges = reports.totals(tx, MAX_LABELS, OTHER)
    return [
        gauge("inbox_messages", "Messages not yet ended.", *_by("state", inbox.open_by_state(tx))),
        gauge(
            "inbox_oldest_seconds", "Age of the oldest message that is not yet ended.", ({}, inbox.oldest_open_s(tx))
        ),
        gauge(
            "inbox_dead",
            "Updates that were given up and are still kept: unreadable ones, unconfirmed replies.",
            *_by("outcome", inbox.dead_by_outcome(tx)),
        ),
        gauge("jobs", "Fine-tunes by state.", *_by("state", jobs.count_by_state(tx))),
        *(
            counter(f"ledger_{name}", help, *_by("channel", {row["name"]: row[column] / unit for row in charges}))
            for name, column, unit, help in _CHARGES
        ),
    ]


def _by(label: str, values: Mapping[str, float]) -> Iterator[tuple[dict[str, str], float]]:
    return (({label: name}, value) for name, value in values.items())


def _program(config: Config, service: Service, orphans: int) -> list[Metric]:
    return [
        gauge("build_info", "This program.", ({"version": version("distributary")}, 1)),
        gauge("engine_rows_limit", "Replies that may be generated at once.", ({}, config.engine.max_rows)),
        gauge("engine_waiting_limit", "Replies that may wait for a row.", ({}, config.engine.max_waiting)),
        counter(
            "replies_total",
            "Replies of the model that ended, and refusals, since the start.",
            *service.replies.samples(),
        ),
        counter(
            "orphans_total",
            "First messages that a crash may have left on a platform, where nobody can write them again.",
            ({}, orphans),
        ),
    ]
