"""Prices: one row for each change, so that every charge keeps the price it was made at."""

from core.storage.database import Tx
from core.types import Price


def price_now(tx: Tx, channel_id: int) -> Price:
    """The price in force: the newest row; none is dated ahead."""
    row = tx.one("SELECT * FROM price WHERE channel_id = ? ORDER BY id DESC LIMIT 1", [channel_id])
    assert row is not None, channel_id
    return Price(row["id"], row["in_nano"], row["out_nano"], row["share_bps"], row["train_nano"])


def set_price(tx: Tx, channel_id: int, in_nano: int, out_nano: int, share_bps: int, train_nano: int = 0) -> None:
    """Set a price from now on, as a new row: earlier replies keep theirs."""
    last = tx.value("SELECT max(valid_from_ms) FROM price WHERE channel_id = ?", [channel_id])
    tx.insert(
        "price",
        channel_id=channel_id,
        valid_from_ms=tx.now_ms if last is None else max(tx.now_ms, last + 1),
        in_nano=in_nano,
        out_nano=out_nano,
        share_bps=share_bps,
        train_nano=train_nano,
    )
