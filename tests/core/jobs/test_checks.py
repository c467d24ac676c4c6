"""What happens before a job: its data is checked, a question is asked, and nothing is trained without a yes."""

from __future__ import annotations

import asyncio
import hashlib
import os
from pathlib import Path

import pytest

from core.errors import BadInput
from core.i18n.messages import Lazy, say
from core.jobs import datasets, jobs
from core.jobs.checks import CheckWorker
from core.jobs.worker import POLL_S, TrainingSettings
from core.types import Address, Handle
from tests.core.jobs.test_supervisor import PAUSED
from tests.support.fake_trainer import COMMAND as FAKE_TRAINER
from tests.support.running_jobs import WatchedBot, running_jobs
from tests.support.running_service import OWNER, STRANGER, running_service
from tests.support.waiting import DEADLINE_S

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("core.jobs.progress.SHOW_S", 0.0)


# --- the question ---


async def test_the_report_is_a_question_and_nothing_is_trained_before_its_answer(tmp_path: Path) -> None:
    async with running_jobs(tmp_path) as it:
        job_id = await it.order(agreed=False)
        said = await it.ended()
        assert (await it.job(job_id))["state"] == "waiting"
        assert not (it.folder(job_id) / "spec.json").exists()
        for fact in (
            "10 of 12",
            "line 3: not JSON",
            "a question ▶ an answer",
            "1200 tokens",
            "6 steps",
            "3 min",
            "1.5 GB",
        ):
            assert fact in said
        assert "No charge" in said
        (body,) = it.bot.final.values()
        assert [button.value for button in body.buttons] == [
            f"/finetune {word} {job_id}" for word in ("start", "preview", "cancel")
        ]


async def test_after_a_yes_it_is_trained_and_told_in_another_message(tmp_path: Path) -> None:
    async with running_jobs(tmp_path) as it:
        job_id = await it.order(agreed=False)
        await it.ended()
        assert "acme@1" in await it.say("/finetune start")
        assert say("en", "training.verdict_passed", label="acme@1", champion="base") in await it.ended(2)
        assert (await it.job(job_id))["state"] == "published"
        assert len(it.bot.opened) == 2
        with pytest.raises(BadInput):
            await it.say("/finetune start")


async def test_a_no_leaves_nothing_but_a_row(tmp_path: Path) -> None:
    async with running_jobs(tmp_path) as it:
        job_id = await it.order(agreed=False)
        await it.ended()
        await it.say("/finetune cancel")
        assert (await it.job(job_id))["state"] == "cancelled"
        assert len(it.bot.final) == 1


async def test_bad_data_ends_the_job_without_a_question(tmp_path: Path) -> None:
    async with running_jobs(tmp_path) as it:
        job_id = await it.order("yours", agreed=False)
        said = await it.ended()
        assert "line 7: a reason" in said
        assert (await it.job(job_id))["state"] == "failed"
        assert not it.folder(job_id).exists()


@pytest.mark.parametrize("word", ["mute", "crash-always"])
async def test_a_check_that_dies_is_begun_again_but_not_for_ever(tmp_path: Path, word: str) -> None:
    async with running_jobs(tmp_path) as it:
        job_id = await it.order(word, agreed=False)
        await it.ended()
        job = await it.job(job_id)
        assert (job["state"], job["attempts"]) == ("failed", 3)


async def test_a_question_is_not_asked_any_more_once_its_job_is_cancelled(tmp_path: Path) -> None:
    async with running_jobs(tmp_path) as it:
        opening, opened, open_now = asyncio.Event(), asyncio.Event(), it.bot.open

        async def open_slowly(to: Address) -> Handle:
            opening.set()
            await opened.wait()
            return await open_now(to)

        it.bot.open = open_slowly  # type: ignore[method-assign]
        job_id = await it.order(agreed=False)
        async with asyncio.timeout(DEADLINE_S):
            await opening.wait()
        await it.say(f"/finetune cancel {job_id}")
        opened.set()
        assert await it.ended() == say("en", "training.cancelled_for_good", id=job_id, title="Acme")


async def test_deaths_of_the_check_do_not_count_against_the_training(tmp_path: Path) -> None:
    async with running_jobs(tmp_path) as it:
        job_id = await it.order(agreed=False)
        await it.ended()
        await it.database.write(lambda tx: tx.run("UPDATE job SET attempts = 2"))
        await it.say(f"/finetune start {job_id}")
        assert (await it.job(job_id))["attempts"] == 0


async def test_a_check_that_is_cancelled_stops(tmp_path: Path) -> None:
    async with running_jobs(tmp_path) as it:
        job_id = await it.order("slow-check", agreed=False)
        async with asyncio.timeout(DEADLINE_S):
            while not (it.folder(job_id) / "check" / "lock").exists():  # noqa: ASYNC110 - another process makes it
                await asyncio.sleep(0.02)
        await it.say(f"/finetune cancel {job_id}")
        await it.order(place="q", agreed=False)
        await it.ended()
        assert (await it.job(job_id))["state"] == "cancelled"
        assert not it.folder(job_id).exists()


