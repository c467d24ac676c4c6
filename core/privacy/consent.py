"""Consent of a person, per channel: their messages there may become training data."""

from core.storage import lifecycle
from core.storage.database import Tx
from core.storage.lifecycle import Erasure, Stage
from core.types import After


def is_given(tx: Tx, user_hash: str, channel_id: int) -> bool:
    return bool(tx.value("SELECT 1 FROM consent WHERE user_hash = ? AND channel_id = ?", [user_hash, channel_id]))


def give(tx: Tx, user_hash: str, channel_id: int) -> None:
    tx.run("INSERT OR IGNORE INTO consent VALUES (?, ?, ?)", [user_hash, channel_id, tx.now_ms])


def withdraw(tx: Tx, user_hash: str, channel_id: int) -> tuple[After, ...]:
    """Also erases examples and data sets that hold what the person wrote in this channel."""
    tx.run("DELETE FROM consent WHERE user_hash = ? AND channel_id = ?", [user_hash, channel_id])
    return lifecycle.withdraw(tx, user_hash, channel_id)


def shared_replies(tx: Tx, user_hash: str, channel_id: int) -> int:
    """Replies that the person shared one by one."""
    sql = "SELECT count(*) FROM example WHERE user_hash = ? AND channel_id = ? AND shared = 1"
    return int(tx.value(sql, [user_hash, channel_id]))


@lifecycle.erases(Stage.TEXT)
def _erase(tx: Tx, erasure: Erasure) -> None:
    tx.run("DELETE FROM consent WHERE user_hash = ? AND granted_ms <= ?", [erasure.user_hash, erasure.until_ms])
