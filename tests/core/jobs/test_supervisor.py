"""Jobs, over real trainer processes: what is published, what is said, and what every way of ending leaves."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import json
import os
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from core.adapters import folders, registry
from core.adapters.folders import Candidate
from core.channels import adapter_names
from core.config.sections import HyperParameters
from core.delivery.deliveries import Deliveries
from core.errors import AdapterUnusable, BadInput
from core.i18n.messages import Lazy, say
from core.jobs import datasets, event_log, jobs
from core.jobs.process import COMMAND, TrainerProcess, environment
from core.jobs.protocol import Alive, JobEvent, Progress, Spec, Warned, dump_event
from core.jobs.supervisor import TrainingWorker
from core.jobs.worker import TrainingSettings
from core.platform import Unreachable
from core.privacy.retention import sweep
from core.storage.database import Tx
from core.storage.home import Home
from core.types import Address, Handle
from tests.support.fake_trainer import COMMAND as FAKE_TRAINER
from tests.support.running_jobs import INFO, WatchedBot, running_jobs
from tests.support.running_service import OWNER, running_service
from tests.support.waiting import DEADLINE_S

pytestmark = pytest.mark.slow

PAUSED = "50 %"  # what the message shows when the fake trainer waits at its second step of four


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Show all, at once."""
    monkeypatch.setattr("core.jobs.progress.SHOW_S", 0.0)


# --- the whole way ---


async def test_a_job_becomes_a_version_and_its_one_message_a_report(tmp_path: Path) -> None:
    async with running_jobs(tmp_path) as it:
        job_id = await it.order()
        said = await it.ended()
        (version,) = await it.versions()
        job = await it.job(job_id)
        assert (job["state"], job["result"], job["reason"]) == ("published", version["sha256"], "")
        assert (version["name"], version["version"]) == ("acme", 1)
        await asyncio.to_thread(folders.inspect, it.home.adapters / version["sha256"])
        assert len(it.bot.opened) == 1
        for fact in ("acme@1", "10 of 12", "line 3: not JSON", "2.50 (base) → 1.50", "/adapter promote acme@1"):
            assert fact in said
        assert await it.database.read(lambda tx: adapter_names.champion(tx, "acme")) == (None, "base")


async def test_through_the_door_a_command_is_answered_and_its_job_tells_its_end(tmp_path: Path) -> None:
    data = b'{"word": "", "q": "a", "a": "b"}\n'
    sha256 = hashlib.sha256(data).hexdigest()

    def bring(tx: Tx) -> None:
        owner = tx.cipher.hash_user("fake", "bot", OWNER)
        datasets.keep_dataset(tx, sha256, "faq.jsonl", source="file", size_bytes=len(data), brought_by=owner)

    async with running_service(tmp_path, trainer=FAKE_TRAINER) as it:
        (it.home.datasets / sha256).write_bytes(data)
        await it.database.write(bring)
        await it.send("/finetune faq.jsonl yes", user=OWNER)
        await it.settled()
        answer, report = it.bot.said()
        assert "acme@1" in answer
        assert say("en", "training.verdict_passed", label="acme@1", champion="base") in report
        assert "acme@1" in await it.ask("/adapter promote acme@1", user=OWNER)
        assert await it.ask("/finetune faq.jsonl") == say("en", "error.not_allowed")


async def test_the_message_shows_a_bar_and_what_is_left(tmp_path: Path) -> None:
    async with running_jobs(tmp_path) as it:
        await it.order("pause")
        await it.bot.until(lambda: PAUSED in it.bot.newest)
        assert "▓" * 10 + "░" * 10 in it.bot.newest
        assert "2 min" in it.bot.newest
        assert "3.00 → 1.50" in it.bot.newest


async def test_the_report_speaks_the_language_of_who_asked(tmp_path: Path) -> None:
    async with running_jobs(tmp_path) as it:
        await it.order(language="zh")
        assert say("zh", "training.verdict_passed", label="acme@1", champion="base") in await it.ended()


@pytest.mark.parametrize(("word", "verdict"), [("worse", "no_better"), ("few", "too_few")])
async def test_a_version_that_does_not_pass_is_kept_and_said_to_be_so(tmp_path: Path, word: str, verdict: str) -> None:
    async with running_jobs(tmp_path) as it:
        await it.order(word)
        said = await it.ended()
        assert said.startswith(
            say("en", f"training.verdict_{verdict}", label="acme@1", champion="base", rows=40, fewest=30)
        )
        (body,) = it.bot.final.values()
        pressed = ["/adapter compare acme@1", "/adapter promote acme@1", "/adapter discard acme@1"]
        if word == "worse":
            pressed[0] = "/adapter worst acme@1"
        assert [button.value for button in body.buttons] == pressed
        assert body.buttons[1].text == say("en", "adapter.anyway_button")
        assert len(await it.versions()) == 1


