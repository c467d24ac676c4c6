"""/usage in both languages."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from core.i18n.messages import say
from core.jobs import datasets, jobs
from core.storage.database import Tx
from core.usage import prices
from core.usage.ledger import amounts, charge_job, day_of
from core.usage.reports import daily
from tests.support.database import read_now, write_now
from tests.support.roles import Roles, ask, open_roles

DAY_MS = 86_400_000


@pytest.fixture
def it(tmp_path: Path) -> Iterator[Roles]:
    with open_roles(tmp_path) as made:
        yield made


def charge(it: Roles, who: str, n: int, tokens: tuple[int, int], *, ago_ms: int = 0, place: str = "acme") -> None:
    """The rows of one delivered reply."""

    def work(tx: Tx) -> None:
        caller = it.caller(tx, who, place)
        price = prices.price_now(tx, caller.channel.id)
        gross, partner, owner = amounts(price, *tokens)
        at_ms = tx.now_ms - ago_ms
        tx.insert(
            "generation",
            id=f"{place} {n}",
            inbox_id=ask(tx, caller, "question", n),
            channel_id=caller.channel.id,
            user_hash=caller.user,
            price_id=price.id,
            seed=1,
            state="delivered",
            tokens_in=tokens[0],
            tokens_out=tokens[1],
            started_ms=at_ms,
        )
        tx.insert(
            "ledger",
            kind="usage",
            generation_id=f"{place} {n}",
            day=day_of(at_ms),
            channel_id=caller.channel.id,
            price_id=price.id,
            tokens_in=tokens[0],
            tokens_reused=0,
            tokens_out=tokens[1],
            gross_nano=gross,
            partner_nano=partner,
            owner_nano=owner,
            booked_ms=at_ms,
        )

    write_now(it.database, work)


def test_usage_shows_the_last_reply_and_the_sums_of_this_person_here(it: Roles) -> None:
    assert it.says("user", "/usage") == say("en", "users.usage_none")
    charge(it, "user", 2, (32, 9))
    charge(it, "user", 3, (40, 10))
    charge(it, "stranger", 4, (1000, 1000))
    charge(it, "user", 5, (5000, 5000), place="delta")
    charge(it, "user", 6, (7000, 7000), ago_ms=40 * DAY_MS)
    said = it.says("user", "/usage")
    assert "last reply: 40 tokens in, 10 out" in said
    assert "today: 72 tokens in, 19 out, replies: 2" in said
    assert "this month: 72 tokens in, 19 out, replies: 2" in said
    assert "amount" not in said
    assert "上一个回答：输入 40 token，输出 10 token" in it.says("user", "/usage", language="zh")


def test_usage_shows_operators_the_month_of_the_channel_and_what_it_is_worth(it: Roles) -> None:
    it.run("owner", "/channel set acme price_in=1000000 price_out=2000000 share=30")
    charge(it, "user", 2, (100, 50))
    charge(it, "stranger", 3, (100, 50))
    for who in ("operator", "owner"):
        said = it.says(who, "/usage")
        assert "**Acme**, this month: 200 tokens in (0 of them reused), 100 out, replies: 2" in said
        assert "amount 0.40, partner's share 0.12" in said
    assert "amount" not in it.says("other_operator", "/usage")


def test_usage_shows_small_amounts_to_the_sixth_place(it: Roles) -> None:
    it.run("owner", "/channel set acme price_in=150 price_out=600")
    charge(it, "user", 2, (32, 9))
    assert "amount 0.000010" in it.says("owner", "/usage")


def test_usage_shows_operators_fine_tunes_apart_from_replies(it: Roles, tmp_path: Path) -> None:
    it.run("owner", "/channel set acme price_in=1000000 price_train=2500 share=30")
    charge(it, "user", 2, (100, 50))

    def train(tx: Tx) -> None:
        sha256 = "a" * 64
        datasets.keep_dataset(tx, sha256, "faq.jsonl", source="file", size_bytes=1, brought_by=it.hash("operator"))
        job = jobs.create(tx, it.caller(tx, "operator"), sha256)
        jobs.pin_price(tx, job.id)
        charge_job(tx, job.id, 48_000)

    write_now(it.database, train)
    said = it.says("operator", "/usage")
    assert "replies: 1, amount 0.10, partner's share 0.03" in said
    assert "Fine-tunes this month: 1, 48,000 tokens trained, amount 0.12" in said
    assert "本月微调：1 次，训练 48,000 个 token，金额 0.12" in it.says("operator", "/usage", language="zh")
    assert "tokens trained" not in it.says("user", "/usage")
    (row,) = read_now(it.database, lambda tx: daily(tx, it.caller(tx, "operator").channel.id, 1))
    assert (row["replies"], row["gross_nano"], row["jobs"], row["jobs_nano"]) == (1, 220_000_000, 1, 120_000_000)
