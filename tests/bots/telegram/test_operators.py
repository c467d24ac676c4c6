"""Operators need nothing but the chat: files up, progress in one message, verdicts, pictures and tables."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest
from PIL import Image

from core.adapters.commands import compare_button, discard_button, promote_button
from core.i18n.messages import say
from tests.bots.telegram.talk import ANN, LI, OWNER, Talk, talk
from tests.fakes.telegram import Person, Sent
from tests.fakes.telegram.people import document
from tests.support.fake_trainer import COMMAND

pytestmark = pytest.mark.slow

ROW = b'{"word": "%s"}\n'


BUTTONS = (compare_button, promote_button, discard_button)


async def upload(it: Talk, person: Person, word: str = "plain", **more: object) -> Sent:
    it.there.files["F1"] = ROW % word.encode()
    return await it.ask(person, caption="/finetune yes", document=document("faq.jsonl"), **more)


@pytest.mark.parametrize("language", ["en", "zh"])
async def test_a_file_with_the_caption_finetune_becomes_a_version_in_service(tmp_path: Path, language: str) -> None:
    boss = Person(OWNER.id, "Owner", language)
    async with talk(tmp_path, trainer=COMMAND) as it:
        it.there.files["F1"] = ROW % b"personal"
        await it.ask(boss, caption="/finetune", document=document("faq.jsonl"))
        (question,) = [one for one in it.there.held(boss.id) if one.labels]
        offered = [say(language, f"training.button_{key}") for key in ("start_anyway", "redact", "preview", "cancel")]
        assert question.labels == offered
        await it.press(boss, question, offered[2])
        assert "▶an answer<end>◀" in it.there.held(boss.id)[-1].text
        await it.press(boss, question, offered[0])
        job = [one for one in it.there.held(boss.id) if one.labels][-1]
        assert len(job.texts) >= 2  # one message, edited while the job runs
        assert "acme@1" in job.text
        assert job.labels == [button(language, "acme@1").text for button in BUTTONS]
        await it.press(boss, job, job.labels[1])
        assert "acme@1" in it.there.held(boss.id)[-1].text
        assert await it.here.database.read(lambda tx: tx.value("SELECT champion FROM adapter_name WHERE name = 'acme'"))
        back = await it.ask(boss, "/adapter rollback")
        assert "base" in back.text


async def test_the_loss_curve_comes_as_a_picture(tmp_path: Path) -> None:
    async with talk(tmp_path, trainer=COMMAND) as it:
        await upload(it, OWNER)
        (picture,) = [one for one in it.there.held(OWNER.id) if one.media]
        assert picture.media == "photo"
        assert Image.open(io.BytesIO(picture.file)).size == (900, 420)


async def test_a_reply_to_a_file_works_too_and_strangers_are_refused(tmp_path: Path) -> None:
    async with talk(tmp_path, trainer=COMMAND) as it:
        refused = await upload(it, ANN)
        assert refused.text == say("en", "error.not_allowed")
        it.there.files["F2"] = ROW % b"plain"
        sent = {"message_id": 1, "date": 1, "chat": it.there.chat(OWNER.id).json(), "from": OWNER.json()}
        await it.ask(OWNER, "/finetune", reply_to_message=sent | {"document": document("two.jsonl", "F2")})
        assert await it.here.count("job") == 1
        assert await it.here.count("audit", "allowed = 0") == 1


@pytest.mark.parametrize(("size", "key"), [(30_000_000, "file_too_large"), (None, "file_gone")])
async def test_a_file_that_cannot_be_had_is_named_with_the_way_out(tmp_path: Path, size: int | None, key: str) -> None:
    async with talk(tmp_path, trainer=COMMAND) as it:
        sent = await it.ask(OWNER, caption="/finetune", document=document("faq.jsonl", "none", size or 10))
        assert sent.text == say("en", f"telegram.{key}", name="faq.jsonl", limit=20)
        assert await it.here.count("job") == 0


async def test_a_running_job_can_be_stopped_from_the_chat(tmp_path: Path) -> None:
    async with talk(tmp_path, trainer=COMMAND) as it:
        it.there.files["F1"] = ROW % b"pause"
        it.there.says(OWNER, caption="/finetune yes", document=document("faq.jsonl"))
        await it.there.until(lambda: any("░" in one.text for one in it.there.held(OWNER.id)))
        it.there.says(OWNER, "/finetune cancel")
        await it.settled()
        assert await it.here.count("job", "state = 'cancelled'") == 1
        assert any(len(one.texts) > 2 for one in it.there.held(OWNER.id))  # one message, edited while the job runs
        assert not any("░" in one.text for one in it.there.held(OWNER.id))


async def test_usage_comes_as_a_chart_and_as_a_table(tmp_path: Path) -> None:
    async with talk(tmp_path) as it:
        for number in range(3):
            await it.ask(ANN, f"question {number}")
        usage = await it.ask(OWNER, "/usage")
        assert usage.labels == [say("en", "users.usage_chart"), say("en", "users.usage_csv")]
        await it.press(OWNER, usage, usage.labels[0])
        picture = it.there.held(OWNER.id)[-1]
        assert (picture.media, Image.open(io.BytesIO(picture.file)).format) == ("photo", "PNG")
        await it.press(OWNER, usage, usage.labels[1])
        table = it.there.held(OWNER.id)[-1]
        assert table.media == "document"
        rows = list(csv.DictReader(io.StringIO(table.file.decode())))
        assert len(rows) == 30
        assert rows[-1]["replies"] == "3"
        assert (await it.ask(ANN, "/usage chart")).text == say("en", "error.not_allowed")
        assert not (await it.ask(ANN, "/usage")).labels


async def test_menus_show_each_person_their_commands(tmp_path: Path) -> None:
    async with talk(tmp_path) as it:
        await it.there.until(lambda: len(it.there.commands) == 6)
        everyone, group = it.there.commands["all_private_chats"], it.there.commands["all_group_chats"]
        assert set(it.there.commands) == {
            f"all_{one}_chats{code}" for one in ("private", "group") for code in ("", " en", " zh")
        }
        assert "forget" in everyone
        assert "finetune" not in everyone
        assert set(group) == {"help", "new", "stop", "usage", "privacy"}
        await it.ask(LI, "hello")
        await it.ask(OWNER, "hello")
        await it.there.until(lambda: f"chat {OWNER.id}" in it.there.commands)
        assert "finetune" in it.there.commands[f"chat {OWNER.id}"]
        assert f"chat {LI.id}" not in it.there.commands
        await it.here.database.write(lambda tx: tx.run("DELETE FROM operator WHERE label = 'owner'"))
        await it.ask(OWNER, "hello")
        await it.there.until(lambda: f"chat {OWNER.id}" not in it.there.commands)


async def test_an_operator_is_known_by_their_id_not_by_their_name(tmp_path: Path) -> None:
    async with talk(tmp_path) as it:
        impostor = Person(999, OWNER.name)
        assert (await it.ask(impostor, "/channel list")).text == say("en", "error.not_allowed")
        code = (await it.ask(OWNER, "/operator invite acme Kim")).text
        import re

        found = re.search(r"\w{4}-\w{4}-\w{4}", code)
        assert found
        await it.ask(impostor, f"/claim {found[0]}")
        assert "acme" in (await it.ask(impostor, "/channel list")).text
