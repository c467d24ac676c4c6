"""Conversations and their turns, as rows."""

from core.storage import lifecycle
from core.storage.database import Tx
from core.storage.lifecycle import Erasure, Periods, Prune, Stage
from core.types import Address, ForgetMemory, Message, Role

MAX_TURNS = 64


def conversation_id(tx: Tx, at: Address, channel_id: int) -> int:
    """The conversation at this address, created if needed. It restarts when the place is bound to another channel."""
    key = {"platform": at.platform, "account": at.account, "place": at.place, "conversation": at.conversation}
    sql = f"SELECT id, channel_id FROM conversation WHERE {' AND '.join(f'{name} = ?' for name in key)}"
    found = tx.one(sql, list(key.values()))
    if found is None:
        return tx.insert("conversation", **key, channel_id=channel_id, started_ms=tx.now_ms)
    if found["channel_id"] != channel_id:
        tx.run("DELETE FROM turn WHERE conversation_id = ?", [found["id"]])
        tx.run("UPDATE conversation SET channel_id = ? WHERE id = ?", [channel_id, found["id"]])
    return int(found["id"])


def history(tx: Tx, conversation: int) -> tuple[Message, ...]:
    """The last MAX_TURNS turns, oldest first, beginning with a question."""
    sql = "SELECT role, text FROM turn WHERE conversation_id = ? ORDER BY id DESC LIMIT ?"
    rows = tx.all(sql, [conversation, MAX_TURNS])
    turns = [Message(Role(row["role"]), tx.cipher.unseal(row["text"])) for row in reversed(rows)]
    while turns and turns[0].role is Role.ASSISTANT:
        turns.pop(0)
    return tuple(turns)


def has_question(tx: Tx, conversation: int) -> bool:
    return bool(tx.value("SELECT 1 FROM turn WHERE conversation_id = ? AND role = 'user'", [conversation]))


def append(tx: Tx, conversation: int, inbox_id: int, role: Role, text: str, user_hash: str) -> None:
    """Store a turn. `user_hash` is the person who asked, also for the answer: both are erased with that person."""
    sealed = tx.cipher.seal(text)
    ids = {"conversation_id": conversation, "inbox_id": inbox_id}
    tx.insert("turn", **ids, role=role.value, text=sealed, user_hash=user_hash, at_ms=tx.now_ms)


def drop_last_answer(tx: Tx, conversation: int) -> None:
    """Delete the reply to the last question, which another one replaces."""
    tx.run(
        "DELETE FROM turn WHERE conversation_id = ? AND role = 'assistant' AND id > ("
        " SELECT ifnull(max(id), 0) FROM turn WHERE conversation_id = ? AND role = 'user')",
        [conversation, conversation],
    )


def restart(tx: Tx, conversation: int) -> None:
    """Delete its turns; retention counts from now."""
    tx.run("DELETE FROM turn WHERE conversation_id = ?", [conversation])
    tx.run("UPDATE conversation SET started_ms = ? WHERE id = ?", [tx.now_ms, conversation])


def set_refused(tx: Tx, conversation: int, user_hash: str, answer: int, *, refused: bool) -> None:
    """Mark an answer and the question before it, which may be of an earlier message: nothing is learned from them."""
    tx.run(
        "UPDATE turn SET refused = ? WHERE conversation_id = ? AND user_hash = ? AND id <= ? AND id >="
        " (SELECT ifnull(max(id), 0) FROM turn WHERE conversation_id = ? AND user_hash = ? AND role = 'user'"
        " AND id < ?)",
        [refused, conversation, user_hash, answer, conversation, user_hash, answer],
    )


def move_place(tx: Tx, platform: str, account: str, before: str, now: str) -> None:
    """Rename a place that the platform has renamed."""
    sql = "UPDATE OR IGNORE conversation SET place = ? WHERE platform = ? AND account = ? AND place = ?"
    tx.run(sql, [now, platform, account, before])


@lifecycle.erases(Stage.TEXT)
def _erase(tx: Tx, erasure: Erasure) -> None:
    rows = tx.all(
        "SELECT DISTINCT channel.name, conversation_id FROM turn JOIN conversation ON conversation.id = conversation_id"
        " JOIN channel ON channel.id = channel_id WHERE turn.user_hash = ?",
        [erasure.user_hash],
    )
    erasure.after += [ForgetMemory(row["name"], str(row["conversation_id"])) for row in rows]
    tx.run("DELETE FROM turn WHERE user_hash = ? AND at_ms <= ?", [erasure.user_hash, erasure.until_ms])


@lifecycle.prunes
def _prunes(kept: Periods) -> list[Prune]:
    unused = (
        "started_ms <= ? AND NOT EXISTS (SELECT 1 FROM turn WHERE conversation_id = conversation.id)"
        " AND NOT EXISTS (SELECT 1 FROM inbox"
        " WHERE inbox.platform = conversation.platform AND inbox.account = conversation.account"
        " AND inbox.place = conversation.place AND inbox.conversation = conversation.conversation"
        " AND inbox.state NOT IN ('done', 'dead'))"
    )
    return [
        lifecycle.batch("DELETE FROM turn", "at_ms <= ?", kept.conversation),
        lifecycle.batch("DELETE FROM conversation", unused, kept.conversation),
    ]
