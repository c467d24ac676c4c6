"""Limits of one person in one channel. Checked in the transaction that records the reply they are about."""

from core.errors import LimitReached
from core.storage.database import Tx
from core.storage.lifecycle import HOUR_MS
from core.types import Caller


def check(tx: Tx, caller: Caller) -> None:
    """Raises LimitReached, with the seconds until the next reply is allowed."""
    _check_replies(tx, caller, caller.channel.limits.per_minute, 60_000, "error.limit_minute")
    _check_replies(tx, caller, caller.channel.limits.per_hour, HOUR_MS, "error.limit_hour")


def _check_replies(tx: Tx, caller: Caller, most: int, window_ms: int, key: str) -> None:
    """At most so many replies in the last `window_ms`; 0 is no limit. `key` names the sentence of the refusal."""
    if not most:
        return
    recent = tx.all(
        "SELECT started_ms FROM generation WHERE user_hash = ? AND channel_id = ?"
        " AND started_ms > ? AND started_ms <= ? ORDER BY started_ms DESC LIMIT ?",
        [caller.user, caller.channel.id, tx.now_ms - window_ms, tx.now_ms, most],
    )
    if len(recent) == most:
        wait_s = (recent[-1]["started_ms"] + window_ms - tx.now_ms) / 1000
        raise LimitReached(key, retry_after_s=max(wait_s, 1.0), limit=most)