async def test_a_candidate_has_to_beat_what_answers_now(tmp_path: Path) -> None:
    async with running_jobs(tmp_path) as it:
        await it.order()
        await it.ended()
        (first,) = await it.versions()
        await it.database.write(lambda tx: registry.promote(tx, "acme", first["sha256"], "owner", ""))
        job_id = await it.order("pause")
        await it.bot.until(lambda: PAUSED in it.bot.newest)
        spec = await asyncio.to_thread(Spec.read, it.folder(job_id))
        assert (Path(spec.champion), spec.champion_label) == (it.home.adapters / first["sha256"], "acme@1")


async def test_nothing_that_holds_text_outlives_its_job(tmp_path: Path) -> None:
    async with running_jobs(tmp_path) as it:
        job_id = await it.order()
        await it.ended()
        assert not it.folder(job_id).exists()
        kinds = await it.database.read(lambda tx: tx.all("SELECT kind FROM job_event ORDER BY seq"))
        assert {row["kind"] for row in kinds} == {
            "checked",
            "progress",
            "evaluated",
            "judged",
            "finished",
            "publishing",
        }


async def test_a_job_that_was_cancelled_goes_on_from_its_checkpoint_in_another_message(tmp_path: Path) -> None:
    async with running_jobs(tmp_path) as it:
        job_id = await it.order("pause")
        await it.bot.until(lambda: PAUSED in it.bot.newest)
        await it.say(f"/finetune cancel {job_id}")
        assert "/finetune resume" in await it.ended()
        kept = await asyncio.to_thread(lambda: sorted(path.name for path in it.folder(job_id).iterdir()))
        assert kept == ["checkpoint", "spec.json"]
        await sweep(it.database, it.home)
        assert it.folder(job_id).exists()
        await it.say(f"/finetune resume {job_id}")
        assert "acme@1" in await it.ended(2)
        assert await it.warned(job_id) == ["goes on from step 2"]
        assert len(await it.versions()) == 1
        assert len(it.bot.opened) == 2
        assert not it.folder(job_id).exists()
        with pytest.raises(BadInput, match=r"not_resumable"):
            await it.say(f"/finetune resume {job_id}")


