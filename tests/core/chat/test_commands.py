"""What everyone's commands do, in both languages."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from core.channels import people
from core.chat import dispatch
from core.commands.parser import parse
from core.errors import BadCommand, BadInput
from core.i18n.messages import language_name, say
from core.jobs import datasets, jobs
from core.storage.database import Tx
from core.types import AnswerAgain, Body, ForgetMemory, Outcome, StopReply
from core.usage import prices
from core.usage.ledger import amounts, charge_job, day_of
from core.usage.reports import daily
from tests.support.database import read_now, write_now
from tests.support.people import Town, ask, town

DAY_MS = 86_400_000


@pytest.fixture
def it(tmp_path: Path) -> Iterator[Town]:
    with town(tmp_path) as made:
        yield made


def charge(it: Town, who: str, n: int, tokens: tuple[int, int], *, ago_ms: int = 0, place: str = "acme") -> None:
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


def test_usage_shows_the_last_reply_and_the_sums_of_this_person_here(it: Town) -> None:
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


def test_usage_shows_operators_the_month_of_the_channel_and_what_it_is_worth(it: Town) -> None:
    it.run("owner", "/channel set acme price_in=1000000 price_out=2000000 share=30")
    charge(it, "user", 2, (100, 50))
    charge(it, "stranger", 3, (100, 50))
    for who in ("operator", "owner"):
        said = it.says(who, "/usage")
        assert "**Acme**, this month: 200 tokens in (0 of them reused), 100 out, replies: 2" in said
        assert "amount 0.40, partner's share 0.12" in said
    assert "amount" not in it.says("other_operator", "/usage")


def test_usage_shows_small_amounts_to_the_sixth_place(it: Town) -> None:
    it.run("owner", "/channel set acme price_in=150 price_out=600")
    charge(it, "user", 2, (32, 9))
    assert "amount 0.000010" in it.says("owner", "/usage")


def test_usage_shows_operators_fine_tunes_apart_from_replies(it: Town, tmp_path: Path) -> None:
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


def test_new_begins_the_conversation_anew_and_no_other(it: Town) -> None:
    outcome = it.run("user", "/new")
    assert outcome.body.text == say("en", "users.new")
    conversation = read_now(it.database, lambda tx: tx.value("SELECT id FROM conversation WHERE place = 'acme'"))
    assert outcome.after == (ForgetMemory("acme", str(conversation)),)
    assert {turn["conversation_id"] for turn in it.rows()["turn"]} == {2} != {conversation}


def test_retry_asks_for_another_answer_where_there_was_a_question(it: Town) -> None:
    assert it.run("user", "/retry").after == (AnswerAgain(),)
    it.run("user", "/new")
    with pytest.raises(BadInput) as raised:
        it.run("user", "/retry")
    assert raised.value.key == "service.nothing_to_retry"


def test_stop_says_whether_there_was_anything_to_stop(it: Town) -> None:
    outcome = it.run("user", "/stop")
    assert outcome == Outcome(outcome.body, (StopReply(it.hash("user")),))
    assert outcome.body.text == say("en", "users.nothing_to_stop")
    write_now(it.database, lambda tx: tx.run("UPDATE inbox SET state = 'running' WHERE place = 'acme'"))
    assert it.says("user", "/stop") == say("en", "users.stop")
    assert it.says("user", "/stop", place="delta") == say("en", "users.nothing_to_stop")
    assert it.says("stranger", "/stop") == say("en", "users.not_yours_to_stop")
    assert it.run("operator", "/stop") == Outcome(Body(say("en", "users.stop")), (StopReply(""),))


@pytest.mark.parametrize(
    ("role", "rights"), [("user", "/help"), ("operator", "of this channel"), ("owner", "of all channels")]
)
def test_whoami_names_channel_and_rights(it: Town, role: str, rights: str) -> None:
    said = it.says(role, "/whoami")
    assert "**Acme** (`acme`)" in said
    assert rights in said
    assert it.hash(role)[:12] in said
    assert role not in said.replace("operator of", "")


def test_a_language_is_chosen_by_code_or_name_and_given_back(it: Town) -> None:
    for typed, chosen in (("zh", "zh"), ("English", "en"), ("中文", "zh"), ("auto", "")):
        said = it.says("user", f"/language {typed}")
        assert read_now(it.database, lambda tx: people.language_of(tx, it.hash("user"))) == chosen
        assert said == (
            say(chosen, "users.language_set", name=language_name(chosen))
            if chosen
            else say("en", "users.language_auto")
        )
    with pytest.raises(BadInput) as raised:
        it.run("user", "/language klingon")
    assert "en, zh" in str(raised.value.fields["codes"])
    assert "English" in it.says("user", "/language")
    assert "中文" in it.says("user", "/language", language="zh")


def test_help_of_an_unknown_command_names_the_nearest(it: Town) -> None:
    with pytest.raises(BadCommand) as raised:
        it.run("user", "/help fintune")
    assert raised.value.fields["nearest"] == "/finetune"


def code_of(said: str) -> str:
    return next(line for line in said.splitlines() if "/claim" in line).strip("`").removeprefix("/claim ")


def test_an_invitation_makes_one_operator_and_is_used_up(it: Town) -> None:
    code = code_of(it.says("owner", "/operator invite acme Kim"))
    said = it.says("stranger", f"/claim {code.lower().replace('-', ' ').split()[0]}-{code[5:]}")
    assert said == say("en", "users.claim_channel", title="Acme")
    assert "Kim" in it.says("stranger", "/operator list")
    assert it.audit()[-2]["action"] == "claim"
    with pytest.raises(BadInput) as raised:
        it.run("user", f"/claim {code}")
    assert raised.value.key == "users.claim_bad"
    assert it.says("stranger", "/channel show delta") == say("en", "error.not_allowed")


def test_a_wrong_code_gives_nothing(it: Town) -> None:
    code = code_of(it.says("owner", "/operator invite all"))
    wrong = code[:-1] + ("2" if code[-1] != "2" else "3")
    before = it.rows()
    with pytest.raises(BadInput):
        it.run("stranger", f"/claim {wrong}")
    assert it.rows() == before
    assert code not in str(it.rows()) + str(it.audit())


async def test_two_who_claim_one_code_at_once_one_wins(it: Town) -> None:
    code = code_of(it.says("owner", "/operator invite all Kim"))
    call = parse(f"/claim {code}")

    def claim(who: str) -> asyncio.Future[Outcome]:
        work = it.database.write(lambda tx: dispatch.run(tx, it.caller(tx, who), call))
        return asyncio.ensure_future(work)

    results = await asyncio.gather(*(claim(f"person {n}") for n in range(20)), return_exceptions=True)
    assert [isinstance(result, Outcome) for result in results].count(True) == 1
    assert [row["label"] for row in it.rows()["operator"]].count("Kim") == 1
