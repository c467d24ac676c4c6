"""Two answers to one question, blind: drawn order, one choice that counts, no charge, nothing in the conversation."""

from __future__ import annotations

import asyncio
import json
import random
from pathlib import Path

import pytest

from core.adapters import folders, registry
from core.adapters.folders import Candidate
from core.channels import bindings
from core.chat.comparisons import _pair
from core.engine.protocol import Request
from core.errors import AdapterUnusable, AppError, UserError
from core.i18n.messages import say
from core.jobs import datasets, jobs
from core.jobs.protocol import Shown
from core.storage.database import Tx
from core.types import AdapterRef, Address, Caller, Handle, Kind
from tests.support.running_service import OWNER, RunningService, running_service
from tests.support.waiting import DEADLINE_S

SHA = "ab" * 32


def by_version(request: Request) -> str | AppError:
    """Each version answers in its own way; the system prompt is there for both."""
    who = request.adapter.label if request.adapter else "base"
    return f"{who} says {request.messages[-1].text}"


async def publish(w: RunningService, *, unseen: tuple[tuple[str, str], ...] = (), worst=(), judged=None) -> None:
    """acme@1, made by a job."""

    def work(tx: Tx) -> None:
        at = Address("fake", "bot", "p", "c")
        channel = bindings.channel_for(tx, "fake", "bot", "p")
        assert channel is not None
        owner = Caller(tx.cipher.hash_user("fake", "bot", OWNER), at, channel, "en", 0, 1)
        datasets.keep_dataset(tx, "d" * 64, "faq.jsonl", source="file", size_bytes=1, brought_by="someone")
        job = jobs.create(tx, owner, "d" * 64, "faq.jsonl")
        manifest = json.dumps({"judged": judged or {"verdict": "passed"}})
        registry.publish(tx, Candidate(SHA, Path("."), w.engine.info.fingerprint, "d" * 64, manifest), "acme", 1)
        jobs.end(tx, job.id, "published", result=SHA)
        jobs.keep_test_rows(tx, job.id, Shown(worst, unseen).dump())
        tx.run("UPDATE delivery SET state = 'done'")

    await w.database.write(work)


@pytest.fixture(autouse=True)
def folders_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders, "verify", lambda ref: None)


async def press(w: RunningService, number: int) -> str:
    """The button of the newest message."""
    body = list(w.bot.final.values())[-1]
    return await w.ask("", user=OWNER, kind=Kind.PRESS, command=body.buttons[number].value)


async def chosen(w: RunningService) -> list[tuple[str | None, int]]:
    rows = await w.database.read(lambda tx: tx.all("SELECT chosen, candidate_first FROM comparison ORDER BY id"))
    return [(row["chosen"], row["candidate_first"]) for row in rows]


async def test_base_is_compared_with_what_is_in_service(tmp_path: Path) -> None:
    async with running_service(tmp_path, by_version) as w:
        await publish(w)
        await w.database.write(lambda tx: registry.promote(tx, "acme", SHA, "owner", ""))
        said = await w.ask("/adapter compare base who are you?", user=OWNER)
        assert "acme@1 says who are you?" in said
        assert "base says who are you?" in said
        assert "acme@1" in await press(w, 0)
        assert [button.value for button in list(w.bot.final.values())[-1].buttons] == [
            "/adapter compare base",
            "/adapter promote base",
        ]


async def test_both_answer_blind_and_the_choice_is_told_and_counted_once(tmp_path: Path) -> None:
    async with running_service(tmp_path, by_version) as w:
        await publish(w)
        text = await w.ask("/adapter compare acme@1 How long does it take?", user=OWNER)
        body = list(w.bot.final.values())[-1]
        ((_, first),) = await chosen(w)
        names = ("acme@1", "base") if first else ("base", "acme@1")
        a, b = (f"{name} says How long does it take?" for name in names)
        assert text.index(a) < text.index(b)
        assert [button.text for button in body.buttons] == ["A is better", "B is better", "Both alike"]
        told = await press(w, 0 if first else 1)
        assert f"A was {names[0]}, B was {names[1]}" in told
        assert "You chose **acme@1**" in told
        assert "acme@1 better 1, base better 0, alike 0" in told
        again = await w.ask("/adapter choose 1 same", user=OWNER)
        assert "already decided" in again
        assert "acme@1 better 1, base better 0, alike 0" in again
        assert [one for one, _ in await chosen(w)] == ["candidate"]
        assert await w.count("generation") == await w.count("ledger") == await w.count("turn") == 0
        assert await w.count("audit", "action = 'adapter choose' AND after LIKE '%candidate%'") == 1


