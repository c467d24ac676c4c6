"""Groups, topics, discussion groups, supergroups: answers where they were asked for, silence otherwise."""

from __future__ import annotations

from pathlib import Path

import pytest

from core.i18n.messages import say
from tests.bots.telegram.talk import ANN, LI, OWNER, talk
from tests.fakes.telegram import Chat, FakeTelegram, Person

GROUP = -100500
CAI = Person(14, "Cai")


def group(there: FakeTelegram, **more: object) -> Chat:
    return there.chat(GROUP, "supergroup", **more)


@pytest.mark.parametrize(("person", "language"), [(ANN, "en"), (LI, "zh")])
async def test_a_mention_is_answered_as_a_reply_and_other_talk_is_not(
    tmp_path: Path, person: Person, language: str
) -> None:
    async with talk(tmp_path) as it:
        chat = group(it.there)
        it.there.says(person, "nice weather", chat=chat)
        it.there.says(person, "@other_bot what is it?", chat=chat)
        it.there.says(person, "/help@other_bot", chat=chat)
        it.there.says(person, "/weather", chat=chat)
        it.there.says(Person(99, "Bot", is_bot=True), "@acme_bot hello", chat=chat)
        sent = await it.ask(person, "@acme_bot what is a permit?", chat=chat)
        assert sent.text == "you said what is a permit?"
        assert sent.reply_to == 6
        assert len(it.there.held(GROUP)) == 1
        assert await it.here.count("inbox") == 1
        assert not it.there.drafted  # drafts are for private chats
        help_text = await it.ask(person, "/help@acme_bot", chat=chat)
        assert say(language, "help.stop")[:6] in help_text.text


async def test_a_reply_to_the_bot_needs_no_name_and_one_to_others_brings_their_words(tmp_path: Path) -> None:
    async with talk(tmp_path) as it:
        chat = group(it.there)
        first = await it.ask(ANN, "Acme_bot? @acme_bot: first", chat=chat)
        second = await it.ask(LI, "and then?", chat=chat, reply_to_message=it.there.mine(first))
        assert second.text == "you said and then?"
        theirs = {"message_id": 1, "date": 1, "chat": chat.json(), "from": LI.json(), "text": "houses are red"}
        third = await it.ask(ANN, "@acme_bot is that so?", chat=chat, reply_to_message=theirs)
        assert third.text == "you said > houses are red\n\nis that so?"


async def test_an_answer_in_a_group_grows_by_edits_with_a_stop_button(tmp_path: Path) -> None:
    async with talk(tmp_path, lambda request: "word " * 300, delay_s=0.01) as it:
        chat = group(it.there)
        it.there.says(ANN, "@acme_bot tell me all", chat=chat)
        await it.there.until(lambda: it.there.held(GROUP) and "word" in it.there.held(GROUP)[0].text)
        sent = it.there.held(GROUP)[0]
        assert sent.labels == ["■"]
        await it.press(ANN, sent, "■")
        assert 1 <= sent.text.count("word") < 300
        assert sent.labels[-1] == "👎"
        assert len(sent.texts) > 2
        assert len(it.there.held(GROUP)) == 1


async def test_an_answer_in_a_group_is_stopped_by_who_asked_or_an_administrator(tmp_path: Path) -> None:
    async with talk(tmp_path, lambda request: "word " * 300, delay_s=0.01) as it:
        chat = group(it.there, admins={OWNER.id})

        async def stopped(number: int, *people: Person) -> bool:
            """Whether the last of these can stop it; those before cannot."""
            await it.there.until(lambda: len(it.there.held(GROUP)) > number and it.there.held(GROUP)[number].labels)
            sent = it.there.held(GROUP)[number]
            for person in people:
                done = len(it.there.answered)
                it.there.presses(person, sent, "■")
                await it.there.until(lambda done=done: len(it.there.answered) > done)
            await it.settled()
            told = [text for _, text in it.there.answered[-len(people) :]]
            assert told == [say(one.language[:2], "telegram.press_refused") for one in people[:-1]] + [""]
            return sent.text.count("word") < 300

        it.there.says(ANN, "@acme_bot tell me all", chat=chat)
        assert await stopped(0, LI, ANN)
        it.there.says(ANN, "@acme_bot tell me all", chat=chat)
        assert await stopped(1, LI, OWNER)
        it.there.presses(LI, it.there.held(GROUP)[1], "↻")
        assert await stopped(2, ANN, LI)


async def test_an_operator_who_is_no_administrator_stops_any_answer_by_its_button_as_by_a_command(
    tmp_path: Path,
) -> None:
    async with talk(tmp_path, lambda request: "word " * 300, delay_s=0.01) as it:
        chat = group(it.there, admins={CAI.id})
        it.there.says(ANN, "@acme_bot tell me all", chat=chat)
        await it.there.until(lambda: it.there.held(GROUP) and it.there.held(GROUP)[0].labels)
        sent = it.there.held(GROUP)[0]
        await it.press(OWNER, sent, "■")
        assert [text for _, text in it.there.answered] == [""]
        assert sent.text.count("word") < 300


