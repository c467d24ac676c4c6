"""A thumb up becomes a row to learn from, where its person consented; and goes with them."""

from __future__ import annotations

from pathlib import Path

import pytest

from core.sayings import examples_of
from core.types import Kind
from tests.world import STRANGER, World, world


async def like(it: World) -> None:
    await it.ask("how long does a permit take?")
    found = await it.database.read(lambda tx: tx.value("SELECT id FROM generation ORDER BY started_ms DESC LIMIT 1"))
    await it.send("", kind=Kind.PRESS, action="feedback", value=f"{found}:1")
    await it.settled()


@pytest.mark.parametrize("leave", ["/forget yes", "/consent off"])
async def test_a_liked_reply_is_learned_from_until_its_person_takes_it_back(tmp_path: Path, leave: str) -> None:
    async with world(tmp_path) as it:
        await it.ask("/consent on", user=STRANGER)
        await like(it)
        channel = await it.database.read(lambda tx: tx.value("SELECT id FROM channel WHERE name = 'acme'"))
        (said,) = await it.database.read(lambda tx: examples_of(tx, channel))
        assert said.messages == [
            {"role": "user", "content": "how long does a permit take?"},
            {"role": "assistant", "content": "you said how long does a permit take?"},
        ]
        await it.ask(leave, user=STRANGER)
        assert await it.count("example") == 0


async def test_without_consent_nothing_is_kept(tmp_path: Path) -> None:
    async with world(tmp_path) as it:
        await like(it)
        assert await it.count("example") == 0
