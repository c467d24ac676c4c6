"""Charges, and the check of their invariants.

A reply is charged in the transaction that confirms its delivery, a fine-tune in the one that publishes its version.
Amounts are integers: gross = in * price_in + out * price_out in nano-units; the partner's share is rounded down, the
rest is the owner's. Of a fine-tune, gross = trained * price_train, and all of it is the owner's.
"""

from datetime import UTC, datetime

from core.storage.database import Row, Tx, Value
from core.types import Price


def charge(tx: Tx, generation_id: str) -> None:
    """Charge a delivered reply at the price pinned by its generation. A second call for it is an error (UNIQUE)."""
    row = tx.one(
        "SELECT generation.channel_id, price_id, tokens_in, tokens_reused, tokens_out, in_nano, out_nano, share_bps"
        " FROM generation JOIN price ON price.id = price_id WHERE generation.id = ?",
        [generation_id],
    )
    assert row is not None, generation_id
    price = Price(row["price_id"], row["in_nano"], row["out_nano"], row["share_bps"])
    tokens = {name: row[name] for name in ("tokens_in", "tokens_reused", "tokens_out")}
    _book(tx, row, amounts(price, row["tokens_in"], row["tokens_out"]), generation_id=generation_id, **tokens)


def charge_job(tx: Tx, job_id: int, trained: int) -> None:
    """Charge a published job at the price it pinned, for at most the tokens agreed to.

    A job that trains nothing has no price and is not charged. A second call for it is an error (UNIQUE).
    """
    row = tx.one(
        "SELECT job.channel_id, price_id, tokens_agreed, train_nano FROM job JOIN price ON price.id = price_id"
        " WHERE job.id = ?",
        [job_id],
    )
    if row is None:
        return
    tokens = max(0, min(trained, trained if row["tokens_agreed"] is None else row["tokens_agreed"]))
    gross = tokens * row["train_nano"]
    none = dict.fromkeys(("tokens_in", "tokens_reused", "tokens_out"), 0)
    _book(tx, row, (gross, 0, gross), job_id=job_id, tokens_trained=tokens, **none)


def _book(tx: Tx, row: Row, sums: tuple[int, int, int], **values: Value) -> None:
    """Insert a usage row for the channel and price of `row`; `sums` are gross, partner's and owner's share."""
    values |= dict(zip(("gross_nano", "partner_nano", "owner_nano"), sums, strict=True))
    values |= {"channel_id": row["channel_id"], "price_id": row["price_id"]}
    tx.insert("ledger", kind="usage", day=day_of(tx.now_ms), booked_ms=tx.now_ms, **values)


def amounts(price: Price, tokens_in: int, tokens_out: int) -> tuple[int, int, int]:
    """(gross, partner's share, owner's share) in nano-units; the shares always sum to the gross."""
    gross = tokens_in * price.in_nano + tokens_out * price.out_nano
    partner = gross * price.share_bps // 10_000
    return gross, partner, gross - partner


def day_of(at_ms: int) -> str:
    """The UTC day, as 2026-11-23."""
    return datetime.fromtimestamp(at_ms / 1000, UTC).date().isoformat()


_COLUMNS = ("tokens_in", "tokens_reused", "tokens_out", "gross_nano", "partner_nano", "owner_nano")
_SUMS = ", ".join(f"sum({name}) AS {name}" for name in _COLUMNS)
_COUNT = "iif(kind = 'usage', 1, -1)"

INVARIANTS: dict[str, str] = {
    "I1 the daily roll-up is the sum of the ledger": f"""
        WITH summed AS (
            SELECT day, channel_id, price_id, sum(iif(job_id IS NULL, {_COUNT}, 0)) AS replies, {_SUMS},
                sum(iif(job_id IS NULL, 0, {_COUNT})) AS jobs, sum(tokens_trained) AS tokens_trained,
                sum(iif(job_id IS NULL, 0, gross_nano)) AS jobs_nano
            FROM ledger GROUP BY day, channel_id, price_id)
        SELECT * FROM (SELECT * FROM summed EXCEPT SELECT * FROM usage_daily)
        UNION ALL SELECT * FROM (SELECT * FROM usage_daily EXCEPT SELECT * FROM summed)""",
    "I2 a generation is delivered exactly if it has one usage row": """
        SELECT id FROM generation WHERE (state = 'delivered') <> (
            (SELECT count(*) FROM ledger WHERE generation_id = generation.id AND kind = 'usage') = 1)
        UNION ALL SELECT generation_id FROM ledger
        WHERE generation_id IS NOT NULL AND generation_id NOT IN (SELECT id FROM generation)""",
    "I3 a generation is delivered exactly if its message is done and replied": """
        SELECT generation.id FROM generation JOIN inbox ON inbox.id = inbox_id
        WHERE (generation.state = 'delivered') <> (inbox.state = 'done' AND inbox.outcome = 'replied')
        UNION ALL SELECT inbox.id FROM inbox WHERE outcome = 'replied'
            AND NOT EXISTS (SELECT 1 FROM generation WHERE inbox_id = inbox.id)""",
    "I4 a charge is tokens times the pinned price, and the shares sum to it": """
        SELECT ledger.id FROM ledger JOIN price ON price.id = ledger.price_id
        JOIN generation ON generation.id = generation_id
        WHERE kind = 'usage' AND (gross_nano <> ledger.tokens_in * in_nano + ledger.tokens_out * out_nano
            OR partner_nano <> gross_nano * share_bps / 10000 OR owner_nano <> gross_nano - partner_nano
            OR ledger.price_id <> generation.price_id OR ledger.tokens_in <> generation.tokens_in
            OR ledger.tokens_out <> generation.tokens_out)""",
    "I2 a job is published, at a price, exactly if it has one usage row": """
        SELECT id FROM job WHERE (state = 'published' AND price_id IS NOT NULL) <> (
            (SELECT count(*) FROM ledger WHERE job_id = job.id AND kind = 'usage') = 1)
        UNION ALL SELECT job_id FROM ledger WHERE job_id IS NOT NULL AND job_id NOT IN (SELECT id FROM job)""",
    "I4 a job's charge is trained tokens times the pinned price, as many as agreed at most, all of it the owner's": """
        SELECT ledger.id FROM ledger JOIN price ON price.id = ledger.price_id JOIN job ON job.id = job_id
        WHERE kind = 'usage' AND (gross_nano <> tokens_trained * train_nano OR partner_nano <> 0
            OR owner_nano <> gross_nano OR ledger.price_id <> job.price_id OR tokens_trained > tokens_agreed
            OR tokens_in <> 0 OR tokens_out <> 0)""",
    "I11 every reference holds": "PRAGMA foreign_key_check",
    "I11 the file is whole": "SELECT * FROM pragma_integrity_check WHERE integrity_check <> 'ok'",
    "a delivered part has its receipt": """
        SELECT delivery_id FROM part JOIN delivery ON delivery.id = delivery_id
        WHERE delivery.state = 'done' AND receipt IS NULL""",
}


def check(tx: Tx) -> list[str]:
    """The invariants that do not hold, each with its first violating row; empty where the books are sound."""
    return [
        f"{name}: {len(rows)} violated, first {rows[0]}" for name, sql in INVARIANTS.items() if (rows := tx.all(sql))
    ]
