"""What people live through in a private chat, in English and Chinese, by polling and by webhook."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from core.channels import bindings, directory
from core.engine.protocol import Request
from core.errors import AppError, EngineError
from core.i18n.messages import say
from core.storage.database import Tx
from tests.bots.telegram.talk import ANN, LI, OWNER, talk
from tests.fakes.telegram import Person
from tests.fakes.telegram.people import message, photo

both_languages = pytest.mark.parametrize(("person", "language"), [(ANN, "en"), (LI, "zh")])


@both_languages
@pytest.mark.parametrize("webhook", [False, True])
async def test_a_question_is_answered_once_with_buttons(
    tmp_path: Path, webhook: bool, person: Person, language: str
) -> None:
    async with talk(tmp_path, webhook=webhook) as it:
        sent = await it.ask(person, "What is a permit?")
        assert sent.text == "you said What is a permit?"
        assert sent.labels == [say(language, "service.again"), "👍", "👎"]
        assert len(it.there.held(person.id)) == 1
        assert await it.here.count("ledger") == 1


@both_languages
async def test_every_command_for_everyone_answers(tmp_path: Path, person: Person, language: str) -> None:
    async with talk(tmp_path) as it:
        for command in ("help", "new", "stop", "usage", "language", "privacy", "forget", "whoami"):
            sent = await it.ask(person, f"/{command}")
            assert sent.text.strip()
            assert ("。" in sent.text or "，" in sent.text) == (language == "zh"), command
        assert await it.here.count("ledger") == 0


@both_languages
async def test_start_says_who_answers_and_offers_questions(tmp_path: Path, person: Person, language: str) -> None:
    def questions(tx: Tx) -> None:
        channel = directory.channel_by_name(tx, "acme")
        assert channel is not None
        directory.set_channel(
            tx, channel.id, questions=f"How long does it take?\n{'x' * 58}这是一个很长很长的问题\nHours?"
        )

    async with talk(tmp_path) as it:
        await it.here.database.write(questions)
        hello = await it.ask(person, "/start")
        assert "Acme" in hello.text
        assert "24" in hello.text
        assert hello.labels[0] == "How long does it take?"
        long = hello.labels[1]
        for label, asked in (("How long", "How long does it take?"), ("xxx", long)):
            before = len(it.there.held(person.id))
            await it.press(person, hello, label)
            assert (await it.answer(person.id, before)).text == f"you said {asked}"
        again = await it.ask(person, "/retry")
        assert again.text == f"you said {long}"


async def test_a_channels_link_brings_the_person_to_that_channel(tmp_path: Path) -> None:
    def second(tx: Tx) -> None:
        made = directory.create_channel(tx, "delta", title="Delta Tax")
        directory.set_channel(tx, made.id, instructions="speak of tax")
        bindings.bind(tx, "telegram", "acme_bot", "start=delta", made.id)

    def answer(request: Request) -> str:
        return request.scope.channel

    async with talk(tmp_path, answer) as it:
        await it.here.database.write(second)
        assert "Delta Tax" in (await it.ask(ANN, "/start delta")).text
        assert (await it.ask(ANN, "hello")).text == "delta"
        assert (await it.ask(LI, "hello")).text == "acme"
        assert "Acme" in (await it.ask(LI, "/start nothing")).text
        group = it.there.chat(-5, "group")  # nobody moves a group to another channel by a link
        await it.ask(ANN, "/start@acme_bot delta", chat=group)
        assert (await it.ask(LI, "@acme_bot hello", chat=group)).text == "acme"
        await it.ask(ANN, "/forget yes")
        assert (await it.ask(ANN, "hello")).text == "acme"


@both_languages
async def test_again_answers_the_last_question_once_more(tmp_path: Path, person: Person, language: str) -> None:
    count = 0

    def answer(request: Request) -> str:
        nonlocal count
        count += 1
        return f"answer {count}"

    async with talk(tmp_path, answer) as it:
        first = await it.ask(person, "a question")
        await it.press(person, first, say(language, "service.again"))
        assert [one.text for one in it.there.held(person.id)] == ["answer 1", "answer 2"]
        assert it.here.engine.requests[1].messages[-1].text == "a question"
        assert await it.here.count("ledger") == 2


@both_languages
async def test_a_cut_answer_can_be_continued(tmp_path: Path, person: Person, language: str) -> None:
    async with talk(tmp_path, lambda request: "word " * 600) as it:
        cut = await it.ask(person, "tell me all")
        await it.press(person, cut, say(language, "service.continue"))
        assert it.here.engine.requests[1].messages[-1].text == say(language, "service.continue_asked")
        assert len(it.here.engine.requests[1].messages) == 3
        assert await it.here.count("ledger") == 2


@both_languages
async def test_thumbs_are_kept_with_the_answer_and_a_reason(tmp_path: Path, person: Person, language: str) -> None:
    async with talk(tmp_path) as it:
        sent = await it.ask(person, "a question")
        await it.press(person, sent, "👍")
        await it.press(person, sent, "👎")
        assert it.there.answered[-1][1] == say(language, "telegram.thanks")
        await it.there.until(lambda: say(language, "feedback.reason_untrue") in sent.labels)
        await it.press(person, sent, say(language, "feedback.reason_untrue"))
        await it.there.until(lambda: not sent.labels)
        votes = await it.here.database.read(
            lambda tx: tx.all("SELECT vote, reason, adapter FROM feedback JOIN generation ON id = generation_id")
        )
        assert votes == [{"vote": -1, "reason": "untrue", "adapter": None}]
        stranger = await it.ask(OWNER, "another")
        assert await it.here.count("feedback") == 1
        await it.press(ANN if person is LI else LI, stranger, data=f"f:{'0' * 32}:1")
        assert await it.here.count("feedback") == 1


async def test_the_native_stop_button_ends_the_answer_and_what_is_seen_is_charged(tmp_path: Path) -> None:
    async with talk(tmp_path, lambda request: "word " * 400, delay_s=0.01) as it:
        it.there.says(ANN, "tell me all")
        await it.there.until(lambda: (it.there.visible_draft(ANN.id) or "").count("word") > 2)
        chat, draft = next(iter(it.there.drafts))
        assert it.there.drafts[chat, draft].can_stop
        it.there.update(stopped_message_generation={"chat": it.there.chat(ANN.id).json(), "draft_id": draft})
        await it.settled()
        (sent,) = it.there.held(ANN.id)
        assert 2 < sent.text.count("word") < 400
        assert await it.here.count("ledger") == 1


async def test_a_stop_command_acts_at_once(tmp_path: Path) -> None:
    async with talk(tmp_path, lambda request: "word " * 400, delay_s=0.01) as it:
        it.there.says(ANN, "tell me all")
        await it.there.until(lambda: it.there.visible_draft(ANN.id))
        it.there.says(ANN, "/stop")
        await it.settled()
        assert await it.here.count("ledger") == 1
        assert len(it.there.held(ANN.id)) == 2


@pytest.mark.slow
async def test_a_second_message_waits_its_turn_and_other_chats_do_not(tmp_path: Path) -> None:
    order: list[str] = []

    def answer(request: Request) -> str:
        order.append(request.messages[-1].text)
        return "word " * (200 if request.messages[-1].text == "slow" else 1)

    async with talk(tmp_path, answer, delay_s=0.005) as it:
        it.there.says(ANN, "slow")
        await it.there.until(lambda: it.there.visible_draft(ANN.id))
        it.there.says(ANN, "second")
        it.there.says(LI, "other")
        await it.there.until(lambda: it.there.held(LI.id) and it.there.held(LI.id)[0].labels)
        assert order == ["slow", "other"]
        await it.settled()
        assert order == ["slow", "other", "second"]
        assert [one.text[:10] for one in it.there.held(ANN.id)] == ["word word ", "word"]


@both_languages
async def test_what_has_no_text_is_answered_politely_and_an_album_once(
    tmp_path: Path, person: Person, language: str
) -> None:
    async with talk(tmp_path) as it:
        sent = await it.ask(person, photo=photo())
        assert sent.text == say(language, "service.text_only")
        for number in range(4):
            it.there.says(person, photo=photo(f"P{number}"), media_group_id="g1")
        await it.settled()
        assert len(it.there.held(person.id)) == 2
        it.there.says(person, photo=photo(), media_group_id="g2")
        it.there.says(person, photo=photo(), media_group_id="g2", caption="What is this?")
        it.there.says(person, photo=photo(), media_group_id="g2")
        await it.settled()
        assert it.there.held(person.id)[-1].text == "you said What is this?"
        assert await it.here.count("ledger") == 1


async def test_a_reply_brings_what_it_refers_to(tmp_path: Path) -> None:
    async with talk(tmp_path) as it:
        said = await it.ask(ANN, "first")
        quote = {"text": "you said", "position": 0}
        sent = await it.ask(ANN, "what do you mean?", reply_to_message=it.there.mine(said), quote=quote)
        assert sent.text == "you said > you said\n\nwhat do you mean?"
        plain = await it.ask(ANN, "and this?", reply_to_message=it.there.mine(said))
        assert plain.text == "you said and this?"


async def test_a_forwarded_text_is_a_question_but_never_a_command(tmp_path: Path) -> None:
    origin = {"type": "user", "date": 1, "sender_user": LI.json()}
    async with talk(tmp_path) as it:
        assert (await it.ask(ANN, "is this true?", forward_origin=origin)).text == "you said is this true?"
        hand = "SELECT payload FROM inbox ORDER BY id DESC LIMIT 1"
        read = it.here.database.read
        assert await read(lambda tx: json.loads(tx.cipher.unseal(tx.value(hand)))["second_hand"])
        assert (await it.ask(ANN, "/forget yes", forward_origin=origin)).text == say("en", "telegram.second_hand")
        assert (await it.ask(OWNER, "/channel list", via_bot=LI.json() | {"is_bot": True})).text == say(
            "en", "telegram.second_hand"
        )
        assert await it.here.count("erasure") == 0


async def test_an_edit_runs_nothing(tmp_path: Path) -> None:
    async with talk(tmp_path) as it:
        await it.ask(ANN, "a question")
        chat = it.there.chat(ANN.id)
        for text in ("a better question", "/forget yes"):
            it.there.update(edited_message=message(chat, ANN, 1, text) | {"edit_date": 1_790_000_001})
        await it.settled()
        assert len(it.there.held(ANN.id)) == 1
        assert await it.here.count("erasure") == 0
        assert await it.here.count("inbox", "outcome = 'ignored'") == 2


async def test_a_blocked_bot_gives_up_at_once_and_charges_nothing(tmp_path: Path) -> None:
    async with talk(tmp_path) as it:
        it.there.chat(ANN.id).blocked = True
        it.there.says(ANN, "hello")
        await it.settled()
        assert await it.here.count("inbox", "outcome = 'unconfirmed'") == 1
        assert await it.here.count("ledger") == 0
        it.there.chat(ANN.id).blocked = False
        assert (await it.ask(ANN, "back again")).text == "you said back again"


async def test_being_blocked_ends_what_is_being_answered(tmp_path: Path) -> None:
    async with talk(tmp_path, lambda request: "word " * 400, delay_s=0.01) as it:
        it.there.says(ANN, "tell me all")
        await it.there.until(lambda: it.there.visible_draft(ANN.id))
        it.there.chat(ANN.id).blocked = True
        bot = {"id": it.there.account.id, "is_bot": True, "first_name": "Acme"}
        it.there.update(
            my_chat_member={
                "chat": it.there.chat(ANN.id).json(),
                "from": ANN.json(),
                "date": 1,
                "old_chat_member": {"status": "member", "user": bot},
                "new_chat_member": {"status": "kicked", "user": bot, "until_date": 0},
            }
        )
        await it.settled()
        assert await it.here.count("ledger") == 0


@both_languages
async def test_what_breaks_inside_is_said_and_not_charged(tmp_path: Path, person: Person, language: str) -> None:
    def answer(request: Request) -> str | AppError:
        return EngineError() if request.messages[-1].text == "break" else "fine"

    async with talk(tmp_path, answer) as it:
        assert (await it.ask(person, "break")).text == say(language, "error.engine")
        assert (await it.ask(person, "go on")).text == "fine"
        assert await it.here.count("ledger") == 1


@both_languages
async def test_the_limit_is_said_once(tmp_path: Path, person: Person, language: str) -> None:
    async with talk(tmp_path) as it:
        await it.here.database.write(lambda tx: tx.run("UPDATE channel SET per_minute = 2"))
        for number in range(5):
            it.there.says(person, f"question {number}")
        await it.settled()
        texts = [one.text for one in it.there.held(person.id)]
        assert len(texts) == 3
        assert "2" in texts[2]


async def test_dm_topics_are_conversations_of_their_own(tmp_path: Path) -> None:
    async with talk(tmp_path, lambda request: f"{len(request.messages)}") as it:
        it.there.chat(ANN.id).topics = {7}
        assert (await it.ask(ANN, "one", topic=7)).text == "1"
        assert it.there.held(ANN.id)[0].topic == 7
        assert (await it.ask(ANN, "two", topic=7)).text == "3"
        assert (await it.ask(ANN, "three")).text == "1"
