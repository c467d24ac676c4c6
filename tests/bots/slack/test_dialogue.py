"""What people live through in Slack, by Socket Mode and over HTTP alike, in English and Chinese."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from core.channels import directory
from core.engine.protocol import Request
from core.i18n.messages import say
from core.storage.database import Tx
from tests.bots.slack.talk import Talk, talk

both_ways = pytest.mark.parametrize("http", [False, True], ids=["socket", "http"])
both_languages = pytest.mark.parametrize("language", ["en", "zh"])


async def speak(it: Talk, language: str, user: str = "UANN") -> None:
    if language == "zh":
        await it.ask(user, "/language zh")


@both_ways
@both_languages
async def test_a_question_in_a_dm_is_answered_once_in_its_thread(tmp_path: Path, http: bool, language: str) -> None:
    async with talk(tmp_path, http=http) as it:
        await speak(it, language)
        asked = it.there.message("UANN", "What is a permit?")
        before = len(it.there.messages)
        held = await it.answer(asked)
        assert held.said == "you said What is a permit?"
        assert held.thread == asked["event"]["ts"]
        assert held.streamed
        assert not held.streaming
        assert held.labels == [say(language, "service.again")]
        assert len(it.there.messages) == before + 1
        assert await it.here.count("ledger") == 1


@both_ways
async def test_a_thread_is_one_conversation_and_another_is_another(tmp_path: Path, http: bool) -> None:
    async with talk(tmp_path, http=http) as it:
        first = it.there.message("UANN", "one")
        await it.answer(first)
        await it.ask("UANN", "two", thread_ts=first["event"]["ts"])
        await it.ask("UANN", "three")
        lengths = [len(request.messages) for request in it.here.engine.requests]
        assert lengths == [1, 3, 1]


@both_ways
async def test_in_a_channel_only_who_names_it_is_answered_in_the_thread(tmp_path: Path, http: bool) -> None:
    async with talk(tmp_path, http=http) as it:
        await it.there.deliver(it.there.message("UANN", "just talking", channel="C1"))
        root = it.there.ts()
        named = it.there.message("UBEN", "so, <@BT1>: is that so? &lt;b&gt;", channel="C1", thread_ts=root)
        held = await it.answer(named)
        assert held.thread == root  # a thread that somebody else began
        assert held.said == "you said so, is that so? <b>"
        (start,) = it.there.called("chat.startStream")
        assert (start.body["recipient_user_id"], start.body["recipient_team_id"]) == ("UBEN", "T1")
        assert "markdown_text" not in start.body
        assert await it.here.count("inbox") == 1


@both_ways
async def test_what_follows_in_a_thread_needs_no_mention_where_the_thread_began_with_one(
    tmp_path: Path, http: bool
) -> None:
    async with talk(tmp_path, http=http) as it:
        root = it.there.message("UANN", "<@BT1> how long?", channel="C1")
        await it.answer(root)
        below = {"channel": "C1", "thread_ts": root["event"]["ts"]}
        assert (await it.ask("UBEN", "and what does it cost?", **below, parent_user_id="UANN")).said.endswith("cost?")
        assert [len(request.messages) for request in it.here.engine.requests] == [1, 3]
        with_plan = {"subtype": "file_share", "files": [{"id": "F1", "name": "plan.pdf"}]}
        assert (await it.ask("UBEN", "is this right?", **below, **with_plan)).said.endswith("right?")
        others = it.there.ts()
        await it.answer(it.there.message("UANN", "<@BT1> summarise", channel="C1", thread_ts=others))
        for quiet in (
            it.there.message("UBEN", "<@UANN> what do you think?", **below),
            it.there.message("UBEN", "", **below, **with_plan),
            it.there.message("UBEN", "just between us", channel="C1", thread_ts=others),
            it.there.message("UBEN", "elsewhere", channel="C2", thread_ts=root["event"]["ts"]),
        ):
            await it.there.deliver(quiet)
        await it.settled()
        assert len(it.here.engine.requests) == 4
        assert await it.here.count("inbox") == 4


@both_ways
async def test_bots_and_edits_and_deletions_run_nothing(tmp_path: Path, http: bool) -> None:
    async with talk(tmp_path, http=http) as it:
        asked = it.there.message("UANN", "hello")
        await it.answer(asked)
        said = asked["event"]
        changed = {"type": "message", "channel": "DUANN", "ts": it.there.ts(), "hidden": True}
        for event in (
            {**changed, "subtype": "message_changed", "message": {**said, "text": "/forget yes"}},
            {**changed, "subtype": "message_deleted", "previous_message": said},
            {**said, "ts": it.there.ts(), "bot_id": "B9"},
            {**said, "ts": it.there.ts(), "user": "BT1"},
            {**changed, "subtype": "bot_message", "text": "hello", "bot_id": "B8"},
            {**changed, "subtype": "channel_topic", "user": "UANN", "text": "hello"},
            {**said, "ts": it.there.ts(), "user": "USLACKBOT"},
        ):
            await it.there.deliver(it.there.event("T1", event))
        await it.settled()
        assert len(it.there.messages) == 1
        assert await it.here.count("generation") == 1


@pytest.mark.parametrize(("http", "language"), [(False, "zh"), (True, "en")])
async def test_every_command_for_everyone_answers(tmp_path: Path, http: bool, language: str) -> None:
    async with talk(tmp_path, http=http) as it:
        await speak(it, language)
        for command in ("help", "new", "stop", "usage", "language", "privacy", "forget", "whoami"):
            held = await it.ask("UANN", f"/{command}")
            assert ("。" in held.said or "，" in held.said) == (language == "zh"), command
        assert await it.here.count("ledger") == 0


@both_ways
async def test_the_slash_command_runs_commands_and_takes_questions_and_answers_in_a_dm(
    tmp_path: Path, http: bool
) -> None:
    async with talk(tmp_path, http=http) as it:
        told = await it.there.deliver(it.there.command("UANN", "whoami"))
        assert isinstance(told, dict)
        assert (told["response_type"], told["text"]) == ("ephemeral", say("en", "slack.answered_in_dm"))
        await it.settled()
        held = await it.answer(it.there.command("UANN", "what is a permit"))
        assert (held.channel, held.said) == ("DUANN", "you said what is a permit")
        again = await it.answer(it.there.press("UANN", held, say("en", "service.again")))
        assert again.said == held.said
        assert "`/distributary retry`" in (await it.answer(it.there.command("UANN", ""))).said
        assert not it.there.held("C1")


@both_ways
async def test_again_and_thumbs(tmp_path: Path, http: bool) -> None:
    count = 0

    def answer(request: Request) -> str:
        nonlocal count
        count += 1
        return f"answer {count}"

    async with talk(tmp_path, answer, http=http) as it:
        held = await it.ask("UANN", "a question")
        again = await it.answer(it.there.press("UANN", held, say("en", "service.again")))
        assert (again.said, again.thread) == ("answer 2", held.thread)
        assert it.here.engine.requests[1].messages[-1].text == "a question"
        for user, label in (("UANN", "+"), ("UANN", "-"), ("UBEN", "+")):
            await it.there.deliver(it.there.press(user, again, label))
        await it.settled()
        rows = await it.here.database.read(
            lambda tx: tx.all("SELECT vote, adapter FROM feedback JOIN generation ON id = generation_id")
        )
        assert rows == [{"vote": -1, "adapter": None}]


@both_ways
@pytest.mark.parametrize("way", ["native", "command", "button"])
async def test_an_answer_can_be_stopped_and_what_was_seen_is_charged(tmp_path: Path, http: bool, way: str) -> None:
    given: dict[str, Any] = {"transport": "edit"} if way == "button" else {}
    async with talk(tmp_path, lambda _: "word " * 4000, http=http, delay_s=0.01, **given) as it:
        asked = it.there.message("UANN", "tell me all")
        await it.there.deliver(asked)
        await it.there.until(lambda: any("word" in one.said for one in it.there.messages.values()))
        (held,) = it.there.messages.values()
        thread = asked["event"]["ts"]
        if way == "native":
            event = {"type": "agent_session_stopped", "channel": "DUANN", "thread_ts": thread, "user": "UANN"}
            held.streaming = False  # Slack stops the stream by itself, and not the session
            await it.there.deliver(it.there.event("T1", event | {"streaming_message_ts": [held.ts]}))
        elif way == "command":
            await it.there.deliver(it.there.message("UANN", " /stop", thread_ts=thread))
        else:
            await it.there.deliver(it.there.press("UANN", held, say("en", "slack.stop")))
        await it.settled()
        assert held.said.startswith("word")
        assert len(held.said) < 5 * 4000 - 1
        assert not held.streaming
        assert held.labels == [say("en", "service.again")]
        await it.until_session("active")
        assert await it.here.count("ledger") == 1


@pytest.mark.slow
@both_ways
async def test_an_answer_in_a_thread_is_stopped_by_who_asked_and_by_nobody_else(tmp_path: Path, http: bool) -> None:
    async with talk(tmp_path, lambda _: "word " * 200, http=http, delay_s=0.01, transport="edit") as it:
        for person, stops in (("UBEN", False), ("UANN", True)):
            before = len(it.there.messages)
            await it.there.deliver(it.there.message("UANN", "<@BT1> tell me all", channel="C1"))
            await it.there.until(lambda n=before: "word" in "".join(m.said for m in [*it.there.messages.values()][n:]))
            held = list(it.there.messages.values())[-1]
            await it.there.deliver(it.there.press(person, held, say("en", "slack.stop")))
            await it.settled()
            assert (held.said.count("word") < 200) is stops


@both_ways
@both_languages
async def test_a_file_without_text_is_answered_politely(tmp_path: Path, http: bool, language: str) -> None:
    async with talk(tmp_path, http=http) as it:
        await speak(it, language)
        sent = [{"id": "F1", "name": "plan.pdf", "size": 12, "mimetype": "application/pdf"}]
        held = await it.ask("UANN", "", subtype="file_share", files=sent)
        assert held.said == say(language, "service.text_only")


@both_ways
async def test_ask_about_this_message_opens_a_modal_and_answers_in_the_thread(tmp_path: Path, http: bool) -> None:
    async with talk(tmp_path, http=http) as it:
        message = {"ts": "1700000000.000100", "text": "Section 4 applies.", "user": "UBEN"}
        view = await it.modal(it.there.shortcut("UANN", message))

        def submit(text: str | None) -> dict[str, Any]:
            return it.there.submit("UANN", view, {"question": {"value": text}}, id="V1")

        refused = await it.there.deliver(submit("  "))
        assert refused == {"response_action": "errors", "errors": {"question": say("en", "slack.ask_empty")}}
        held = await it.answer(submit("What does it say?"))
        assert held.said == "you said > Section 4 applies.\n\nWhat does it say?"
        assert (held.channel, held.thread) == ("C1", "1700000000.000100")


LONG = {"zh": "许可" * 700, "ru": "дом " * 400, "quotes": '"\n' * 600, "emoji": "🏠" * 1200, "control": "\x01" * 1200}


@pytest.mark.parametrize("written", LONG.values(), ids=LONG)
async def test_the_modal_opens_for_a_long_message_in_any_script(tmp_path: Path, written: str) -> None:
    async with talk(tmp_path) as it:
        message = {"ts": "1700000000.000100", "text": written, "user": "UBEN"}
        view = await it.modal(it.there.shortcut("UANN", message))
        held = await it.answer(it.there.submit("UANN", view, {"question": {"value": "What is it?"}}))
        quoted = held.said.removeprefix("you said ").removesuffix("\n\nWhat is it?")
        assert len(quoted) > 480
        assert written.startswith(quoted.replace("\n> ", "\n").removeprefix("> ").rstrip("\n"))


@both_languages
@pytest.mark.parametrize("error", ["not_in_channel", "channel_not_found"])
async def test_where_the_app_is_no_member_it_answers_about_a_message_in_a_dm(
    tmp_path: Path, error: str, language: str
) -> None:
    async with talk(tmp_path) as it:
        it.there.locales["UANN"] = language
        await it.there.deliver(it.there.opens_home("UANN", tab="messages"))
        await it.until_known("UANN")
        it.there.outside["C7"] = error
        message = {"ts": "1700000000.000100", "text": "Section 4 applies.", "user": "UBEN"}
        view = await it.modal(it.there.shortcut("UANN", message, channel="C7"))
        held = await it.answer(it.there.submit("UANN", view, {"question": {"value": "What does it say?"}}))
        assert held.said == "you said > Section 4 applies.\n\nWhat does it say?"
        assert (held.channel, held.thread) == ("DUANN", "")
        assert say(language, "slack.elsewhere") in json.dumps(held.blocks, ensure_ascii=False)
        again = await it.answer(it.there.press("UANN", held, say(language, "service.again")))
        assert (again.channel, again.said) == (held.channel, held.said)
        assert await it.here.count("ledger") == 2


@both_ways
async def test_the_agents_dm_offers_the_channels_questions(tmp_path: Path, http: bool) -> None:
    def questions(tx: Tx) -> None:
        channel = directory.channel_by_name(tx, "acme")
        assert channel is not None
        directory.set_channel(tx, channel.id, questions="How long does it take?\nHours?")

    async with talk(tmp_path, http=http) as it:
        await it.here.database.write(questions)
        await it.there.deliver(it.there.opens_home("UANN", tab="messages"))
        await it.there.until(lambda: it.there.called("assistant.threads.setSuggestedPrompts"))
        (call,) = it.there.called("assistant.threads.setSuggestedPrompts")
        assert [one["message"] for one in call.body["prompts"]] == ["How long does it take?", "Hours?"]


@both_ways
async def test_invited_to_a_channel_it_says_how_to_address_it(tmp_path: Path, http: bool) -> None:
    async with talk(tmp_path, http=http) as it:
        event = {"type": "member_joined_channel", "channel": "C1", "user": "BT1", "inviter": "UANN", "team": "T1"}
        held = await it.answer(it.there.event("T1", event))
        assert "Acme" in held.said
        assert held.thread == ""


@both_ways
async def test_a_guest_of_another_workspace_is_somebody_of_their_own(tmp_path: Path, http: bool) -> None:
    async with talk(tmp_path, http=http) as it:
        held = await it.ask("UGUEST", "<@BT1> hello", channel="C1", user_team="T9", source_team="T9")
        assert held.said == "you said hello"
        (start,) = it.there.called("chat.startStream")
        assert (start.body["recipient_team_id"], start.body["recipient_user_id"]) == ("T9", "UGUEST")
        pressed = it.there.press("UGUEST", held, "+")
        pressed["user"]["team_id"] = "T9"
        await it.there.deliver(pressed)
        await it.settled()
        assert await it.here.count("feedback") == 1
        # somebody of another workspace who has the id of an operator of this one
        twin = await it.ask("UOWNER", "<@BT1> /channel list", channel="C1", user_team="T9", source_team="T9")
        assert twin.said == say("en", "error.not_allowed")


@both_ways
async def test_notices_are_in_the_language_in_which_a_person_reads_slack(tmp_path: Path, http: bool) -> None:
    async with talk(tmp_path, http=http) as it:
        it.there.locales["ULI"] = "zh-CN"
        await it.there.deliver(it.there.opens_home("ULI", tab="messages"))
        await it.until_known("ULI")
        told = await it.there.deliver(it.there.command("ULI", "whoami"))
        assert isinstance(told, dict)
        assert told["text"] == say("zh", "slack.answered_in_dm")
        await it.settled()
        held = await it.ask("ULI", "hello")
        assert held.labels == [say("zh", "service.again")]
        assert (await it.ask("ULI", "/language en")).said == say("en", "users.language_set", name="English")
        assert (await it.ask("ULI", "hello")).labels == [say("en", "service.again")]
        assert len(it.there.called("users.info")) == 1


@both_ways
async def test_commands_are_spelled_as_they_are_typed_in_slack_and_the_models_words_stay(
    tmp_path: Path, http: bool
) -> None:
    async with talk(tmp_path, lambda _: "Type /help or `/usage` in /home/help", http=http) as it:
        assert (await it.ask("UANN", "how?")).said == "Type /help or `/usage` in /home/help"
        assert "`/distributary language`" in (await it.ask("UANN", "/language")).said
        assert (await it.ask("UANN", "/hlep")).said.startswith("you said") is False


@both_ways
async def test_nothing_pings_anybody(tmp_path: Path, http: bool) -> None:
    nasty = "<!channel> @here @everyone <@U1> <!subteam^S1> <#C1> <!here|now> a<b @Channel"
    async with talk(tmp_path, lambda _: nasty, http=http, delay_s=0.001) as it:
        held = await it.ask("UANN", "shout")
        assert held.said.replace("\u2060", "") == nasty
        for shown in [held.said, *held.history, json.dumps(held.blocks)]:
            assert not any(bad in shown.lower() for bad in ("<!", "<@", "<#", "@channel", "@here", "@everyone"))


@both_ways
async def test_slack_is_told_what_is_going_on(tmp_path: Path, http: bool) -> None:
    async with talk(tmp_path, lambda _: "word " * 20, http=http, delay_s=0.01) as it:
        held = await it.ask("UANN", "hello")
        await it.there.until(lambda: it.there.called("assistant.threads.setStatus"))
        (status,) = it.there.called("assistant.threads.setStatus")
        assert status.body["thread_ts"] == held.thread
        assert status.body["loading_messages"] == [say("en", f"slack.working_{number}") for number in (1, 2, 3)]
        assert it.there.called("agents.sessions.setStatus")[0].body["status"] == "processing"
        (stopped,) = it.there.called("chat.stopStream")
        assert stopped.body["session_status"] == "active"
        for number in range(5):  # also where the answer is there before Slack was told that it comes
            await it.there.deliver(it.there.message("UANN", f"quick {number}"))
        await it.settled()
        await it.until_session("active")