@pytest.mark.parametrize("base", ["f" * 64, "e" * 64], ids=["same", "another"])
async def test_a_job_goes_on_as_it_was_begun_unless_another_base_model_is_loaded(
    tmp_path: Path, base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[Spec] = []
    monkeypatch.setattr(
        Spec, "write", lambda spec, folder, whole=Spec.write: (written.append(spec), whole(spec, folder))
    )
    bot = WatchedBot()
    async with running_jobs(tmp_path, bot=bot) as it:
        job_id = await it.order("pause")
        await bot.until(lambda: PAUSED in bot.newest)
        await it.say(f"/finetune cancel {job_id}")
        await it.ended()
        await it.database.write(lambda tx: tx.run("UPDATE channel SET instructions = 'Be brief.'"))
    settings = TrainingSettings(retry_s=0.01, hyper=HyperParameters(epochs=9))
    async with running_jobs(tmp_path, bot=bot, settings=settings, info=replace(INFO, fingerprint=base)) as it:
        await it.say(f"/finetune resume {job_id}")
        await it.ended(2)
        told = await it.database.read(lambda tx: event_log.events(tx, job_id))
    begun, resumed = written
    first = next(event.step for event in told if isinstance(event, Progress))
    assert first == (1 if base == begun.fingerprint else 3)  # of the life before only where it goes on
    if base == begun.fingerprint:
        assert resumed == begun
    else:
        assert (resumed.fingerprint, resumed.instructions, resumed.hyper.epochs) == (base, "Be brief.", 9)


@pytest.mark.parametrize("word", ["pause", "stubborn"])
async def test_a_job_that_is_to_go_on_before_its_trainer_is_gone_goes_on_in_another_message(
    tmp_path: Path, word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("core.jobs.worker._CANCEL_S", 0.2 if word == "stubborn" else 10.0)
    monkeypatch.setattr("core.jobs.process._TERMINATE_S", 0.2)
    async with running_jobs(tmp_path) as it:
        job_id = await it.order(word)
        await it.bot.until(lambda: PAUSED in it.bot.newest)
        await it.say(f"/finetune cancel {job_id}")
        await it.say(f"/finetune resume {job_id}")
        assert "acme@1" in await it.ended()
        assert (await it.job(job_id))["state"] == "published"
        assert await it.warned(job_id) == ["goes on from step 2"]
        assert len(it.bot.opened) == 2


@pytest.mark.parametrize("word", ["pause", "ours-once"])
async def test_what_a_job_has_learned_goes_with_its_data_set(tmp_path: Path, word: str) -> None:
    async with running_jobs(tmp_path) as it:
        job_id = await it.order(word)
        if word == "pause":
            await it.bot.until(lambda: PAUSED in it.bot.newest)
            await it.say(f"/finetune cancel {job_id}")
        await it.ended()
        assert it.folder(job_id).exists()
        await it.database.write(lambda tx: tx.run("UPDATE dataset SET erased_ms = 1"))
        await sweep(it.database, it.home)
        assert not it.folder(job_id).exists()
        assert "/finetune resume" not in await it.say(f"/finetune status {job_id}")
        with pytest.raises(BadInput, match=r"not_resumable"):
            await it.say(f"/finetune resume {job_id}")


@pytest.mark.parametrize(("word", "language"), [("crash-once", "en"), ("ours-once", "zh")])
async def test_a_job_that_failed_on_our_side_goes_on_from_its_checkpoint(
    tmp_path: Path, word: str, language: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("core.jobs.worker._ATTEMPTS", 1)
    async with running_jobs(tmp_path) as it:
        job_id = await it.order(word, language=language)
        reason = "a reason"
        if word == "crash-once":
            how = Lazy("training.by_signal", n=9)
            reason = say(language, "training.why_died", n=1, how=how)
        assert await it.ended() == say(language, "training.failed_kept", title="Acme", id=job_id, reason=reason)
        assert sorted(await asyncio.to_thread(os.listdir, it.folder(job_id))) == ["checkpoint", "spec.json"]
        await sweep(it.database, it.home)
        await it.say(f"/finetune resume {job_id}")
        assert "acme@1" in await it.ended(2)
        assert await it.warned(job_id) == ["goes on from step 2"]
        assert len(await it.versions()) == 1
        assert not it.folder(job_id).exists()


@pytest.mark.parametrize("trouble", ["trainer", "base", "folder"])
async def test_trouble_at_a_later_start_costs_nothing_that_was_learned(
    tmp_path: Path, trouble: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    bot = WatchedBot()
    async with running_jobs(tmp_path, bot=bot) as it:
        job_id = await it.order("pause")
        await bot.until(lambda: PAUSED in bot.newest)
        await it.stop()
    with monkeypatch.context() as patch:
        if trouble == "folder":
            patch.setattr(Spec, "write", refused)
            patch.setattr(Path, "unlink", refused)
        command = {"trainer": ("/nowhere/python",), "base": COMMAND}.get(trouble, FAKE_TRAINER)
        async with running_jobs(tmp_path, bot=bot, command=command) as it:
            assert f"/finetune resume {job_id}" in await it.ended()
            assert (await it.job(job_id))["state"] == "failed"
    async with running_jobs(tmp_path, bot=bot) as it:
        await it.say(f"/finetune resume {job_id}")
        await it.ended(2)
        assert await it.warned(job_id) == ["goes on from step 2"]


@pytest.mark.parametrize("word", ["ours", "lost"])
async def test_a_job_that_learned_nothing_of_use_is_not_said_to_go_on(tmp_path: Path, word: str) -> None:
    async with running_jobs(tmp_path) as it:
        job_id = await it.order(word)
        assert "/finetune resume" not in await it.ended()
        assert not it.folder(job_id).exists()
        with pytest.raises(BadInput, match=r"not_resumable"):
            await it.say(f"/finetune resume {job_id}")


async def test_nothing_is_kept_of_a_job_that_failed_to_learn_what_people_said(tmp_path: Path) -> None:
    async with running_jobs(tmp_path, running=False) as it:
        job_id = await it.order("ours-once")
        await it.database.write(lambda tx: tx.run("UPDATE dataset SET source = 'feedback'"))
        await it.run()
        assert "/finetune resume" not in await it.ended()
        assert not it.folder(job_id).exists()
        assert not os.listdir(it.home.datasets)


@pytest.mark.parametrize(
    ("where", "at"), [(TrainingWorker, "_clear"), (TrainingWorker, "_send_final"), (Deliveries, "open")]
)
async def test_a_job_that_is_to_go_on_before_its_end_is_told_loses_nothing(
    tmp_path: Path, where: type, at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running_jobs(tmp_path) as it:
        usual, said = getattr(where, at), list[str]()

        async def hurried(*given: object) -> object:
            done = await usual(*given) if at == "open" else None
            if not said and (await it.job(1))["state"] == "failed":
                said.append(await it.say("/finetune resume 1"))
            return done or await usual(*given)

        monkeypatch.setattr(where, at, hurried)
        job_id = await it.order("ours-once")
        assert "acme@1 is ready" in (await it.ended()).replace("**", "")
        assert await it.warned(job_id) == ["goes on from step 2"]
        assert (await it.job(job_id))["state"] == "published"


async def test_the_instructions_of_the_channel_are_in_the_spec(tmp_path: Path) -> None:
    async with running_jobs(tmp_path) as it:
        await it.database.write(lambda tx: tx.run("UPDATE channel SET instructions = 'Be brief.'"))
        job_id = await it.order("pause")
        await it.bot.until(lambda: PAUSED in it.bot.newest)
        spec = await asyncio.to_thread(Spec.read, it.folder(job_id))
        assert (spec.instructions, spec.label, spec.fingerprint) == ("Be brief.", "acme@1", "f" * 64)
        assert spec.data == "data.jsonl"


async def test_the_preset_of_the_job_is_in_the_spec(tmp_path: Path) -> None:
    settings = TrainingSettings(retry_s=0.01, presets={"card": HyperParameters(preset="card", learning_rate=1e-4)})
    async with running_jobs(tmp_path, settings=settings, running=False) as it:
        job_id = await it.order("pause")
        await it.database.write(lambda tx: tx.run("UPDATE job SET preset = 'card'"))
        await it.run()
        await it.bot.until(lambda: PAUSED in it.bot.newest)
        spec = await asyncio.to_thread(Spec.read, it.folder(job_id))
        assert spec.hyper == settings.presets["card"]


async def test_versions_are_counted_on_over_jobs_that_failed(tmp_path: Path) -> None:
    async with running_jobs(tmp_path) as it:
        for n, word in enumerate(("ours", "", "worse"), 1):
            await it.order(word)
            await it.ended(n)
        assert [(row["name"], row["version"]) for row in await it.versions()] == [("acme", 2), ("acme", 3)]


# --- trainers that die ---


@pytest.mark.parametrize("word", ["crash-once", "gives-up"])
async def test_a_trainer_that_dies_goes_on_from_its_checkpoint(tmp_path: Path, word: str) -> None:
    async with running_jobs(tmp_path) as it:
        job_id = await it.order(word)
        await it.ended()
        assert await it.warned(job_id) == ["goes on from step 2"]
        assert len(await it.versions()) == 1


async def test_a_trainer_that_is_killed_from_outside_goes_on(tmp_path: Path) -> None:
    async with running_jobs(tmp_path) as it:
        job_id = await it.order("pause")
        await it.bot.until(lambda: PAUSED in it.bot.newest)
        os.kill(trainer_of(it.folder(job_id)), signal.SIGKILL)
        await it.ended()
        assert await it.warned(job_id) == ["goes on from step 2"]
        assert len(await it.versions()) == len(it.bot.opened) == 1


@pytest.mark.parametrize(("word", "how"), [("crash-always", "signal 9"), ("mute", "exit status 1")])
async def test_a_trainer_that_always_dies_without_progress_fails_the_job(tmp_path: Path, word: str, how: str) -> None:
    async with running_jobs(tmp_path) as it:
        job_id = await it.order(word)
        said = await it.ended()
        job = await it.job(job_id)
        assert (job["state"], job["attempts"]) == ("failed", 3)
        assert how in job["reason"]
        assert str(job_id) in said
        assert not it.folder(job_id).exists()


async def test_a_silent_trainer_is_killed_and_begun_anew(tmp_path: Path) -> None:
    async with running_jobs(tmp_path, settings=TrainingSettings(silence_s=4.0, retry_s=0.01)) as it:
        await it.order("silent")
        assert "acme@1" in await it.ended()
        assert len(await it.versions()) == 1


async def ran(tmp_path: Path, program: str, *, silence_s: float, pause_s: float = 0.0) -> tuple[int, list[JobEvent]]:
    """Run this program as a trainer; it is paused for a while after its first event."""
    heard: list[JobEvent] = []
    command = (sys.executable, "-c", f"import time\n{program}")
    trainer = TrainerProcess(tmp_path, tmp_path / "log", command=command, silence_s=silence_s)

    async def on_event(event: JobEvent) -> None:
        heard.append(event)
        if pause_s:
            trainer.pause()
            asyncio.get_running_loop().call_later(pause_s, trainer.resume)

    return await trainer.run(on_event), heard


async def test_signs_of_life_keep_a_trainer_that_has_nothing_else_to_say(tmp_path: Path) -> None:
    alive = f"for _ in range(20):\n time.sleep(0.25)\n print({dump_event(Alive())!r}, flush=True)"
    assert await ran(tmp_path, alive, silence_s=4.0) == (0, [])


async def test_a_pause_is_not_counted_as_silence(tmp_path: Path) -> None:
    said = dump_event(Warned("here"))
    assert await ran(tmp_path, f"print({said!r}, flush=True)\ntime.sleep(0.5)", silence_s=4.0, pause_s=4.5) == (
        0,
        [Warned("here")],
    )
    status, _ = await ran(tmp_path, f"print({said!r}, flush=True)\ntime.sleep(60)", silence_s=1.0, pause_s=0.2)
    assert status == -signal.SIGKILL  # it is silent while it may speak


async def test_lines_that_are_no_events_are_passed_over(tmp_path: Path) -> None:
    async with running_jobs(tmp_path) as it:
        await it.order("garbage")
        await it.ended()
        assert len(await it.versions()) == 1


async def test_a_trainer_of_an_earlier_life_is_waited_for(tmp_path: Path) -> None:
    async with running_jobs(tmp_path) as it:
        job_id = await it.order("keeps-lock")
        await it.ended()
        assert (await it.job(job_id))["state"] == "published"  # a trainer that meets the lock fails


async def test_a_trainer_that_cannot_be_started_fails_its_job_alone(tmp_path: Path) -> None:
    async with running_jobs(tmp_path, command=("/nowhere/python",)) as it:
        job_id = await it.order()
        await it.ended()
        job = await it.job(job_id)
        assert job["state"] == "failed"
        assert "cannot be started" in job["reason"]


async def test_an_engine_without_a_base_model_says_so(tmp_path: Path) -> None:
    async with running_jobs(tmp_path, command=COMMAND) as it:
        job_id = await it.order()
        await it.ended()
        assert "no base model" in (await it.job(job_id))["reason"]


# --- whose fault ---


async def test_what_is_wrong_with_the_data_is_said_with_its_line(tmp_path: Path) -> None:
    async with running_jobs(tmp_path) as it:
        job_id = await it.order("yours")
        said = await it.ended()
        assert "faq.jsonl" in said
        assert "line 7: a reason" in said
        assert (await it.job(job_id))["reason"] == "yours: line 7: a reason"
        assert not await it.versions()


async def test_what_is_wrong_with_us_is_said_with_the_number_of_the_job(tmp_path: Path) -> None:
    async with running_jobs(tmp_path) as it:
        job_id = await it.order("ours")
        said = await it.ended()
        assert said == say("en", "training.failed_ours", title="Acme", id=job_id, typed="faq.jsonl", reason="a reason")


@pytest.mark.parametrize(
    ("word", "reason"),
    [("other-base", "another base model"), ("other-data", "another data set"), ("no-weights", "incomplete or damaged")],
)
async def test_a_result_that_does_not_fit_is_never_published(tmp_path: Path, word: str, reason: str) -> None:
    async with running_jobs(tmp_path) as it:
        job_id = await it.order(word)
        await it.ended()
        assert reason in (await it.job(job_id))["reason"]
        assert not await it.versions()
        assert not os.listdir(it.home.adapters)
        assert it.folder(job_id).exists() == (word == "no-weights")  # resumable: the disk may be at fault


@pytest.mark.parametrize("step", ["inspect", "place"])
async def test_trouble_with_the_disk_costs_no_result(
    tmp_path: Path, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual, left = getattr(folders, step), [10 if step == "place" else 2]

    def troubled(*given: object) -> object:
        left[0] -= 1
        if left[0] < 0:
            return usual(*given)
        error = OSError(errno.ENOSPC if step == "place" else errno.EMFILE, "trouble")
        if step == "place":
            raise error
        raise AdapterUnusable(detail="out: trouble", label="out") from error

    monkeypatch.setattr(folders, step, troubled)
    monkeypatch.setattr("core.jobs.worker._LONGEST_BACKOFF_S", 0.02)
    async with running_jobs(tmp_path) as it:
        job_id = await it.order()
        await it.ended()
        assert (await it.job(job_id))["state"] == "published"


async def test_a_data_set_that_is_gone_fails_its_job(tmp_path: Path) -> None:
    async with running_jobs(tmp_path, running=False) as it:
        job_id = await it.order()
        for path in await asyncio.to_thread(lambda: list(it.home.datasets.iterdir())):
            path.unlink()
        await it.run()
        await it.ended()
        assert "is gone" in (await it.job(job_id))["reason"]


async def test_a_reason_of_ours_is_in_the_language_of_who_asked(tmp_path: Path) -> None:
    async with running_jobs(tmp_path, command=("/nowhere/python",)) as it:
        await it.order(language="zh")
        assert "训练程序无法启动：" in await it.ended()


async def test_a_result_that_cannot_be_used_is_told_in_the_language_of_who_asked(tmp_path: Path) -> None:
    async with running_jobs(tmp_path) as it:
        job_id = await it.order("no-weights", language="zh")
        reason = say("zh", "training.why_result")
        said = say("zh", "training.failed_kept", title="Acme", id=job_id, reason=reason)
        assert await it.ended() == said


# --- cancelling, stopping, restarting ---


@pytest.mark.parametrize("word", ["pause", "stubborn"])
async def test_a_running_job_that_is_cancelled_ends_its_trainer(
    tmp_path: Path, word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("core.jobs.worker._CANCEL_S", 0.2 if word == "stubborn" else 10.0)
    monkeypatch.setattr("core.jobs.process._TERMINATE_S", 0.2)
    async with running_jobs(tmp_path) as it:
        job_id = await it.order(word)
        await it.bot.until(lambda: PAUSED in it.bot.newest)
        process = trainer_of(it.folder(job_id))
        await it.database.write(lambda tx: jobs.cancel(tx, job_id, jobs.REQUESTED))
        it.training.wake()
        assert await it.ended() == say("en", "training.cancelled", id=job_id, title="Acme")
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)
        assert not await it.versions()
        assert sorted(await asyncio.to_thread(os.listdir, it.folder(job_id))) == ["checkpoint", "spec.json"]


async def test_a_job_that_is_cancelled_while_it_waits_never_begins(tmp_path: Path) -> None:
    async with running_jobs(tmp_path, running=False) as it:
        job_id = await it.order()
        await it.database.write(lambda tx: jobs.cancel(tx, job_id, jobs.REQUESTED))
        await it.run()
        await it.order("worse", place="q")
        await it.ended()
        assert len(it.bot.opened) == 1
        assert not await it.warned(job_id)


async def test_a_job_whose_data_is_erased_says_why_it_ended(tmp_path: Path) -> None:
    async with running_jobs(tmp_path, running=False) as it:
        job_id = await it.order()
        await it.database.write(lambda tx: jobs.cancel(tx, job_id, "erased"))
        await it.run()
        assert await it.ended() == say("en", "training.cancelled_erased", id=job_id, title="Acme")


async def test_at_the_programs_end_the_trainer_stops_and_the_next_start_goes_on(tmp_path: Path) -> None:
    bot = WatchedBot()
    async with running_jobs(tmp_path, bot=bot) as it:
        job_id = await it.order("pause")
        await bot.until(lambda: PAUSED in bot.newest)
        await it.stop()
        assert (await it.job(job_id))["state"] == "running"
        assert not bot.final
    async with running_jobs(tmp_path, bot=bot) as it:
        await it.ended()
        assert await it.warned(job_id) == ["goes on from step 2"]
        assert len(await it.versions()) == len(bot.opened) == 1


async def test_a_resumed_job_survives_a_cut_while_its_data_is_laid_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bot, cut, copy = WatchedBot(), asyncio.Event(), shutil.copyfile
    loop = asyncio.get_running_loop()

    def half(source: Path, target: Path) -> None:
        Path(target).write_bytes(Path(source).read_bytes()[:5])
        loop.call_soon_threadsafe(cut.set)
        raise ZeroDivisionError

    async with running_jobs(tmp_path, bot=bot, settings=TrainingSettings(retry_s=60)) as it:
        job_id = await it.order("pause")
        await bot.until(lambda: PAUSED in bot.newest)
        await it.say(f"/finetune cancel {job_id}")
        await it.ended()
        monkeypatch.setattr(shutil, "copyfile", half)
        await it.say(f"/finetune resume {job_id}")
        async with asyncio.timeout(DEADLINE_S):
            await cut.wait()
    monkeypatch.setattr(shutil, "copyfile", copy)
    async with running_jobs(tmp_path, bot=bot) as it:
        spec = Spec.read(it.folder(job_id))
        assert not (it.folder(job_id) / spec.data).exists()
        await it.ended(2)
        assert await it.warned(job_id) == ["goes on from step 2"]


async def test_a_full_disk_costs_a_resumed_job_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bot, full, copy = WatchedBot(), asyncio.Event(), shutil.copyfile
    loop = asyncio.get_running_loop()

    def no_room(*_: object) -> None:
        loop.call_soon_threadsafe(full.set)
        raise OSError(errno.ENOSPC, "No space left on device")

    async with running_jobs(tmp_path, bot=bot) as it:
        job_id = await it.order("pause")
        await bot.until(lambda: PAUSED in bot.newest)
        await it.say(f"/finetune cancel {job_id}")
        await it.ended()
        monkeypatch.setattr(shutil, "copyfile", no_room)
        await it.say(f"/finetune resume {job_id}")
        async with asyncio.timeout(DEADLINE_S):
            await full.wait()
        monkeypatch.setattr(shutil, "copyfile", copy)
        await it.ended(2)
        assert await it.warned(job_id) == ["goes on from step 2"]


@pytest.mark.parametrize("trained", [False, True], ids=["in the middle", "before it was published"])
async def test_a_start_with_another_base_model_begins_a_running_job_anew(
    tmp_path: Path, trained: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    bot = WatchedBot()
    with monkeypatch.context() as patch:
        if trained:
            patch.setattr(jobs, "publishing", lambda *_: 1 / 0)
        async with running_jobs(tmp_path, bot=bot, settings=TrainingSettings(retry_s=60)) as it:
            job_id = await it.order("" if trained else "pause")
            await bot.until(lambda: trained or PAUSED in bot.newest)
            while trained and not (it.folder(job_id) / "out").exists():  # noqa: ASYNC110 - another process makes it
                await asyncio.sleep(0.02)
            await it.stop()
    other = replace(INFO, fingerprint="e" * 64, folder=tmp_path / "other", device="cuda:1")
    async with running_jobs(tmp_path, bot=bot, info=other) as it:
        await it.ended()
        assert (await it.job(job_id))["state"] == "published"
        base = await it.database.read(lambda tx: tx.value("SELECT base_fingerprint FROM adapter"))
        assert base == other.fingerprint


async def test_a_job_finds_its_base_model_where_it_lies_now(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bot = WatchedBot()
    async with running_jobs(tmp_path, bot=bot) as it:
        job_id = await it.order("pause")
        await bot.until(lambda: PAUSED in bot.newest)
        await it.stop()
        begun = Spec.read(it.folder(job_id))
    started: list[Spec] = []
    spawn = TrainerProcess._spawn

    async def noted(trainer: TrainerProcess) -> object:
        started.append(Spec.read(trainer._folder))
        return await spawn(trainer)

    monkeypatch.setattr(TrainerProcess, "_spawn", noted)
    async with running_jobs(tmp_path, bot=bot, info=replace(INFO, folder=tmp_path / "moved")) as it:
        await it.ended()
    assert started == [replace(begun, model=str(tmp_path / "moved"))]


async def test_when_the_program_is_killed_the_next_start_goes_on(tmp_path: Path) -> None:
    bot = WatchedBot()
    async with running_jobs(tmp_path, bot=bot) as it:
        await it.order("pause")
        await bot.until(lambda: PAUSED in bot.newest)
        await it.kill()
    async with running_jobs(tmp_path, bot=bot) as it:
        await it.ended()
        assert len(await it.versions()) == len(bot.opened) == 1


async def test_a_crash_between_move_and_commit_is_mended_at_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bot = WatchedBot()
    crashed = asyncio.Event()
    loop = asyncio.get_running_loop()

    def crash(tx: Tx, candidate: Candidate, name: str, version: int) -> None:
        loop.call_soon_threadsafe(crashed.set)
        raise ZeroDivisionError

    with monkeypatch.context() as patch:
        patch.setattr(registry, "publish", crash)
        async with running_jobs(tmp_path, bot=bot, settings=TrainingSettings(retry_s=60)) as it:
            job_id = await it.order()
            async with asyncio.timeout(DEADLINE_S):
                await crashed.wait()
            await it.stop()
            assert (await it.job(job_id))["state"] == "publishing"
            assert len(os.listdir(it.home.adapters)) == 1
            assert not await it.versions()
    async with running_jobs(tmp_path, bot=bot, command=("/nowhere",)) as it:  # no trainer is needed any more
        await it.ended()
        (version,) = await it.versions()
        assert (await it.job(job_id))["result"] == version["sha256"]
        assert len(bot.opened) == 1


async def test_a_crash_before_the_move_is_mended_without_training_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bot = WatchedBot()
    crashed = asyncio.Event()
    loop = asyncio.get_running_loop()

    def crash(home: Home, candidate: Candidate) -> Path:
        loop.call_soon_threadsafe(crashed.set)
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(folders, "place", crash)
        async with running_jobs(tmp_path, bot=bot, settings=TrainingSettings(retry_s=60)) as it:
            job_id = await it.order()
            async with asyncio.timeout(DEADLINE_S):
                await crashed.wait()
    async with running_jobs(tmp_path, bot=bot) as it:
        await it.ended()
        assert not await it.warned(job_id)  # nothing was trained again
        assert len(await it.versions()) == 1


async def test_a_placed_folder_that_was_damaged_is_not_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bot = WatchedBot()
    crashed = asyncio.Event()
    loop = asyncio.get_running_loop()

    def crash(tx: Tx, candidate: Candidate, name: str, version: int) -> None:
        loop.call_soon_threadsafe(crashed.set)
        raise ZeroDivisionError

    with monkeypatch.context() as patch:
        patch.setattr(registry, "publish", crash)
        async with running_jobs(tmp_path, bot=bot, settings=TrainingSettings(retry_s=60)) as it:
            await it.order()
            async with asyncio.timeout(DEADLINE_S):
                await crashed.wait()
    (folder,) = (tmp_path / "adapters").iterdir()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2}))
    async with running_jobs(tmp_path, bot=bot) as it:
        await it.ended()
        assert not await it.versions()
        assert not folder.exists()


# --- what a job waits for, and what does not wait for it ---


async def test_a_job_waits_for_the_bot_of_its_place_and_others_do_not(tmp_path: Path) -> None:
    async with running_jobs(tmp_path, running=False) as it:
        first = await it.order()
        await it.database.write(lambda tx: tx.run("UPDATE job SET account = 'another'"))
        second = await it.order("worse", place="q")
        await it.run()
        await it.ended()
        assert (await it.job(second))["state"] == "published"
        assert (await it.job(first))["state"] == "queued"
        it.deliveries.register("fake", "another", it.bot)
        it.training.wake()
        await it.ended(2)
        assert (await it.job(first))["state"] == "published"


class DeafBot(WatchedBot):
    """Can open nothing at the first place, for so many calls."""

    def __init__(self, faults: int) -> None:
        super().__init__()
        self.open_faults = faults

    async def open(self, to: Address) -> Handle:
        if self.open_faults and to.place == "p":
            self.open_faults -= 1
            async with self.changed:
                self.changed.notify_all()
            raise ConnectionError("the platform is away")
        return await super().open(to)


async def test_a_platform_that_is_away_does_not_fail_the_job(tmp_path: Path) -> None:
    async with running_jobs(tmp_path, bot=DeafBot(4)) as it:
        job_id = await it.order()
        await it.ended()
        assert (await it.job(job_id))["state"] == "published"
        assert len(it.bot.opened) == 1


async def test_a_message_that_is_never_taken_is_given_up_and_holds_up_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("core.jobs.worker._TRIES", 3)
    monkeypatch.setattr("core.delivery.retry._FIRST_PAUSE_S", 100)  # one attempt to open the progress message
    bot = DeafBot(4)  # once at the beginning, then each try of the end
    async with running_jobs(tmp_path, bot=bot, running=False) as it:
        await it.order()
        await it.order("worse", place="q")
        await it.run()
        await it.ended()
        await bot.until(lambda: not bot.open_faults)
        await it.stop()
        rows = await it.database.read(
            lambda tx: tx.all("SELECT job.state, delivery.state AS told FROM job JOIN delivery ON job_id = job.id")
        )
        assert rows == [{"state": "published", "told": "failed"}, {"state": "published", "told": "done"}]


class GoneBot(DeafBot):
    """Its first place does not exist any more."""

    async def open(self, to: Address) -> Handle:
        try:
            return await super().open(to)
        except ConnectionError as error:
            raise Unreachable(detail="the place is gone") from error


async def test_the_message_to_a_place_that_is_gone_is_given_up_at_once(tmp_path: Path) -> None:
    async with running_jobs(tmp_path, bot=GoneBot(99), running=False) as it:
        job_id = await it.order()
        await it.order("worse", place="q")
        await it.run()
        await it.ended()
        assert await it.database.read(lambda tx: jobs.is_delivered(tx, job_id))
        assert (await it.job(job_id))["state"] == "published"
        assert it.bot.open_faults == 99 - 2  # for the progress, and for the report


async def test_a_job_that_makes_trouble_does_not_hold_up_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Spec.write

    def write(spec: Spec, folder: Path) -> None:
        if spec.job == "1":
            raise ZeroDivisionError
        whole(spec, folder)

    monkeypatch.setattr(Spec, "write", write)
    async with running_jobs(tmp_path, running=False, settings=TrainingSettings(retry_s=60)) as it:
        first = await it.order()
        second = await it.order("worse", place="q")
        await it.run()
        await it.bot.until(lambda: len(it.bot.final) == 1)
        assert (await it.job(first))["state"] == "running"
        assert (await it.job(second))["state"] == "published"


# --- what a trainer may know ---


async def test_no_secret_reaches_the_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TELEGRAM_TOKEN", "SLACK_BOT_TOKEN", "DISTRIBUTARY_HOME", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "secret")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    async with running_jobs(tmp_path) as it:
        job_id = await it.order("environment")
        await it.ended()
        known = set((await it.warned(job_id))[0].split())
        assert {"PATH", "OMP_NUM_THREADS", "PYTHONPATH"} <= known
        assert not {name for name in known if "TOKEN" in name or "SECRET" in name or "DISTRIBUTARY" in name}


def test_the_environment_is_a_list_of_what_may_pass() -> None:
    given = {
        "PATH": "/bin",
        "LC_ALL": "C",
        "CUDA_VISIBLE_DEVICES": "0",
        "X": "y",
        "HF_TOKEN": "t",
        "PYTHONPATH": "/evil",
    }
    passed = environment(given)
    assert {name: passed[name] for name in ("PATH", "LC_ALL", "CUDA_VISIBLE_DEVICES")} == {
        "PATH": "/bin",
        "LC_ALL": "C",
        "CUDA_VISIBLE_DEVICES": "0",
    }
    assert passed["PYTHONPATH"] != "/evil"
    assert not {"X", "HF_TOKEN"} & set(passed)


def trainer_of(folder: Path) -> int:
    """The process that works on this job folder."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if str(folder).encode() in words and sys.executable.encode() in words:
                return int(entry.name)
    raise AssertionError("no trainer is at work")
