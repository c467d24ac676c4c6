"""What a fine-tune costs: told before, charged once a version is there, and never more than was told."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from core.channels import directory
from core.jobs import supervisor
from core.jobs.worker import TrainingSettings
from core.storage.database import Row, Tx
from core.usage import ledger, prices
from tests.core.jobs.test_supervisor import PAUSED
from tests.support.running_jobs import RunningJobs, WatchedBot, running_jobs
from tests.support.waiting import DEADLINE_S

pytestmark = pytest.mark.slow

PRICE = 500_000  # nano-units per trained token; the fake trainer's check tells 1200 of them, and trains 900


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("core.jobs.progress.SHOW_S", 0.0)


async def set_price(it: RunningJobs, nano: int) -> None:
    def work(tx: Tx) -> None:
        channel = directory.channel_by_name(tx, "acme")
        assert channel is not None
        prices.set_price(tx, channel.id, 150, 600, 3000, nano)

    await it.database.write(work)


async def charges(it: RunningJobs) -> list[Row]:
    assert await it.database.read(ledger.check) == []
    names = "job_id, tokens_trained, gross_nano, partner_nano, owner_nano"
    return await it.database.read(lambda tx: tx.all(f"SELECT {names} FROM ledger"))


async def test_what_was_told_before_the_yes_is_what_holds(tmp_path: Path) -> None:
    async with running_jobs(tmp_path) as it:
        await set_price(it, PRICE)
        job_id = await it.order(agreed=False)
        assert "Cost: 0.60 at most" in await it.ended()
        await set_price(it, 10 * PRICE)
        assert "Cost: 0.60 at most" in await it.say("/finetune status")
        assert await charges(it) == []
        await it.say("/finetune start")
        assert "Charged: 0.45, for 900 trained tokens." in await it.ended(2)
        gross = 900 * PRICE
        wanted = {"job_id": job_id, "tokens_trained": 900, "gross_nano": gross, "partner_nano": 0, "owner_nano": gross}
        assert await charges(it) == [wanted]


@pytest.mark.parametrize(("agreed", "tokens"), [(False, 1200), (True, 5000)])
async def test_no_more_tokens_are_charged_than_were_told(tmp_path: Path, agreed: bool, tokens: int) -> None:
    """Who says yes at once is told no number, and has what is trained charged."""
    async with running_jobs(tmp_path) as it:
        await set_price(it, PRICE)
        await it.order("long", agreed=agreed)
        if not agreed:
            await it.ended()
            await it.say("/finetune start")
        await it.ended(1 if agreed else 2)
        assert [row["tokens_trained"] for row in await charges(it)] == [tokens]


async def test_a_version_that_does_not_pass_is_charged_like_one_that_does(tmp_path: Path) -> None:
    async with running_jobs(tmp_path) as it:
        await set_price(it, PRICE)
        await it.order("worse")
        assert "Charged: 0.45" in await it.ended()
        assert len(await charges(it)) == 1


@pytest.mark.parametrize("word", ["ours", "other-base"])
async def test_a_job_without_a_version_costs_nothing(tmp_path: Path, word: str) -> None:
    async with running_jobs(tmp_path) as it:
        await set_price(it, PRICE)
        job_id = await it.order(word)
        assert "Charged" not in await it.ended()
        assert (await it.job(job_id))["state"] == "failed"
        assert await charges(it) == []


async def test_a_job_that_is_cancelled_costs_nothing_and_resumed_what_was_agreed(tmp_path: Path) -> None:
    async with running_jobs(tmp_path) as it:
        await set_price(it, PRICE)
        job_id = await it.order("pause")
        await it.bot.until(lambda: PAUSED in it.bot.newest)
        await it.say(f"/finetune cancel {job_id}")
        await it.ended()
        assert await charges(it) == []
        await set_price(it, 10 * PRICE)
        await it.say(f"/finetune resume {job_id}")
        await it.ended(2)
        assert [row["gross_nano"] for row in await charges(it)] == [900 * PRICE]


async def test_where_nothing_is_to_pay_the_books_count_the_job_all_the_same(tmp_path: Path) -> None:
    async with running_jobs(tmp_path) as it:
        await it.order()
        assert "Charged" not in await it.ended()
        assert [(row["tokens_trained"], row["gross_nano"]) for row in await charges(it)] == [(900, 0)]


async def test_a_charge_stands_and_falls_with_its_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What fails behind the charge undoes it; the next start makes the version and charges it, once."""
    bot, crashed, loop = WatchedBot(), asyncio.Event(), asyncio.get_running_loop()

    def crash(tx: Tx, delivery_id: int, body: object) -> None:
        assert tx.value("SELECT count(*) FROM ledger") == 1
        loop.call_soon_threadsafe(crashed.set)
        raise ZeroDivisionError

    with monkeypatch.context() as patch:
        patch.setattr(supervisor, "keep_body", crash)
        async with running_jobs(tmp_path, bot=bot, settings=TrainingSettings(retry_s=60)) as it:
            await set_price(it, PRICE)
            await it.order()
            async with asyncio.timeout(DEADLINE_S):
                await crashed.wait()
            await it.stop()
            assert not await it.versions()
            assert await charges(it) == []
    for _ in range(2):
        async with running_jobs(tmp_path, bot=bot) as it:
            await it.ended()
            assert len(await it.versions()) == len(await charges(it)) == 1
