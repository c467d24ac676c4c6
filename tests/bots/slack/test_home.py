"""The App Home and its modals: what each person sees there, and what they can change by it."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from bots.slack.pages.modals import MAX_INSTRUCTIONS, Submission, submission
from bots.slack.pages.text import spelled
from core.channels import directory
from core.commands.parser import parse
from core.config.schema import channel_keys
from core.i18n.messages import say
from core.storage.database import Tx
from core.types import Limits
from tests.bots.slack.talk import Talk, talk
from tests.support.fake_trainer import COMMAND

pytestmark = pytest.mark.slow

both_ways = pytest.mark.parametrize("http", [False, True], ids=["socket", "http"])
both_languages = pytest.mark.parametrize("language", ["en", "zh"])
ROW = b'{"word": "%s"}\n'


def labels(view: dict[str, Any]) -> list[str]:
    return [one["text"]["text"] for block in view["blocks"] for one in block.get("elements", [])]


def texts(view: dict[str, Any]) -> str:
    """All that a person reads in a view."""
    found = [one for block in view["blocks"] for one in (block.get("text"), *block.get("fields", []))]
    return "\n".join(one["text"] for one in found if one)


async def speak(it: Talk, language: str, user: str) -> None:
    if language == "zh":
        await it.ask(user, "/language zh")


async def channel(it: Talk, column: str) -> Any:
    return await it.here.database.read(lambda tx: tx.value(f"SELECT {column} FROM channel WHERE name = 'acme'"))


def limited(tx: Tx) -> None:
    found = directory.channel_by_name(tx, "acme")
    assert found is not None
    directory.set_channel(tx, found.id, per_hour=20)


@both_ways
@both_languages
async def test_a_person_sees_what_is_left_and_no_operators_things(tmp_path: Path, http: bool, language: str) -> None:
    async with talk(tmp_path, http=http) as it:
        await it.here.database.write(limited)
        await speak(it, language, "UANN")
        await it.ask("UANN", "a question")
        view = await it.home("UANN")
        assert say(language, "slack.home_left", left=19) in texts(view)
        assert labels(view) == [say(language, f"slack.home_{one}") for one in ("usage", "privacy", "help")]
        assert not any(block["type"] == "data_visualization" for block in view["blocks"])
        held = await it.answer(it.there.press_home("UANN", say(language, "slack.home_usage")))
        assert held.channel == "DUANN"


@both_ways
@both_languages
async def test_an_operator_sees_chart_limits_version_and_jobs(tmp_path: Path, http: bool, language: str) -> None:
    async with talk(tmp_path, http=http) as it:
        await speak(it, language, "UOWNER")
        for number in range(3):
            await it.ask("UANN", f"question {number}")
        view = await it.home("UOWNER")
        (chart,) = [block for block in view["blocks"] if block["type"] == "data_visualization"]
        (series,) = chart["chart"]["series"]
        assert [point["value"] for point in series["data"]] == [0] * 13 + [3]
        said = texts(view)
        assert say(language, "slack.home_version_always", version="base") in said
        assert say(language, "slack.home_no_jobs") in said
        assert f"*{say(language, 'slack.limits_tokens_out')}*\n512" in said
        assert f"*{say(language, 'slack.limits_per_minute')}*\n{say(language, 'slack.home_no_limit')}" in said
        for key in ("dataset_title", "limits_title", "instructions_title", "home_channel_show"):
            assert say(language, f"slack.{key}") in labels(view)


async def test_where_slack_draws_no_charts_yet_the_home_says_it_in_letters(tmp_path: Path) -> None:
    async with talk(tmp_path) as it:
        it.there.draws = False
        await it.ask("UANN", "a question")
        await it.there.deliver(it.there.opens_home("UOWNER"))
        await it.there.until(lambda: it.there.homes)
        said = texts(it.there.homes["T1", "UOWNER"])
        assert re.search("`▁{13}█`", said)
        assert say("en", "slack.home_most", sum=1, most=1) in said


@both_ways
@both_languages
async def test_limits_are_changed_by_a_modal_and_by_role(tmp_path: Path, http: bool, language: str) -> None:
    async with talk(tmp_path, http=http) as it:
        await speak(it, language, "UOWNER")
        await it.home("UOWNER")
        title = say(language, "slack.limits_title")
        view = await it.modal(it.there.press_home("UOWNER", title))
        shown = [block["element"]["initial_value"] for block in view["blocks"]]
        assert shown == [str(await channel(it, one.name)) for one in fields(Limits)]

        refused = await it.there.deliver(it.there.submit("UOWNER", view, {"per_minute": {"value": "many"}}))
        need = channel_keys()["per_minute"].needs().render(language)
        assert refused == {"response_action": "errors", "errors": {"per_minute": need}}
        published = len(it.there.called("views.publish"))
        await it.answer(it.there.submit("UOWNER", view, {"per_minute": {"value": "7"}}, id="V1"))
        assert await channel(it, "per_minute") == 7
        await it.there.until(lambda: len(it.there.called("views.publish")) > published)  # the home shows it at once
        assert f"*{say(language, 'slack.limits_per_minute')}*\n7" in texts(it.there.homes["T1", "UOWNER"])

        await it.there.deliver(it.there.submit("UOWNER", view, {"per_minute": {"value": "8"}}, id="V1"))  # replayed
        forged = await it.answer(it.there.submit("UANN", view, {"per_minute": {"value": "9"}}))
        assert forged.said == say("en", "error.not_allowed")
        assert await channel(it, "per_minute") == 7


@both_ways
async def test_who_is_no_operator_any_more_gets_no_modal_but_a_new_home(tmp_path: Path, http: bool) -> None:
    async with talk(tmp_path, http=http) as it:
        await it.home("UOWNER")
        await it.here.database.write(lambda tx: tx.run("DELETE FROM operator"))
        await it.there.deliver(it.there.press_home("UOWNER", say("en", "slack.instructions_title")))
        await it.there.until(lambda: len(it.there.called("views.publish")) > 1)
        assert not it.there.views
        assert say("en", "slack.instructions_title") not in labels(it.there.homes["T1", "UOWNER"])


@both_ways
async def test_instructions_are_changed_word_for_word(tmp_path: Path, http: bool) -> None:
    text = 'Say "yes" often.\nNever say «no», or 「不」 per_minute=0 “at all”; /help'
    async with talk(tmp_path, http=http) as it:
        await it.home("UOWNER")
        view = await it.modal(it.there.press_home("UOWNER", say("en", "slack.instructions_title")))
        await it.answer(it.there.submit("UOWNER", view, {"text": {"value": text}}))
        assert await channel(it, "instructions") == text
        again = await it.modal(it.there.press_home("UOWNER", say("en", "slack.instructions_title")))
        assert again["blocks"][0]["element"]["initial_value"] == text
        await it.answer(it.there.submit("UOWNER", again, {"text": {"value": None}}))
        assert await channel(it, "instructions") == ""
        assert await channel(it, "per_minute") == 0

        await it.here.database.write(lambda tx: tx.run("UPDATE channel SET instructions = ?", ["x" * 4000]))
        told = await it.modal(it.there.press_home("UOWNER", say("en", "slack.instructions_title")))
        assert told["blocks"][0]["text"]["text"] == say("en", "slack.instructions_too_long")
        assert MAX_INSTRUCTIONS < 4000


@both_ways
@both_languages
async def test_a_file_in_a_modal_becomes_a_version_that_is_chosen_in_another(
    tmp_path: Path, http: bool, language: str
) -> None:
    async with talk(tmp_path, trainer=COMMAND, http=http) as it:
        await speak(it, language, "UOWNER")
        await it.home("UOWNER")
        view = await it.modal(it.there.press_home("UOWNER", say(language, "slack.dataset_title")))
        empty = await it.there.deliver(it.there.submit("UOWNER", view, {"file": {"files": []}}))
        assert empty == {"response_action": "errors", "errors": {"file": say(language, "slack.dataset_missing")}}
        for word in (b"plain", b"worse"):
            it.there.files["F0"] = ROW % word
            file = {"id": "F0", "name": "faq.jsonl", "size": 17, "mimetype": "application/json"}
            started = await it.answer(it.there.submit("UOWNER", view, {"file": {"files": [file]}}))
            assert "faq.jsonl" in started.said
            start = say(language, "training.button_start")
            question = [one for one in it.there.held("DUOWNER") if start in one.labels][-1]
            await it.there.deliver(it.there.press("UOWNER", question, start))
            await it.settled()
        assert "acme@2" in texts(await it.home("UOWNER"))

        view = await it.modal(it.there.press_home("UOWNER", say(language, "slack.version_title")))
        found = await it.there.deliver(it.there.look_up("UOWNER", view, "version"))
        failed = say(language, "slack.version_failed", label="acme@2")
        assert [one["text"]["text"] for one in found["options"]] == [failed, "acme@1"]  # type: ignore[index]
        narrowed = await it.there.deliver(it.there.look_up("UOWNER", view, "version", "@1"))
        assert [one["value"] for one in narrowed["options"]] == ["+acme@1"]  # type: ignore[index]
        stranger = await it.there.deliver(it.there.look_up("UANN", view, "version"))
        assert stranger == {"options": []}

        def choose(value: str, reason: str | None = None) -> dict[str, Any]:
            chosen = {"selected_option": {"value": value}}
            return it.there.submit("UOWNER", view, {"version": chosen, "reason": {"value": reason}})

        why = await it.there.deliver(choose("-acme@2"))
        needed = {"reason": say(language, "slack.version_needs_reason", label="acme@2")}
        assert why == {"response_action": "errors", "errors": needed}
        await it.answer(choose("-acme@2", "a trial for a day"))
        assert "acme@2" in texts(await it.home("UOWNER"))
        rollback = say(language, "slack.home_rollback")
        (button,) = [
            one
            for block in it.there.homes["T1", "UOWNER"]["blocks"]
            for one in block.get("elements", [])
            if one["text"]["text"] == rollback
        ]
        assert button["confirm"]["text"]["text"] == say(language, "slack.home_rollback_sure")
        await it.answer(it.there.press_home("UOWNER", rollback))
        assert not await it.here.database.read(
            lambda tx: tx.value("SELECT champion FROM adapter_name WHERE name = 'acme'")
        )


@both_ways
async def test_a_running_job_can_be_looked_at_and_ended_from_the_home(tmp_path: Path, http: bool) -> None:
    async with talk(tmp_path, trainer=COMMAND, http=http) as it:
        it.there.files["F0"] = ROW % b"pause"
        await it.there.deliver(
            it.there.message("UOWNER", "finetune yes", subtype="file_share", files=[{"id": "F0", "name": "faq.jsonl"}])
        )
        await it.until_true(lambda tx: tx.value("SELECT state FROM job") == "running")
        assert say("en", "training.state_running") in texts(await it.home("UOWNER"))
        await it.there.deliver(it.there.press_home("UOWNER", say("en", "slack.home_cancel", id=1)))
        await it.settled()
        state = await it.here.database.read(lambda tx: tx.value("SELECT state FROM job"))
        assert state == "cancelled"
        assert say("en", "slack.home_cancel", id=1) not in labels(await it.home("UOWNER"))


@pytest.mark.parametrize("text", ["plain", 'a "b" c', '「」 «» “” " x', "", "line\nline", "key=value title=x"])
def test_whatever_is_written_into_the_form_is_one_setting(text: str) -> None:
    view = {
        "callback_id": "instructions",
        "private_metadata": '["D1", "@U1", "en", "", ""]',
        "state": {"values": {"text": {"text": {"value": text}}}},
    }
    found = submission(view)
    assert found is not None
    assert isinstance(found[1], Submission)
    call = parse(found[1].text)
    assert call.arguments == {"instructions": text.strip()}


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ("/help shows all", "/distributary help shows all"),
        ("`/adapter promote a@1`", "`/distributary adapter promote a@1`"),
        ("写 /usage。", "写 /distributary usage。"),
        ("/distributary usage", "/distributary usage"),
        ("and/new, /newer, a/stop/b, https://x.org/help, platform:account/start", None),
    ],
)
def test_commands_are_told_from_paths(said: str, meant: str | None) -> None:
    assert spelled(said) == (said if meant is None else meant)