@pytest.mark.slow
async def test_a_stop_that_is_typed_in_a_group_is_for_the_same_people(tmp_path: Path) -> None:
    async with talk(tmp_path, lambda request: "word " * 300, delay_s=0.01) as it:
        chat = group(it.there, admins={CAI.id})

        async def told(person: Person) -> tuple[str, bool]:
            """What is said to a person's stop, and whether Ann's answer ended by it."""
            before = len(it.there.held(GROUP))
            it.there.says(ANN, "@acme_bot tell me all", chat=chat)
            await it.there.until(lambda: "word" in "".join(sent.text for sent in it.there.held(GROUP)[before:]))
            it.there.says(person, "/stop", chat=chat)
            await it.there.until(lambda: len(it.there.held(GROUP)) > before + 1)
            await it.settled()
            answer, said = it.there.held(GROUP)[before:]
            return said.text, answer.text.count("word") < 300

        assert await told(LI) == (say("zh", "users.not_yours_to_stop"), False)
        for person in (ANN, CAI, OWNER):
            assert await told(person) == (say("en", "users.stop"), True)


@pytest.mark.slow
async def test_topics_are_answered_in_their_topic_and_general_without_an_id(tmp_path: Path) -> None:
    async with talk(tmp_path, lambda request: f"{len(request.messages)}", delay_s=0.3) as it:
        chat = group(it.there, forum=True, topics={17})
        assert (await it.ask(ANN, "@acme_bot one", chat=chat, topic=17)).topic == 17
        general = await it.ask(ANN, "@acme_bot two", chat=chat)
        assert (general.topic, general.text) == (None, "1")
        assert (await it.ask(ANN, "@acme_bot three", chat=chat, topic=17)).text == "3"
        chat.topics.clear()  # the topic is deleted while people wait
        assert (await it.ask(ANN, "@acme_bot four", chat=chat, topic=17)).topic is None
        assert all(call.status == 200 for call in it.there.calls if call.method == "sendChatAction")


async def test_a_discussion_group_is_answered_below_the_post(tmp_path: Path) -> None:
    async with talk(tmp_path) as it:
        chat = group(it.there)
        channel = {"id": -100600, "type": "channel", "title": "News"}
        it.there.says(
            Person(777000, "Telegram"), "@acme_bot is in this post", chat=chat, is_automatic_forward=True,
            sender_chat=channel,
        )  # fmt: skip
        sent = await it.ask(ANN, "@acme_bot what does it mean?", chat=chat, message_thread_id=1)
        assert sent.reply_to == 2
        assert sent.topic is None
        assert len(it.there.held(GROUP)) == 1


async def test_a_group_that_becomes_a_supergroup_keeps_its_conversation(tmp_path: Path) -> None:
    async with talk(tmp_path, lambda request: f"{len(request.messages)}") as it:
        old = it.there.chat(-5, "group")
        assert (await it.ask(ANN, "@acme_bot one", chat=old)).text == "1"
        new = group(it.there)
        old.moved_to = new.id
        it.there.says(ANN, chat=old, migrate_to_chat_id=new.id)
        await it.settled()
        assert (await it.ask(ANN, "@acme_bot two", chat=new)).text == "3"


async def test_an_answer_that_is_underway_goes_to_the_new_supergroup(tmp_path: Path) -> None:
    async with talk(tmp_path, lambda request: "word " * 60, delay_s=0.01) as it:
        old, new = it.there.chat(-5, "group"), group(it.there)
        it.there.says(ANN, "@acme_bot one", chat=old)
        await it.there.until(lambda: it.there.held(-5))
        old.moved_to = new.id
        it.there.messages.clear()
        await it.settled()
        (sent,) = it.there.held(new.id)
        assert sent.text.count("word") == 60
        assert await it.here.count("ledger") == 1


@pytest.mark.parametrize(("person", "language"), [(ANN, "en"), (LI, "zh")])
async def test_when_it_is_added_it_says_how_to_address_it(tmp_path: Path, person: Person, language: str) -> None:
    async with talk(tmp_path) as it:
        chat = group(it.there)
        bot = {"id": it.there.account.id, "is_bot": True, "first_name": "Acme"}
        change = {"chat": chat.json(), "from": person.json(), "date": 1}
        left, member = {"status": "left", "user": bot}, {"status": "member", "user": bot}
        it.there.update(my_chat_member=change | {"old_chat_member": left, "new_chat_member": member})
        await it.settled()
        (sent,) = it.there.held(GROUP)
        assert sent.text.startswith(say(language, "telegram.joined", title="Acme", kept="").replace("**", "")[:20])
        it.there.update(my_chat_member=change | {"old_chat_member": member, "new_chat_member": left})
        await it.settled()
        assert len(it.there.held(GROUP)) == 1