async def test_the_order_is_drawn_anew_each_time_and_ties_and_losses_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = [random.Random(0).getrandbits(12) >> bit & 1 for bit in range(12)]  # both orders are among them
    draws = iter(drawn)
    monkeypatch.setattr("core.chat.comparisons.secrets.randbelow", lambda below: next(draws))
    async with running_service(tmp_path, by_version) as w:
        await publish(w)
        for number in range(1, 13):
            await w.ask(f"/adapter compare acme@1 question {number}", user=OWNER)
        order = [first for _, first in await chosen(w)]
        assert order == drawn
        assert 0 < sum(order) < 12
        for number, first in enumerate(order, 1):
            choice = "same" if number == 12 else ("b" if first else "a")  # always base
            told = await w.ask(f"/adapter choose {number} {choice}", user=OWNER)
        assert "acme@1 better 0, base better 11, alike 1" in told


async def test_without_a_question_it_takes_unseen_ones_one_after_another(tmp_path: Path) -> None:
    async with running_service(tmp_path, by_version) as w:
        await publish(w, unseen=(("First unseen?", "Yes."), ("Second unseen?", "No.")))
        assert "First unseen?" in await w.ask("/adapter compare acme@1", user=OWNER)
        assert "Second unseen?" in await w.ask("/adapter compare acme@1", user=OWNER)
        await w.ask("/adapter compare acme@1 What?", user=OWNER)
        assert (await w.count("comparison", "typed = 0"), await w.count("comparison", "typed = 1")) == (2, 1)
        told = await w.ask("/adapter choose 2 a", user=OWNER)
        assert "So far" in told
        assert "First unseen?" in await press(w, 0)


async def test_a_question_that_was_kept_cut_is_asked_last(tmp_path: Path) -> None:
    async with running_service(tmp_path, by_version) as w:
        await publish(w, unseen=(("Long and cut…", "Yes."), ("Whole?", "No.")))
        assert "Whole?" in await w.ask("/adapter compare acme@1", user=OWNER)
        assert "Long and cut…" in await w.ask("/adapter compare acme@1", user=OWNER)


async def test_the_same_answer_from_both_is_a_tie_without_a_question(tmp_path: Path) -> None:
    async with running_service(tmp_path, lambda request: "One word.") as w:
        await publish(w)
        text = await w.ask("/adapter compare acme@1 What?", user=OWNER)
        assert text.count("One word.") == 1
        assert "alike 1" in text
        assert [one for one, _ in await chosen(w)] == ["same"]


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("/adapter compare base", "nothing to compare"),
        ("/adapter compare acme@1", "Say what to ask"),
        ("/adapter compare acme@7 What?", "no version acme@7"),
        ("/adapter choose 99 a", "no comparison 99"),
        ("/adapter choose x a", "no comparison x"),
    ],
)
async def test_what_cannot_be_compared_says_what_to_do(tmp_path: Path, text: str, answer: str) -> None:
    async with running_service(tmp_path, by_version) as w:
        await publish(w)
        assert answer in await w.ask(text, user=OWNER)


async def test_strangers_neither_compare_nor_choose(tmp_path: Path) -> None:
    async with running_service(tmp_path, by_version) as w:
        await publish(w)
        await w.ask("/adapter compare acme@1 What?", user=OWNER)
        await w.ask("/adapter compare acme@1 What?")
        await w.ask("/adapter choose 1 a")
        assert await chosen(w) == [(None, (await chosen(w))[0][1])]


async def test_a_restart_in_the_middle_answers_the_same_comparison(tmp_path: Path) -> None:
    async with running_service(tmp_path, by_version, running=False) as w:
        await publish(w)
        await w.send("/adapter compare acme@1 What?", user=OWNER, key="one")
    async with running_service(tmp_path, by_version) as w:
        await w.settled()
        assert "acme@1 says What?" in w.bot.said()[-1]
        assert await w.count("comparison") == 1


async def test_both_answers_take_places_like_any_other_request(tmp_path: Path) -> None:
    at_the_engine: list[int] = []

    def counted(request: Request) -> str | AppError:
        stats = w.engine.stats()
        at_the_engine.append(stats.running + stats.waiting)
        return by_version(request)

    async with running_service(tmp_path, counted, delay_s=0.01, max_replies=1) as w:
        await publish(w)
        assert "base says What?" in await w.ask("/adapter compare acme@1 What?", user=OWNER)
        assert at_the_engine == [1, 1]


async def test_a_stop_that_comes_before_the_answers_are_begun_is_heard(tmp_path: Path) -> None:
    async with running_service(tmp_path, by_version, running=False) as w:
        await publish(w)
        await w.send("/adapter compare acme@1 What?", user=OWNER)
        await w.send("", user=OWNER, kind=Kind.STOP)
    async with running_service(tmp_path, by_version) as w:
        await w.settled()
        assert w.bot.said() == [say("en", "service.stopped")]
        assert w.engine.requests == []


