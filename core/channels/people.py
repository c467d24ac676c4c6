"""People, known by their keyed hash: when they were last here, their language, the channel whose link they used."""

from core.storage import lifecycle
from core.storage.database import Tx
from core.storage.lifecycle import Erasure, Periods, Prune, Stage


def touch(tx: Tx, user_hash: str, platform: str) -> None:
    """Record a visit."""
    tx.run(
        "INSERT INTO person (user_hash, platform, first_ms, last_ms) VALUES (?, ?, ?, ?)"
        " ON CONFLICT DO UPDATE SET last_ms = excluded.last_ms",
        [user_hash, platform, tx.now_ms, tx.now_ms],
    )


def language_of(tx: Tx, user_hash: str) -> str:
    """The language a person chose, or ""."""
    return tx.value("SELECT language FROM person WHERE user_hash = ?", [user_hash]) or ""


def set_language(tx: Tx, user_hash: str, platform: str, language: str) -> None:
    touch(tx, user_hash, platform)
    tx.run("UPDATE person SET language = ? WHERE user_hash = ?", [language, user_hash])


def came_by_link(tx: Tx, user_hash: str, platform: str, channel_id: int) -> None:
    """Answer a person from this channel wherever they are alone with the bot."""
    touch(tx, user_hash, platform)
    tx.run("UPDATE person SET channel_id = ? WHERE user_hash = ?", [channel_id, user_hash])


@lifecycle.erases(Stage.TEXT)
def _erase(tx: Tx, erasure: Erasure) -> None:
    tx.run("DELETE FROM person WHERE user_hash = ? AND first_ms <= ?", [erasure.user_hash, erasure.until_ms])


@lifecycle.prunes
def _prunes(kept: Periods) -> list[Prune]:
    idle = "last_ms <= ? AND user_hash NOT IN (SELECT user_hash FROM operator UNION SELECT user_hash FROM consent)"
    return [lifecycle.batch("DELETE FROM person", idle, max(kept.conversation, kept.dataset), key="user_hash")]
