"""Who is in the fake Telegram, and the updates that they cause, as the real one writes them. Knows no server."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

DATE = 1_790_000_000
_ENTITY = re.compile(r"(?<!\S)/[A-Za-z0-9_]+(?:@\w+)?|(?<!\S)@\w+")


def units(text: str) -> int:
    return len(text.encode("utf-16-le")) // 2


@dataclass(frozen=True)
class Person:
    id: int
    name: str = "Ann"
    language: str = "en"
    is_bot: bool = False

    def json(self) -> dict[str, Any]:
        return {"id": self.id, "is_bot": self.is_bot, "first_name": self.name, "language_code": self.language}


@dataclass
class Chat:
    """`topics` are those that can be written to; `admins` administer it; `moved_to` is what it has become."""

    id: int
    type: str = "private"
    title: str = ""
    forum: bool = False
    topics: set[int] = field(default_factory=set)
    admins: set[int] = field(default_factory=set)
    blocked: bool = False
    moved_to: int = 0

    def json(self) -> dict[str, Any]:
        made: dict[str, Any] = {"id": self.id, "type": self.type}
        if self.type == "private":
            made["first_name"] = "Ann"
        else:
            made["title"] = self.title or "Group"
        if self.forum:
            made["is_forum"] = True
        return made


def message(chat: Chat, person: Person, number: int, text: str = "", **more: Any) -> dict[str, Any]:
    """A message as it comes in an update. `caption=...` is that of media; `topic=17` stands in a forum's topic."""
    made: dict[str, Any] = {"message_id": number, "date": DATE, "chat": chat.json(), "from": person.json()}
    if text:
        made |= {"text": text, "entities": entities(text)}
    topic = more.pop("topic", None)
    if topic is not None:
        made |= {"message_thread_id": topic, "is_topic_message": True}
    if "caption" in more:
        made["caption_entities"] = entities(more["caption"])
    return made | more


def entities(text: str) -> list[dict[str, Any]]:
    """Commands and names in a text, as Telegram's clients mark them."""
    return [
        {
            "type": "bot_command" if found[0][0] == "/" else "mention",
            "offset": units(text[: found.start()]),
            "length": units(found[0]),
        }
        for found in _ENTITY.finditer(text)
    ]


def document(name: str, file_id: str = "F1", size: int = 100) -> dict[str, Any]:
    return {"file_id": file_id, "file_unique_id": f"u{file_id}", "file_name": name, "file_size": size}


def photo(file_id: str = "P1") -> list[dict[str, Any]]:
    return [{"file_id": file_id, "file_unique_id": f"u{file_id}", "width": 90, "height": 90, "file_size": 100}]