async def test_a_stop_ends_both_also_where_one_waits_for_its_place(tmp_path: Path) -> None:
    async with running_service(tmp_path, lambda _: "word " * 400, delay_s=0.005, max_replies=1) as w:
        await publish(w)
        await w.send("/adapter compare acme@1 What?", user=OWNER)
        while not w.engine.requests:  # noqa: ASYNC110 - until the first is written
            await asyncio.sleep(0.01)
        await w.send("", user=OWNER, kind=Kind.STOP)
        await w.settled()
        assert w.bot.said() == [say("en", "service.stopped")]
        assert len(w.engine.requests) == 1


async def test_a_platform_that_shows_nothing_meanwhile_costs_no_answer(tmp_path: Path) -> None:
    async with running_service(tmp_path, by_version) as w:
        await publish(w)

        async def away(handle: Handle, text: str) -> None:
            raise ConnectionError("the platform is away")

        w.bot.show = away  # type: ignore[method-assign]
        assert "acme@1 says What?" in await w.ask("/adapter compare acme@1 What?", user=OWNER)


@pytest.mark.parametrize("where", ["verified", "loaded"])
async def test_a_version_that_is_damaged_is_not_said_to_be_the_channels(
    tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def damaged(ref: AdapterRef) -> None:
        raise AdapterUnusable(detail="a bit has changed", label=ref.label)

    def answers(request: Request) -> str | AppError:
        return AdapterUnusable(detail="a bit has changed", label="acme@1") if request.adapter else "well"

    async with running_service(tmp_path, answers) as w:
        await publish(w)
        if where == "verified":
            monkeypatch.setattr(folders, "verify", damaged)
        told = await w.ask("/adapter compare acme@1 What?", user=OWNER)
        assert told == say("en", "compare.unusable", label="acme@1")


async def test_a_comparison_that_runs_while_its_person_is_forgotten_is_not_kept(tmp_path: Path) -> None:
    async with running_service(tmp_path, lambda _: "word " * 100, delay_s=0.005) as w:
        await publish(w)
        await w.send("/adapter compare acme@1 What?", user=OWNER, conversation="one")
        while len(w.engine.requests) < 2:  # noqa: ASYNC110 - until both are written
            await asyncio.sleep(0.01)
        await w.send("/forget yes", user=OWNER, conversation="two")
        await w.settled()
        async with asyncio.timeout(DEADLINE_S):
            while len(w.bot.said()) < 2:  # noqa: ASYNC110 - its row is closed already
                await asyncio.sleep(0.01)
        assert w.bot.said() == [say("en", "service.stopped"), say("en", "privacy.forgotten")]
        assert await w.count("inbox", "outcome = 'forgotten'") == 1


async def test_a_comparison_whose_person_is_forgotten_before_it_begins_is_stopped(tmp_path: Path) -> None:
    async with running_service(tmp_path, by_version) as w:
        await publish(w)
        await w.ask("/adapter compare acme@1 What?", user=OWNER)
        row_id = await w.database.read(lambda tx: tx.value("SELECT inbox_id FROM comparison"))
        await w.database.write(lambda tx: tx.run("UPDATE comparison SET question = NULL"))
        with pytest.raises(UserError, match=r"service\.stopped"):
            await w.database.read(lambda tx: _pair(tx, row_id))


async def test_the_worst_rows_are_shown_and_go_with_their_data_set(tmp_path: Path) -> None:
    judged = {"verdict": "no_better", "champion": "base", "worst": [[12, 2.0, 3.5], [7, 1.0, 1.25]]}
    worst = ((12, 2.0, 3.5, "What is twelve?", "A number."), (7, 1.0, 1.25, "What is seven?", "Another."))
    async with running_service(tmp_path, by_version) as w:
        await publish(w, judged=judged, worst=worst)
        told = await w.ask("/adapter worst acme@1", user=OWNER)
        assert "- line 12 (2.00 → 3.50): What is twelve? ▶ A number." in told
        assert told.index("line 12") < told.index("line 7")
        await w.database.write(lambda tx: tx.run("UPDATE dataset SET erased_ms = 1"))
        told = await w.ask("/adapter worst acme@1", user=OWNER)
        assert "- line 12 (2.00 → 3.50)" in told
        assert "twelve" not in told
        assert "no longer kept" in told
        sealed = await w.database.read(lambda tx: tx.value("SELECT count(*) FROM job WHERE shown IS NOT NULL"))
        assert sealed == 0


async def test_a_discarded_version_is_out_of_use_and_the_one_in_service_cannot_be(tmp_path: Path) -> None:
    async with running_service(tmp_path, by_version) as w:
        await publish(w)
        await w.ask("/adapter promote acme@1", user=OWNER)
        assert "cannot be discarded" in await w.ask("/adapter discard acme@1", user=OWNER)
        await w.ask("/adapter rollback", user=OWNER)
        assert "is discarded" in await w.ask("/adapter discard acme@1", user=OWNER)
        assert "withdrawn and cannot be used: discarded" in await w.ask("/adapter promote acme@1", user=OWNER)
        assert "withdrawn and cannot be used" in await w.ask("/adapter compare acme@1 What?", user=OWNER)