@pytest.mark.parametrize("how", ["member", "anonymous", "admin", "admin_but_no_operator"])
async def test_operator_commands_in_a_group_need_a_known_administrator(tmp_path: Path, how: str) -> None:
    async with talk(tmp_path) as it:
        person = ANN if how == "admin_but_no_operator" else OWNER
        chat = group(it.there, admins={person.id} if how.startswith("admin") else set())
        more: dict[str, object] = {}
        if how == "anonymous":
            person = Person(1087968824, "Group", is_bot=True)
            more = {"sender_chat": chat.json()}
        sent = await it.ask(person, "/channel list", chat=chat, **more)
        told = {"admin": "acme", "admin_but_no_operator": say("en", "error.not_allowed")}
        assert told.get(how, say("en", "telegram.operators_in_private")) in sent.text
        assert ("`" in sent.text or "acme" in sent.text) == (how == "admin")


async def test_an_operator_command_needs_an_administrator_however_it_is_given(tmp_path: Path) -> None:
    async with talk(tmp_path) as it:
        chat = group(it.there)
        private = say("en", "telegram.operators_in_private")
        first = await it.ask(OWNER, "@acme_bot hi", chat=chat)
        for text in ("@acme_bot /operator list", "@acme_bot:\n/operator list", "@acme_bot ／operator list"):
            assert (await it.ask(OWNER, text, chat=chat)).text == private
        reply = await it.ask(OWNER, "／operator list", chat=chat, reply_to_message=it.there.mine(first))
        assert reply.text == private
        told = len(it.there.held(GROUP))
        for data in ("y:/operator list", "y: ／operator list", "c:/operator list"):
            await it.press(OWNER, first, data=data)
            assert it.there.answered[-1][1] == say("en", "telegram.press_refused")
        assert len(it.there.held(GROUP)) == told
        own = it.there.chat(-100600, "supergroup", admins={OWNER.id})
        assert "terminal" in (await it.ask(OWNER, "@acme_bot /operator list", chat=own)).text


async def test_a_group_where_it_may_not_write_is_given_up(tmp_path: Path) -> None:
    async with talk(tmp_path) as it:
        chat = group(it.there, blocked=True)
        it.there.says(ANN, "@acme_bot one", chat=chat)
        await it.settled()
        assert await it.here.count("inbox", "outcome = 'unconfirmed'") == 1


async def test_a_reply_in_a_group_is_corrected_by_answering_it_where_its_person_allows_it(tmp_path: Path) -> None:
    async with talk(tmp_path) as it:
        chat = group(it.there, admins={OWNER.id})
        refused = await it.ask(LI, "@acme_bot how long?", chat=chat)
        await it.ask(ANN, "/consent on")
        first = await it.ask(ANN, "@acme_bot how long, please?", chat=chat)
        await it.ask(ANN, "@acme_bot thank you", chat=chat)
        done = await it.ask(OWNER, "/correct 20 days", chat=chat, reply_to_message=it.there.mine(first))
        assert "how long, please? ▶ 20 days" in done.text
        told = await it.ask(OWNER, "/correct 30 days", chat=chat, reply_to_message=it.there.mine(refused))
        assert told.text.startswith(say("en", "feedback.not_allowed")[:40])
        lost = await it.ask(OWNER, "/correct 30 days", chat=chat, reply_to_message=it.there.mine(done))
        assert lost.text.startswith(say("en", "feedback.no_reply")[:30])
        for asked in ("/correct", "/correct #12345678 30 days"):
            assert (await it.ask(OWNER, asked, chat=chat)).text == say("en", "feedback.in_private")
        assert await it.here.count("example") == 1


async def test_only_who_was_answered_in_a_group_gives_it_away(tmp_path: Path) -> None:
    async with talk(tmp_path) as it:
        chat = group(it.there)
        sent = await it.ask(LI, "@acme_bot how long?", chat=chat)
        await it.press(LI, sent, "👎")
        await it.there.until(lambda: say("zh", "feedback.reason_other") in sent.labels)
        await it.press(LI, sent, say("zh", "feedback.reason_other"))
        asked = it.there.held(GROUP)[-1]
        assert asked.text == say("zh", "feedback.may_we")
        await it.press(ANN, asked, say("zh", "feedback.yes"))
        assert await it.here.count("example") == 0
        await it.press(LI, asked, say("zh", "feedback.yes"))
        assert await it.here.count("example", "shared = 1") == 1
