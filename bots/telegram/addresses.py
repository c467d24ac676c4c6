"""Where things are in Telegram, as the core's addresses: chats, topics, what is replied to. Pure.

place         the chat's id
conversation  "main"; "general" for a forum's General, which has no id when written to; "t17" for topic 17
reply_to      "" a message of our own accord; "-" an answer that quotes nothing; "17" an answer to message 17
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from aiogram.types import Chat, Message

from core.types import Address, Receipt

PLATFORM = "telegram"
MAIN, GENERAL = "main", "general"
_GENERAL_ID = 1  # the id of General, for chat actions alone


@dataclass(frozen=True, slots=True)
class Spot:
    """Where a message goes. `topic` is the parameter of sending, `action_topic` that of "is typing"."""

    chat: int
    topic: int | None = None
    action_topic: int | None = None
    reply_to: int | None = None

    @property
    def private(self) -> bool:
        return self.chat > 0


def spot(to: Address) -> Spot:
    topic = int(to.conversation[1:]) if to.conversation[:1] == "t" and to.conversation[1:].isdecimal() else None
    action = topic or (_GENERAL_ID if to.conversation == GENERAL else None)
    reply = int(to.reply_to) if to.reply_to.isdecimal() else None
    return Spot(int(to.place), topic, action, reply)


def conversation(chat: Chat, topic: int | None) -> str:
    if topic is not None:
        return f"t{topic}"
    return GENERAL if chat.is_forum else MAIN


def receipt(chat: int, message: int) -> Receipt:
    """Of one message of ours that is in its final form."""
    return Receipt(json.dumps({"chat": chat, "message": message}))


def topic_of(message: Message) -> int | None:
    """The topic that a message is in. A reply in an ordinary group has a thread id too, which is none."""
    return message.message_thread_id if message.is_topic_message else None
