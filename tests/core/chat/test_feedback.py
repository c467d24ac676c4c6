"""Thumbs and corrections become rows to learn from where whoever was answered allows it; and go with them."""

from __future__ import annotations

from pathlib import Path

import pytest

from core.config.schema import Retention
from core.i18n.messages import say
from core.jobs.examples import ConsentedExample, examples_of
from core.privacy.retention import clean
from core.storage.cipher import Cipher
from core.types import Kind
from tests.support.running_service import OWNER, STRANGER, RunningService, running_service

ASKED = "how long does a permit take?"
DAY_MS = 86_400_000


async def vote(it: RunningService, value: str, *, user: str = STRANGER) -> str:
    """Ask, and press a thumb below the answer; the number of the reply."""
    await it.ask(ASKED, user=user)
    return await press(it, value, user=user)


async def press(it: RunningService, value: str, *, user: str = STRANGER) -> str:
    found = await it.database.read(lambda tx: tx.value("SELECT id FROM generation ORDER BY inbox_id DESC LIMIT 1"))
    await it.send("", kind=Kind.PRESS, action="feedback", value=f"{found}:{value}", user=user)
    await it.settled()
    return str(found)


async def examples(it: RunningService) -> list[ConsentedExample]:
    return await it.database.read(
        lambda tx: examples_of(tx, tx.value("SELECT id FROM channel WHERE name = 'acme'")).examples
    )


async def test_a_liked_reply_is_learned_from_with_what_was_said_before_it(tmp_path: Path) -> None:
    async with running_service(tmp_path) as it:
        await it.ask("before", user=STRANGER)
        await it.ask("/consent on", user=STRANGER)
        await it.ask("and I live in Graz", user=STRANGER)
        await vote(it, "1")
        (said,) = await examples(it)
        assert said.messages == [
            {"role": "user", "content": "and I live in Graz"},
            {"role": "assistant", "content": "you said and I live in Graz", "weight": 0},
            {"role": "user", "content": ASKED},
            {"role": "assistant", "content": f"you said {ASKED}"},
        ]


async def test_of_more_than_can_be_learned_from_the_newest_replies_are_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running_service(tmp_path) as it:
        await it.ask("/consent on", user=STRANGER)
        liked = [await vote(it, "1") for _ in range(3)]
        await it.database.write(
            lambda tx: [
                tx.run("UPDATE example SET at_ms = ? WHERE generation_id = ?", [n, one]) for n, one in enumerate(liked)
            ]
        )
        monkeypatch.setattr("core.jobs.examples.MOST_TURNS", 2)
        assert [said.id for said in await examples(it)] == liked[1:]


@pytest.mark.parametrize("column", ["said", "correction"])
async def test_a_reply_that_cannot_be_read_is_left_out_and_told(tmp_path: Path, column: str) -> None:
    async with running_service(tmp_path) as it:
        await it.ask("/consent on", user=STRANGER)
        numbers = [await vote(it, "1") for _ in range(2)]
        for number in numbers:
            await it.ask(f"/correct #{number[:8]} 20 days", user=OWNER)
        sealed = Cipher(b"x" * 32).seal("of another key")
        damage = f"UPDATE example SET {column} = ? WHERE generation_id = ?"
        await it.database.write(lambda tx: tx.run(damage, [sealed, numbers[0]]))
        assert [said.id for said in await examples(it)] == numbers[1:]
        await it.ask("/finetune from feedback", user=OWNER)
        assert any(text.endswith(f"\n- {say('en', 'training.left_out', n=1)}") for text in it.bot.said())
        await it.database.write(lambda tx: tx.run(damage, [sealed, numbers[1]]))
        assert await it.ask("/finetune from feedback", user=OWNER) == say("en", "error.unreadable")


async def test_without_consent_nothing_is_kept(tmp_path: Path) -> None:
    async with running_service(tmp_path) as it:
        number = await vote(it, "1")
        assert await it.ask(f"/correct #{number[:8]} 20 days", user=OWNER) == say("en", "feedback.no_reply")
        assert await it.ask("/correct 20 days", user=OWNER) == say("en", "feedback.not_allowed")
        assert await it.count("example") == 0


