"""Operators, their grants, and the one-time invitations by which people become operators."""

import secrets
from dataclasses import dataclass

from core.storage import lifecycle
from core.storage.database import Tx
from core.storage.lifecycle import Periods, Prune
from core.types import Grant

INVITE_MS = 7 * 24 * 3_600_000
_ALPHABET = "23456789ABCDEFGHJKMNPQRSTUVWXYZ"  # without look-alikes
_CODE_LENGTH, _CODE_GROUP = 12, 4


@dataclass(frozen=True, slots=True)
class Operator:
    """`channel` "" is every channel."""

    id: int
    user_hash: str
    channel_id: int | None
    channel: str
    label: str


@dataclass(frozen=True, slots=True)
class Claimed:
    """The grant of an invitation that was used. `channel_id` None is every channel."""

    channel_id: int | None
    title: str
    label: str


def grant_of(tx: Tx, user_hash: str, channel_id: int) -> Grant:
    """The grant of a person in a channel."""
    sql = "SELECT channel_id FROM operator WHERE user_hash = ? AND (channel_id IS NULL OR channel_id = ?)"
    rows = tx.all(sql, [user_hash, channel_id])
    if any(row["channel_id"] is None for row in rows):
        return Grant.OWNER
    return Grant.OPERATOR if rows else Grant.ANYONE


def grant(tx: Tx, user_hash: str, channel_id: int | None, label: str, granted_by: str) -> None:
    """Make a person an operator; no-op for one who is."""
    tx.run(
        "INSERT OR IGNORE INTO operator (user_hash, channel_id, label, granted_by, granted_ms) VALUES (?, ?, ?, ?, ?)",
        [user_hash, channel_id, label, granted_by, tx.now_ms],
    )


def find(tx: Tx, channel_id: int | None = None) -> tuple[Operator, ...]:
    """The operators of one channel, or all."""
    rows = tx.all(
        "SELECT operator.*, ifnull(channel.name, '') AS channel FROM operator"
        " LEFT JOIN channel ON channel.id = channel_id WHERE ? IS NULL OR channel_id = ? ORDER BY operator.id",
        [channel_id, channel_id],
    )
    return tuple(Operator(row["id"], row["user_hash"], row["channel_id"], row["channel"], row["label"]) for row in rows)


def remove(tx: Tx, operator: Operator) -> None:
    """Revoke the grant, and the unused invitations made with it."""
    tx.run("DELETE FROM operator WHERE id = ?", [operator.id])
    tx.run(
        "UPDATE invite SET expires_ms = ? WHERE made_by = ? AND claimed_by IS NULL"
        " AND (? IS NULL OR channel_id = ?) AND expires_ms > ?",
        [tx.now_ms, operator.user_hash, operator.channel_id, operator.channel_id, tx.now_ms],
    )


def label_of(tx: Tx, user_hash: str) -> str:
    """The operator's label, or the first 12 digits of their hash."""
    return str(tx.value("SELECT label FROM operator WHERE user_hash = ?", [user_hash]) or user_hash[:12])


def invite(tx: Tx, channel_id: int | None, label: str, made_by: str) -> str:
    """Create a one-time code, valid for a week. Only its hash is stored."""
    letters = "".join(secrets.choice(_ALPHABET) for _ in range(_CODE_LENGTH))
    tx.insert(
        "invite",
        code_hash=tx.cipher.hash_code(letters),
        channel_id=channel_id,
        label=label,
        made_by=made_by,
        made_ms=tx.now_ms,
        expires_ms=tx.now_ms + INVITE_MS,
    )
    return "-".join(letters[at : at + _CODE_GROUP] for at in range(0, _CODE_LENGTH, _CODE_GROUP))


def claim(tx: Tx, code: str, user_hash: str) -> Claimed | None:
    """Use a code: grant what the invitation says. None where the code is wrong, used or expired."""
    letters = "".join(c for c in code.upper() if c in _ALPHABET)
    code_hash = tx.cipher.hash_code(letters)
    if not tx.run(
        "UPDATE invite SET claimed_by = ?, claimed_ms = ?"
        " WHERE code_hash = ? AND claimed_by IS NULL AND expires_ms > ?",
        [user_hash, tx.now_ms, code_hash, tx.now_ms],
    ):
        return None
    row = tx.one(
        "SELECT channel_id, label, made_by, channel.title FROM invite LEFT JOIN channel ON channel.id = channel_id"
        " WHERE code_hash = ?",
        [code_hash],
    )
    assert row is not None
    grant(tx, user_hash, row["channel_id"], row["label"], row["made_by"])
    return Claimed(row["channel_id"], row["title"] or "", row["label"])


@lifecycle.prunes
def _prunes(kept: Periods) -> list[Prune]:
    return [lifecycle.batch("DELETE FROM invite", "expires_ms <= ?", kept.audit, key="code_hash")]
