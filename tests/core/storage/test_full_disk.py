"""A disk that fills up while people talk: nothing that was accepted is lost, and what is refused is refused clearly."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from core.errors import StorageFull
from tests.support.running_service import RunningService, running_service

pytestmark = pytest.mark.slow


def fill(folder: Path) -> Path:
    """Leave not one byte."""
    ballast = folder / "ballast"
    with ballast.open("wb", buffering=0) as file:
        for size in (65_536, 4096, 1):
            try:
                while True:
                    file.write(b"x" * size)
            except OSError:
                continue
    return ballast


async def refused(it: RunningService) -> None:
    """Messages until one finds no room."""
    for n in range(200):
        await it.send(f"{n} " + "long " * 2000, user=f"u{n}", conversation=f"c{n}")


async def test_a_full_disk_refuses_new_messages_and_answers_the_accepted_ones_when_there_is_room(
    small_disk: Path,
) -> None:
    async with running_service(small_disk) as it:
        await it.ask("hello")
        ballast = fill(small_disk)
        with pytest.raises(StorageFull):
            await refused(it)
        accepted = await it.count("inbox")
        ballast.unlink()
        await it.settled()
        assert len(it.bot.said()) == accepted == await it.count("ledger")
        assert await it.ask("again") == "you said again"


async def test_a_disk_that_fills_up_while_it_answers_delays_the_answer_and_doubles_nothing(small_disk: Path) -> None:
    async with running_service(small_disk, lambda _: "word " * 300, delay_s=0.002) as it:
        await it.send("talk")
        await it.bot.showing.wait()
        ballast = fill(small_disk)
        while it.service._replies.running:  # noqa: ASYNC110 - until the text is there and has to be stored
            await asyncio.sleep(0.01)
        ballast.unlink()
        await it.settled()
        assert it.bot.said() == [("word " * 300).strip()]
        assert await it.count("ledger") == 1
