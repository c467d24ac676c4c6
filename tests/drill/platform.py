"""A fake platform that survives its bots: a queue of updates and a log of what it holds, in two files.

Like the real ones it repeats what was not acknowledged, hands some updates over twice, and its edits are idempotent.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from core.types import Address, Body, Handle, Incoming, Kind, Lane, Receipt


@dataclass
class Held:
    """One message as the platform holds it."""

    text: str = ""
    final: str = ""  # "", "finish" or "fail"


class Platform:
    """The folder outlives every process that is killed."""

    def __init__(self, folder: Path) -> None:
        self.log = folder / "platform.log"
        self.acks = folder / "platform.acks"

    def write(self, path: Path, entry: dict[str, object]) -> None:
        """One line in one write: what SIGKILL leaves is whole."""
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.write(descriptor, (json.dumps(entry) + "\n").encode())
        os.close(descriptor)

    def acknowledged(self) -> set[int]:
        return {int(json.loads(line)["n"]) for line in self._lines(self.acks)}

    def messages(self) -> dict[str, Held]:
        held: dict[str, Held] = defaultdict(Held)
        for line in self._lines(self.log):
            entry = json.loads(line)
            message = held[entry["handle"]]
            if entry["op"] in ("finish", "fail"):
                message.text, message.final = entry["text"], entry["op"]
            elif entry["op"] == "show":
                message.text = entry["text"]
        return dict(held)

    def _lines(self, path: Path) -> list[str]:
        return path.read_text().splitlines() if path.exists() else []


class PlatformOutlet:
    """The writing side: every call may be the last thing the process does."""

    def __init__(self, platform: Platform, randomness: random.Random) -> None:
        self._platform = platform
        self._random = randomness

    async def _pause(self) -> None:
        await asyncio.sleep(self._random.random() * 0.004)

    def split(self, body: Body) -> tuple[Body, ...]:
        """Long texts in two parts, so that part 2 is killed as well."""
        if len(body.text) < 60:
            return (body,)
        return Body(body.text[:40], body.buttons), Body(body.text[40:])

    async def open(self, to: Address) -> Handle:
        await self._pause()
        handle = Handle(f"{to.conversation}/{self._random.getrandbits(64):016x}")
        self._platform.write(self._platform.log, {"op": "open", "handle": handle})
        await self._pause()
        return handle

    async def show(self, handle: Handle, text: str) -> None:
        self._platform.write(self._platform.log, {"op": "show", "handle": handle, "text": text})

    async def finish(self, handle: Handle, body: Body) -> Receipt:
        await self._pause()
        self._platform.write(self._platform.log, {"op": "finish", "handle": handle, "text": body.text})
        await self._pause()
        return Receipt(handle)

    async def recover(self, handle: Handle) -> Handle:
        return handle

    async def fail(self, handle: Handle, body: Body) -> None:
        await self._pause()
        self._platform.write(self._platform.log, {"op": "fail", "handle": handle, "text": body.text})


def update(n: int, text: str, *, conversation: str, user: str, stop: bool = False) -> Incoming:
    return Incoming(
        lane=Lane.CONTROL if stop else Lane.TURN,
        kind=Kind.STOP if stop else Kind.MESSAGE,
        address=Address("fake", "bot", "place", conversation),
        user=user,
        update_key=str(n),
        message_key="" if stop else f"m{n}",
        text=text,
    )
