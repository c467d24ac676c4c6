"""How many of what there is: the counts that an operator watches. Knows no text, no people and no format.

Every count is read from an index or a small table, so that it may be taken every few seconds beside the work.
"""

from __future__ import annotations

from core.observability.metrics import MAX_LABELS, OTHER, Family, counter, gauge
from core.storage.database import Tx

NANO = 1_000_000_000
OPEN = ("new", "running", "generated")


def census(tx: Tx) -> list[Family]:
    """What waits, what died, what was charged, what trains."""
    waiting = tx.all("SELECT state, count(*) AS n FROM inbox WHERE state IN ('new', 'running', 'generated') GROUP BY 1")
    by_state = dict.fromkeys(OPEN, 0) | {row["state"]: row["n"] for row in waiting}
    oldest = tx.value("SELECT min(received_ms) FROM inbox WHERE state IN ('new', 'running', 'generated')")
    dead = tx.all("SELECT outcome, count(*) AS n FROM inbox WHERE state = 'dead' GROUP BY 1")
    jobs = tx.all("SELECT state, count(*) AS n FROM job GROUP BY 1")
    charges = tx.all(
        "SELECT CASE WHEN channel.id IN (SELECT id FROM channel ORDER BY id LIMIT ?) THEN channel.name ELSE ? END"
        " AS name, sum(replies) AS replies, sum(jobs) AS jobs, sum(gross_nano) AS gross, sum(partner_nano) AS partner"
        " FROM usage_daily JOIN channel ON channel.id = channel_id GROUP BY 1",
        [MAX_LABELS, OTHER],
    )
    return [
        gauge("inbox_messages", "Messages not yet ended.", *(({"state": s}, n) for s, n in by_state.items())),
        gauge(
            "inbox_oldest_seconds",
            "Age of the oldest message that is not yet ended.",
            ({}, 0 if oldest is None else max(0, tx.now_ms - oldest) / 1000),
        ),
        gauge(
            "inbox_dead",
            "Updates that were given up and are still kept: unreadable ones, unconfirmed replies.",
            *(({"outcome": row["outcome"]}, row["n"]) for row in dead),
        ),
        gauge("jobs", "Fine-tunes by state.", *(({"state": row["state"]}, row["n"]) for row in jobs)),
        counter(
            "ledger_charges_total",
            "Replies charged, of all times.",
            *(({"channel": row["name"]}, row["replies"]) for row in charges),
        ),
        counter(
            "ledger_jobs_total",
            "Fine-tunes charged, of all times.",
            *(({"channel": row["name"]}, row["jobs"]) for row in charges),
        ),
        counter(
            "ledger_gross_total",
            "What both are worth, in units of the currency.",
            *(({"channel": row["name"]}, row["gross"] / NANO) for row in charges),
        ),
        counter(
            "ledger_partner_total",
            "The partners' share of it.",
            *(({"channel": row["name"]}, row["partner"] / NANO) for row in charges),
        ),
    ]