async def test_trouble_with_a_job_that_is_cancelled_is_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waited: asyncio.Queue[float] = asyncio.Queue()
    wait = CheckWorker._wait

    async def noted(lane: CheckWorker, seconds: float) -> None:
        waited.put_nowait(seconds)
        await wait(lane, seconds)

    def trouble(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(CheckWorker, "_wait", noted)
    monkeypatch.setattr(CheckWorker, "_lay_out", trouble)
    async with running_jobs(tmp_path, settings=TrainingSettings(retry_s=0.5)) as it, asyncio.timeout(DEADLINE_S):
        job_id = await it.order(agreed=False)
        while await waited.get() != 0.5:
            pass
        await it.say(f"/finetune cancel {job_id}")
        while await waited.get() != POLL_S:
            pass


async def test_the_question_survives_a_restart_and_is_asked_once(tmp_path: Path) -> None:
    bot = WatchedBot()
    async with running_jobs(tmp_path, bot=bot) as it:
        job_id = await it.order(agreed=False)
        await it.ended()
    async with running_jobs(tmp_path, bot=bot) as it:
        await it.say(f"/finetune start {job_id}")
        await it.ended(2)
        assert len(bot.opened) == 2


async def test_a_check_goes_on_beside_a_job_that_is_trained(tmp_path: Path) -> None:
    async with running_jobs(tmp_path) as it:
        await it.order("pause")
        await it.bot.until(lambda: PAUSED in it.bot.newest)
        job_id = await it.order(place="q", agreed=False)
        said = await it.ended()
        assert (await it.job(job_id))["state"] == "waiting"
        told = {"tokens": 1_200, "epochs": 2, "steps": 6, "price": Lazy("training.price_none")}
        assert say("en", "training.estimate_unmeasured", **told) in said
        await it.say(f"/finetune start {job_id}", place="q")
        assert "1" in await it.say("/finetune status", place="q")
        assert say("en", "training.state_queued_behind", before=1) in await it.say("/finetune status", place="q")


async def test_a_question_that_nobody_answers_ends_its_job_and_says_so(tmp_path: Path) -> None:
    async with running_jobs(tmp_path, settings=TrainingSettings(retry_s=0.01, ask_s=0.5)) as it:
        job_id = await it.order(agreed=False)
        await it.ended()
        await asyncio.sleep(0.6)
        it.training.wake()
        assert await it.ended(2) == say("en", "training.expired", id=job_id, title="Acme", typed="faq.jsonl")
        assert (await it.job(job_id))["reason"] == jobs.EXPIRED
        assert not it.folder(job_id).exists()


async def test_another_file_takes_the_place_of_a_question(tmp_path: Path) -> None:
    async with running_jobs(tmp_path) as it:
        first = await it.order(agreed=False)
        await it.ended()
        second = await it.order("worse", agreed=False)
        await it.ended(2)
        assert [(await it.job(one))["state"] for one in (first, second)] == ["cancelled", "waiting"]


async def test_a_data_set_that_is_erased_ends_the_question(tmp_path: Path) -> None:
    async with running_jobs(tmp_path) as it:
        job_id = await it.order(agreed=False)
        await it.ended()
        await it.database.write(lambda tx: jobs.cancel(tx, job_id, "erased"))
        it.training.wake()
        assert await it.ended(2) == say("en", "training.cancelled_erased", id=job_id, title="Acme")


# --- personal data ---


async def test_what_personal_data_was_taken_out_of_is_another_data_set(tmp_path: Path) -> None:
    async with running_jobs(tmp_path) as it:
        job_id = await it.order("personal", agreed=False)
        said = await it.ended()
        before = (await it.job(job_id))["dataset_sha256"]
        assert "phone numbers: 2" in said
        (body,) = it.bot.final.values()
        assert f"/finetune redact {job_id}" in [button.value for button in body.buttons]
        await it.say("/finetune redact")
        again = await it.ended(2)
        after = (await it.job(job_id))["dataset_sha256"]
        assert say("en", "training.redacted", n=2, sha=after[:12]) in again
        assert "phone numbers" not in again
        kept = await asyncio.to_thread((it.home.datasets / after).read_bytes)
        assert hashlib.sha256(kept).hexdigest() == after != before
        assert sorted(os.listdir(it.home.datasets)) == sorted([before, after])
        known = await it.database.read(lambda tx: tx.one("SELECT * FROM dataset WHERE sha256 = ?", [after]))
        assert known is not None
        assert (known["parent"], known["brought_by"], known["rows"]) == (before, "someone", 10)
        with pytest.raises(BadInput):
            await it.say("/finetune redact")
        await it.say("/finetune start")
        assert "acme@1" in await it.ended(3)


async def test_what_people_said_is_not_kept_once_personal_data_was_taken_out(tmp_path: Path) -> None:
    async with running_jobs(tmp_path) as it:
        job_id = await it.order("personal", agreed=False)
        await it.ended()
        before = (await it.job(job_id))["dataset_sha256"]
        await it.database.write(lambda tx: tx.run("UPDATE dataset SET source = 'feedback'"))
        await it.say("/finetune redact")
        await it.ended(2)
        after = (await it.job(job_id))["dataset_sha256"]
        assert await asyncio.to_thread(os.listdir, it.home.datasets) == [after] != [before]
        left = await asyncio.to_thread(lambda: [path.name for path in (it.folder(job_id) / "check").iterdir()])
        assert "data.jsonl" not in left
        await it.say("/finetune start")
        await it.ended(3)
        assert not await asyncio.to_thread(os.listdir, it.home.datasets)
        assert await it.database.read(lambda tx: tx.value("SELECT count(*) FROM dataset WHERE erased_ms IS NULL")) == 0


async def test_whose_words_are_in_a_data_set_is_known_of_what_is_made_of_it(tmp_path: Path) -> None:
    async with running_jobs(tmp_path, running=False) as it:
        job_id = await it.order()
        sha256 = (await it.job(job_id))["dataset_sha256"]
        await it.database.write(lambda tx: tx.run("INSERT INTO dataset_person VALUES (?, 'ann')", [sha256]))
        await it.database.write(lambda tx: datasets.keep_derived(tx, sha256, "e" * 64, size_bytes=1))
        rows = await it.database.read(lambda tx: tx.all("SELECT * FROM dataset_person ORDER BY dataset_sha256"))
        assert [row["user_hash"] for row in rows] == ["ann", "ann"]


# --- through the door ---


async def answered(
    tmp_path: Path, *words: str, user: str = OWNER, public: bool = False, second_hand: bool = False
) -> list[str]:
    """Bring a file, wait for its question, then say these words; all that was said."""
    data = b'{"word": "", "q": "a", "a": "b"}\n'
    sha256 = hashlib.sha256(data).hexdigest()
    async with running_service(tmp_path, trainer=FAKE_TRAINER) as it:
        (it.home.datasets / sha256).write_bytes(data)
        owner = await it.database.read(lambda tx: tx.cipher.hash_user("fake", "bot", OWNER))
        await it.database.write(
            lambda tx: datasets.keep_dataset(
                tx, sha256, "faq.jsonl", source="file", size_bytes=len(data), brought_by=owner
            )
        )
        await it.send("/finetune faq.jsonl", user=OWNER)
        await it.settled()
        for word in words:
            await it.send(word, user=user, public=public, second_hand=second_hand)
            await it.settled()
        return it.bot.said()


@pytest.mark.parametrize("word", ["Yes.", "好的。"])
async def test_a_plain_yes_starts_what_was_asked(tmp_path: Path, word: str) -> None:
    checking, question, answer, report = await answered(tmp_path, word)
    assert checking == say("en", "training.validating", name="faq.jsonl")
    assert "10 of 12" in question
    assert "acme@1" in answer
    assert say("en", "training.verdict_passed", label="acme@1", champion="base") in report


async def test_a_plain_no_ends_it(tmp_path: Path) -> None:
    assert (await answered(tmp_path, "no"))[-1] == say("en", "training.cancelled_for_good", id=1, title="Acme")


async def test_a_yes_of_who_may_not_is_a_message_like_any_other(tmp_path: Path) -> None:
    assert (await answered(tmp_path, "yes", user=STRANGER))[-1] == "you said yes"


async def test_where_others_talk_a_plain_word_is_no_command(tmp_path: Path) -> None:
    """In a group the bot lets only administrators give operators' commands, and "yes" may be meant for somebody."""
    assert (await answered(tmp_path, "yes", public=True))[-1] == "you said yes"
    assert "acme@1" in (await answered(tmp_path / "again", "/finetune start", public=True))[2]


async def test_a_yes_that_is_forwarded_starts_nothing(tmp_path: Path) -> None:
    assert (await answered(tmp_path, "yes", second_hand=True))[-1] == "you said yes"


async def test_a_yes_after_talk_of_something_else_is_not_taken_for_the_answer(tmp_path: Path) -> None:
    said = await answered(tmp_path, "is it warm there?", "yes")
    assert said[-2:] == ["you said is it warm there?", "you said yes"]


async def test_the_preview_shows_what_is_learned(tmp_path: Path) -> None:
    shown = (await answered(tmp_path, "/finetune preview"))[-1]
    assert "<user>a question<assistant>▶an answer<end>◀" in shown


async def test_status_of_a_question_asks_again(tmp_path: Path) -> None:
    said = await answered(tmp_path, "/finetune status")
    assert said[1] in said[2]
