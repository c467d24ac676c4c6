"""Writes a copy of a data set without personal data."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from core import files
from core.jobs.protocol import Redacted
from core.types import Role
from finetune.data.personal import redact
from finetune.data.records import Conversation

NAME = "redacted.jsonl"


def write_redacted(conversations: Sequence[Conversation], folder: Path) -> Redacted:
    """FOLDER/redacted.jsonl, one row per conversation. Raises OSError."""
    digest, replaced = hashlib.sha256(), 0
    with files.replacing(folder / NAME) as aside, aside.open("wb") as out:
        for conversation in conversations:
            messages = []
            for turn in conversation.turns:
                text, count = redact(turn.message.text)
                replaced += count
                untaught = turn.message.role is Role.ASSISTANT and not turn.taught
                weight = {"weight": 0} if untaught else {}
                messages.append({"role": turn.message.role.value, "content": text, **weight})
            line = json.dumps({"messages": messages}, ensure_ascii=False).encode() + b"\n"
            digest.update(line)
            out.write(line)
    return Redacted(NAME, digest.hexdigest(), len(conversations), replaced)
