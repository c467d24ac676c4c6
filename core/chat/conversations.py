"""Conversations and their turns. Knows nothing of prompts: it gives back what was said, in order."""

from __future__ import annotations

from core.storage.database import Tx
from core.types import Address, Message, Role

MAX_TURNS = 64


def conversation_id(tx: Tx, at: Address, channel_id: int) -> int:
    """The conversation at this address: found, or begun. One that has moved to another channel begins anew."""
    key = [at.platform, at.account, at.place, at.conversation]
    found = tx.one(
        "SELECT id, channel_id FROM conversation WHERE platform = ? AND account = ? AND place = ? AND conversation = ?",
        key,
    )
    if found is None:
        return tx.insert(
            "conversation",
            platform=at.platform,
            account=at.account,
            place=at.place,
            conversation=at.conversation,
            channel_id=channel_id,
            started_ms=tx.now_ms,
        )
    if found["channel_id"] != channel_id:
        tx.run("DELETE FROM turn WHERE conversation_id = ?", [found["id"]])
        tx.run("UPDATE conversation SET channel_id = ? WHERE id = ?", [channel_id, found["id"]])
    return int(found["id"])


def history(tx: Tx, conversation: int) -> tuple[Message, ...]:
    """The last turns, oldest first."""
    rows = tx.all(
        "SELECT role, text FROM turn WHERE conversation_id = ? ORDER BY id DESC LIMIT ?", [conversation, MAX_TURNS]
    )
    turns = [Message(Role(row["role"]), tx.cipher.unseal(row["text"])) for row in reversed(rows)]
    while turns and turns[0].role is Role.ASSISTANT:
        turns.pop(0)
    return tuple(turns)


def append(tx: Tx, conversation: int, inbox_id: int, role: Role, text: str, user_hash: str) -> None:
    """`user_hash` is the person who spoke or was answered: both turns are theirs to erase."""
    tx.insert(
        "turn",
        conversation_id=conversation,
        inbox_id=inbox_id,
        role=role.value,
        text=tx.cipher.seal(text),
        user_hash=user_hash,
        at_ms=tx.now_ms,
    )


def drop_last_answer(tx: Tx, conversation: int) -> None:
    """Take back the reply after the last question: another answer replaces it."""
    tx.run(
        "DELETE FROM turn WHERE conversation_id = ? AND role = 'assistant' AND id > ("
        " SELECT ifnull(max(id), 0) FROM turn WHERE conversation_id = ? AND role = 'user')",
        [conversation, conversation],
    )


def move_place(tx: Tx, platform: str, account: str, before: str, now: str) -> None:
    """Rename a place that the platform has renamed."""
    tx.run(
        "UPDATE OR IGNORE conversation SET place = ? WHERE platform = ? AND account = ? AND place = ?",
        [now, platform, account, before],
    )