@pytest.mark.parametrize("leave", ["/forget yes", "/consent off"])
@pytest.mark.parametrize("allow", ["all", "one"])
async def test_a_correction_takes_the_place_of_the_answer_until_its_person_takes_it_back(
    tmp_path: Path, leave: str, allow: str
) -> None:
    async with running_service(tmp_path) as it:
        if allow == "all":
            await it.ask("/consent on", user=STRANGER)
        number = await vote(it, "-1:untrue")
        asks = say("en", "feedback.may_we")
        assert (it.bot.said()[-1] == asks) == (allow == "one")
        if allow == "one":
            assert await it.count("example") == 0
            kept = say("en", "feedback.shared")
            assert await it.ask("", kind=Kind.PRESS, command=f"/consent reply {number} yes") == kept
            assert say("en", "privacy.consent_is_for_some", n=1) in await it.ask("/consent", user=STRANGER)
            await press(it, "-1:other")
            assert it.bot.said().count(asks) == 1
        assert await examples(it) == []  # what is not liked is learned from only as it should have been
        assert f"#{number[:8]}" in await it.ask("/correct", user=OWNER)
        await it.ask(f"/correct #{number[:8]} It takes\n20 days.", user=OWNER)
        (said,) = await examples(it)
        assert said.messages[-1] == {"role": "assistant", "content": "It takes\n20 days."}
        sealed = await it.database.read(lambda tx: tx.value("SELECT correction FROM example"))
        assert b"20 days" not in sealed
        assert await it.ask("/correct", user=OWNER) == say("en", "feedback.none_waits")
        await it.ask("/finetune from feedback", user=OWNER)
        assert await it.count("dataset_person") == 2  # who asked, and whose correction it is
        await it.ask(leave, user=STRANGER)
        assert await it.count("example") == 0
        assert await it.count("dataset", "erased_ms IS NULL") == 0


async def test_a_no_after_a_yes_takes_it_back_with_what_was_made_of_it(tmp_path: Path) -> None:
    async with running_service(tmp_path) as it:
        number = await vote(it, "-1:untrue")
        await it.ask(f"/consent reply {number} yes")
        await it.ask(f"/correct #{number[:8]} 20 days", user=OWNER)
        await it.ask("/finetune from feedback", user=OWNER)
        assert await it.ask(f"/consent reply #{number[:8]} no") == say("en", "feedback.not_shared")
        assert await it.count("example") == 0
        assert await it.count("dataset", "erased_ms IS NULL") == 0


async def test_a_no_to_one_reply_holds_beside_a_yes_to_all_until_its_person_says_yes(tmp_path: Path) -> None:
    async with running_service(tmp_path) as it:
        await it.ask("/consent on", user=STRANGER)
        number = await vote(it, "1")
        await it.ask("/finetune from feedback", user=OWNER)
        assert await it.ask(f"/consent reply #{number[:8]} no") == say("en", "feedback.not_shared")
        assert await it.count("dataset", "erased_ms IS NULL") == 0
        await press(it, "1")
        await press(it, "-1:untrue")
        assert it.bot.said()[-1] == say("en", "feedback.not_shared")  # nobody asks again
        assert await it.ask("/correct 20 days", user=OWNER) == say("en", "feedback.not_allowed")
        assert await it.count("example") == 0
        assert "no conversations" in await it.ask("/finetune from conversations", user=OWNER)
        await it.ask("and in Graz?", user=STRANGER)
        await press(it, "1")
        (said,) = await examples(it)
        assert [one["content"] for one in said.messages] == ["and in Graz?", "you said and in Graz?"]
        await it.ask(f"/consent reply #{number[:8]} yes")
        await it.ask(f"/correct #{number[:8]} 20 days", user=OWNER)
        assert len(await examples(it)) == 2


async def test_nobody_else_gives_a_conversation_away_and_only_operators_correct(tmp_path: Path) -> None:
    async with running_service(tmp_path) as it:
        number = await vote(it, "-1:untrue")
        denied = say("en", "feedback.no_reply_of_yours")
        for typed in (number, f"#{number[:8]}", number[:9], "#", "%"):
            assert await it.ask(f"/consent reply {typed} yes", user=OWNER) == denied
        assert await it.ask("/correct my own words", user=STRANGER) == say("en", "error.not_allowed")
        assert await it.count("example") == 0
        assert await it.count("audit", "target LIKE '%words%'") == 0


async def test_an_operators_own_reply_needs_nobodys_yes_and_their_correction_goes_with_them(tmp_path: Path) -> None:
    async with running_service(tmp_path) as it:
        await it.ask(ASKED, user=OWNER)
        assert "20 days" in await it.ask("/correct 20 days", user=OWNER)
        assert [one.messages[-1]["content"] for one in await examples(it)] == ["20 days"]
        number = await vote(it, "-1:untrue")
        await it.ask(f"/consent reply {number} yes")
        await it.ask(f"/correct #{number[:8]} 30 days", user=OWNER)
        await it.ask("/forget yes", user=OWNER)
        assert await examples(it) == []
        assert await it.count("example", "correction IS NULL") == 1  # the stranger's, who has not asked for anything


async def test_it_is_kept_as_long_as_a_data_set_and_its_text_as_long_as_the_conversation(tmp_path: Path) -> None:
    now = 1_800_000_000_000
    async with running_service(tmp_path, clock=lambda: now) as it:
        number = await vote(it, "-1:untrue")
        await it.ask(f"/consent reply {number} yes")
        later = await vote(it, "-1:untrue")
        now += 2 * DAY_MS
        await clean(it.database, it.home, Retention())
        assert await it.ask(f"/consent reply {later} yes") == say("en", "feedback.too_late")
        assert await it.count("example") == 1
        now += round(Retention().dataset_days) * DAY_MS
        await clean(it.database, it.home, Retention())
        assert await it.count("example") == 0
