"""Telegram's chats and topics as the core's addresses.

place         the chat id
conversation  "main"; "general" for a forum's General topic, which is sent to without an id; "t17" for topic 17
reply_to      "17" to reply to message 17; "-" for a reply without a quote; "" for a message that is no reply
"""

import json
from dataclasses import dataclass

from aiogram.types import Chat, Message

from core.types import Address, Receipt

PLATFORM = "telegram"
MAIN, GENERAL = "main", "general"
_GENERAL_ID = 1  # the id of General in chat actions


@dataclass(frozen=True, slots=True)
class Spot:
    """The destination of a message. `topic` is for sending, `action_topic` for chat actions."""

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
    """The receipt of a final message."""
    return Receipt(json.dumps({"chat": chat, "message": message}))


def topic_of(message: Message) -> int | None:
    """The topic of a message, or None. Replies in ordinary groups have a thread id that is no topic."""
    return message.message_thread_id if message.is_topic_message else None
