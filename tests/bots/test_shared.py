"""Dialogues that are the same on every platform: one table, run through the real bots over their fakes.

Telegram by polling and by webhook, Slack by Socket Mode and over HTTP; in English and in Chinese.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import pytest

from core.adapters.commands import promote_button
from core.channels import directory
from core.channels.training_permission import set_exceptions
from core.engine.protocol import Request
from core.errors import AppError, EngineError
from core.i18n.messages import say
from core.jobs.examples import examples_of
from core.storage.database import Tx
from tests.bots.slack import talk as slack
from tests.bots.telegram import talk as telegram
from tests.fakes.slack import Held
from tests.fakes.telegram import Person, Sent
from tests.fakes.telegram.people import document, photo
from tests.support.fake_trainer import COMMAND
from tests.support.running_service import RunningService

pytestmark = pytest.mark.slow

Answers = Callable[[Request], str | AppError]
WAYS = ("telegram-polling", "telegram-webhook", "slack-socket", "slack-http")
LONG = "word " * 600
every_way = pytest.mark.parametrize("way", WAYS)
both_languages = pytest.mark.parametrize("language", ["en", "zh"])


@dataclass(frozen=True)
class Said:
    """What became of a message of the bot."""

    text: str
    labels: tuple[str, ...]
    message: Any


class Place(Protocol):
    """A private conversation with the bot, on one platform, for each person by number; 0 operates the channel."""

    here: RunningService

    async def meet(self, who: int, language: str) -> None: ...
    async def tell(self, who: int, text: str) -> Said: ...
    async def send(self, who: int, text: str = "", *, data: bytes = b"") -> Said: ...
    async def press(self, who: int, said: Said, label: str) -> None: ...
    async def dislike(self, who: int, said: Said, language: str) -> None: ...
    async def chosen(self, said: Said, label: str) -> None: ...
    def all(self, who: int) -> list[Said]: ...


@dataclass
class InTelegram:
    it: telegram.Talk
    people: dict[int, Person] = field(default_factory=dict)

    @property
    def here(self) -> RunningService:
        return self.it.here

    async def meet(self, who: int, language: str) -> None:
        number = telegram.OWNER.id if who == 0 else 1000 + who
        self.people[who] = Person(number, f"P{who}", {"zh": "zh-hans"}.get(language, language))

    async def tell(self, who: int, text: str) -> Said:
        return self._said(await self.it.ask(self.people[who], text))

    async def send(self, who: int, text: str = "", *, data: bytes = b"") -> Said:
        if not data:
            return self._said(await self.it.ask(self.people[who], photo=photo()))
        self.it.there.files["F1"] = data
        return self._said(await self.it.ask(self.people[who], caption=text, document=document("faq.jsonl")))

    async def press(self, who: int, said: Said, label: str) -> None:
        await self.it.press(self.people[who], said.message, label)

    async def dislike(self, who: int, said: Said, language: str) -> None:
        """A thumb down, and why."""
        await self.press(who, said, "👎")
        why = say(language, "feedback.reason_untrue")
        await self.it.there.until(lambda: why in said.message.labels)
        await self.press(who, said, why)

    async def chosen(self, said: Said, label: str) -> None:
        """Until that stands where the buttons were; pressing it does nothing."""
        await self.it.there.until(lambda: said.message.labels == [f"✓ {label}"])
        assert said.message.text == said.text
        rows = await self.here.count("inbox")
        await self.press(0, said, f"✓ {label}")
        assert await self.here.count("inbox") == rows
        assert not self.it.there.answered[-1][1]

    def all(self, who: int) -> list[Said]:
        return [self._said(one) for one in self.it.there.held(self.people[who].id)]

    def _said(self, sent: Sent) -> Said:
        return Said(sent.text, tuple(sent.labels), sent)


@dataclass
class InSlack:
    it: slack.Talk
    threads: dict[int, str] = field(default_factory=dict)

    @property
    def here(self) -> RunningService:
        return self.it.here

    async def meet(self, who: int, language: str) -> None:
        user = self._user(who)
        self.it.there.locales[user] = {"zh": "zh-CN"}.get(language, "en-US")
        await self.it.there.deliver(self.it.there.opens_home(user, tab="messages"))
        await self.it.until_known(user)

    async def tell(self, who: int, text: str) -> Said:
        return await self._write(who, f" {text}" if text[:1] == "/" else text)  # how a command stays in its thread

    async def send(self, who: int, text: str = "", *, data: bytes = b"") -> Said:
        self.it.there.files["F1"] = data
        file = {"id": "F1", "name": "faq.jsonl", "size": len(data)}
        return await self._write(who, text.lstrip("/"), subtype="file_share", files=[file])

    async def press(self, who: int, said: Said, label: str) -> None:
        pressed = {"👍": "+", "👎": "-"}.get(label, label)
        await self.it.there.deliver(self.it.there.press(self._user(who), said.message, pressed))
        await self.it.settled()

    async def dislike(self, who: int, said: Said, language: str) -> None:
        await self.press(who, said, "👎")

    async def chosen(self, said: Said, label: str) -> None:
        """Until that stands where the buttons were."""
        held = said.message
        await self.it.there.until(lambda: not held.labels)
        assert held.blocks[-1] == {"type": "context", "elements": [{"type": "plain_text", "text": f"✓ {label}"}]}
        assert held.said == said.text

    def all(self, who: int) -> list[Said]:
        return [self._said(one) for one in self.it.there.held(f"D{self._user(who)}")]

    async def _write(self, who: int, text: str, **more: Any) -> Said:
        payload = self.it.there.message(self._user(who), text, thread_ts=self.threads.get(who), **more)
        self.threads.setdefault(who, payload["event"]["ts"])
        return self._said(await self.it.answer(payload))

    def _user(self, who: int) -> str:
        return f"UP{who}" if who else "UOWNER"

    def _said(self, held: Held) -> Said:
        thumbs = ("👍", "👎") if any(one["type"] == "feedback_buttons" for one in held.buttons) else ()
        return Said(held.said, (*held.labels, *thumbs), held)


@asynccontextmanager
async def place(way: str, folder: Path, answers: Answers | None = None, **more: Any) -> AsyncIterator[Place]:
    platform, _, how = way.partition("-")
    if platform == "telegram":
        async with telegram.talk(folder, answers, webhook=how == "webhook", **more) as in_telegram:
            yield InTelegram(in_telegram)
    else:
        async with slack.talk(folder, answers, http=how == "http", **more) as in_slack:
            yield InSlack(in_slack)


def bare(text: str) -> str:
    """What was said, without what is each platform's own: markup, and how a command is typed."""
    plain = re.sub(r"[*`]", "", text.replace("/distributary ", "/"))
    return " ".join(re.sub(r"^\s*[-•]\s*", "", plain, flags=re.MULTILINE).split())


# Who (0 operates the channel), what they say, and the sentence that the answer holds: its key and its fields.
Step = tuple[int, str, str, dict[str, object]]
DIALOGUES: dict[str, list[Step]] = {
    "a mistyped command": [
        (1, "/hlep", "help.help", {}),
    ],
    "a new conversation": [
        (1, "/new", "users.new", {}),
        (1, "/retry", "service.nothing_to_retry", {}),
    ],
    "nothing runs": [
        (1, "/stop", "users.nothing_to_stop", {}),
    ],
    "usage of somebody new": [
        (1, "/usage", "users.usage_none", {}),
    ],
    "who is who": [
        (1, "/whoami", "users.rights_anyone", {}),
        (0, "/whoami", "users.rights_owner", {}),
    ],
    "operators' commands": [
        (1, "/channel show", "error.not_allowed", {}),
        (1, "/finetune list", "error.not_allowed", {}),
        (0, "/channel set per_minute=many", "setting.whole", {"low": "0", "high": "1000000000"}),
        (0, "/channel set per_minute=90", "operators.set_line", {"key": "per_minute", "before": 0, "after": 90}),
        (0, "/channel set per_minute=0", "operators.set_line", {"key": "per_minute", "before": 90, "after": 0}),
        (0, "/finetune list", "training.none", {}),
        (0, "/finetune", "training.no_dataset", {}),
        (0, "/adapter show acme@9", "adapter.no_version", {"typed": "acme@9", "known": "base"}),
        (0, "/adapter promote base", "adapter.already", {"label": "base"}),
        (0, "/claim ABCD-EFGH-JKMN", "users.claim_bad", {}),
    ],
    "privacy": [
        (1, "/consent on", "privacy.consent_on", {"title": "Acme"}),
        (1, "/consent off", "privacy.consent_off", {"title": "Acme"}),
        (1, "/forget", "privacy.forget_ask", {}),
    ],
}


@every_way
@both_languages
async def test_the_table_of_dialogues(tmp_path: Path, way: str, language: str) -> None:
    async with place(way, tmp_path) as it:
        await it.meet(0, language)
        for number, (name, steps) in enumerate(DIALOGUES.items(), start=1):
            await it.meet(number, language)
            for who, text, key, fields in steps:
                said = await it.tell(number if who else 0, text)
                assert bare(say(language, key, **fields)) in bare(said.text), (name, text)
        assert await it.here.count("ledger") == 0


@every_way
@both_languages
async def test_questions_are_one_conversation_until_a_new_one_is_begun(tmp_path: Path, way: str, language: str) -> None:
    async with place(way, tmp_path) as it:
        await it.meet(1, language)
        first = await it.tell(1, "one")
        assert first.text == "you said one"
        assert set(first.labels) == {say(language, "service.again"), "👍", "👎"}
        await it.tell(1, "two")
        await it.tell(1, "/new")
        await it.tell(1, "three")
        assert [len(request.messages) for request in it.here.engine.requests] == [1, 3, 1]
        assert await it.here.count("ledger") == 3


@every_way
async def test_again_continue_and_thumbs(tmp_path: Path, way: str) -> None:
    async with place(way, tmp_path, lambda request: LONG if len(request.messages) == 1 else "the rest") as it:
        await it.meet(1, "en")
        cut = await it.tell(1, "tell me all")
        assert cut.labels[0] == say("en", "service.continue")
        await it.press(1, cut, say("en", "service.continue"))
        rest = it.all(1)[-1]
        assert rest.text == "the rest"
        await it.press(1, rest, say("en", "service.again"))
        again = it.all(1)[-1]
        assert (again.text, len(it.all(1))) == ("the rest", 3)
        await it.press(1, again, "👍")
        await it.press(1, again, "👎")
        votes = await it.here.database.read(
            lambda tx: tx.all("SELECT vote, adapter FROM feedback JOIN generation ON id = generation_id")
        )
        assert votes == [{"vote": -1, "adapter": None}]
        assert await it.here.count("ledger") == 3


@every_way
@both_languages
async def test_after_a_thumb_down_this_one_conversation_can_be_given_and_is_corrected(
    tmp_path: Path, way: str, language: str
) -> None:
    async with place(way, tmp_path) as it:
        await it.here.database.write(lambda tx: set_exceptions(tx, ["slack"]))
        for who in (0, 1, 2):
            await it.meet(who, language)
        for who, answer in ((1, "yes"), (2, "no")):
            reply = await it.tell(who, f"how long does a permit take, asks {who}?")
            await it.dislike(who, reply, language)
            asked = it.all(who)[-1]
            assert asked.text == say(language, "feedback.may_we")
            assert asked.labels == (say(language, "feedback.yes"), say(language, "feedback.no"))
            await it.press(who, asked, say(language, f"feedback.{answer}"))
            await it.chosen(asked, say(language, f"feedback.{answer}"))
            told = say(language, "feedback.shared" if answer == "yes" else "feedback.not_shared")
            assert bare(it.all(who)[-1].text) == bare(told)
        waiting = await it.tell(0, "/correct")
        assert "asks 1?" in waiting.text
        assert "asks 2?" not in waiting.text
        (number,) = re.findall("#[0-9a-f]{8}", waiting.text)
        corrected = await it.tell(0, f"/correct {number} It takes 20 days.")
        assert bare(say(language, "feedback.corrected")) in bare(corrected.text)
        await it.tell(0, "and without a plan?")
        await it.tell(0, "/correct Never.")  # the last reply here, the operator's own
        learned = await it.here.database.read(lambda tx: examples_of(tx, _channel(tx)).examples)
        assert [one.messages[-1]["content"] for one in learned] == ["It takes 20 days.", "Never."]
        await it.tell(1, "/consent off")
        learned = await it.here.database.read(lambda tx: examples_of(tx, _channel(tx)).examples)
        assert [one.messages[-1]["content"] for one in learned] == ["Never."]


def _channel(tx: Tx) -> int:
    return int(tx.value("SELECT id FROM channel WHERE name = 'acme'"))


@pytest.mark.parametrize("way", ["slack-socket", "slack-http"])
async def test_what_may_never_be_used_is_not_asked_for_nor_kept(tmp_path: Path, way: str) -> None:
    async with place(way, tmp_path) as it:
        await it.meet(0, "en")
        await it.tell(0, "/consent on")
        reply = await it.tell(0, "how long?")
        await it.press(0, reply, "👍")
        await it.dislike(0, reply, "en")
        assert it.all(0)[-1].text == reply.text
        assert bare((await it.tell(0, "/correct 20 days")).text) == bare(
            say("en", "feedback.platform_stays_out", platform="slack")
        )
        assert await it.here.count("example") == 0


@every_way
@both_languages
async def test_what_has_no_text_is_answered_politely(tmp_path: Path, way: str, language: str) -> None:
    async with place(way, tmp_path) as it:
        await it.meet(1, language)
        assert (await it.send(1)).text == say(language, "service.text_only")
        assert await it.here.count("generation") == 0


@every_way
@both_languages
async def test_what_breaks_inside_is_said_and_not_charged(tmp_path: Path, way: str, language: str) -> None:
    def answer(request: Request) -> str | AppError:
        return EngineError() if request.messages[-1].text == "break" else "fine"

    async with place(way, tmp_path, answer) as it:
        await it.meet(1, language)
        assert (await it.tell(1, "break")).text == say(language, "error.engine")
        assert (await it.tell(1, "go on")).text == "fine"
        assert await it.here.count("ledger") == 1


@every_way
@both_languages
async def test_a_limit_is_said_once_and_nothing_is_charged_beyond_it(tmp_path: Path, way: str, language: str) -> None:
    async with place(way, tmp_path) as it:
        await it.meet(1, language)
        await it.here.database.write(lambda tx: tx.run("UPDATE channel SET per_minute = 1"))
        await it.tell(1, "one")
        refused = await it.tell(1, "two")
        assert refused.text.startswith(say(language, "error.limit_minute", limit=1, wait="…").partition("…")[0])
        assert await it.here.count("ledger") == 1


@every_way
async def test_an_invitation_makes_an_operator_who_is_known_until_taken_back(tmp_path: Path, way: str) -> None:
    async with place(way, tmp_path) as it:
        await it.meet(0, "en")
        await it.meet(1, "en")
        invited = await it.tell(0, "/operator invite acme Kim")
        found = re.search(r"[0-9A-Z]{4}(-[0-9A-Z]{4}){2}", invited.text)
        assert found is not None
        assert bare((await it.tell(1, f"/claim {found[0]}")).text) == bare(
            say("en", "users.claim_channel", title="Acme")
        )
        assert "acme" in (await it.tell(1, "/channel list")).text
        assert bare((await it.tell(1, f"/claim {found[0]}")).text) == bare(say("en", "users.claim_bad"))
        number = await it.here.database.read(lambda tx: tx.value("SELECT id FROM operator WHERE label = 'Kim'"))
        await it.tell(0, f"/operator remove {number}")
        assert (await it.tell(1, "/channel list")).text == say("en", "error.not_allowed")


@every_way
@both_languages
async def test_a_file_becomes_a_version_in_service_and_goes_out_again(tmp_path: Path, way: str, language: str) -> None:
    async with place(way, tmp_path, trainer=COMMAND) as it:
        await it.meet(0, language)
        started = await it.send(0, "/finetune", data=b'{"word": "plain"}\n')
        assert "faq.jsonl" in started.text
        start = say(language, "training.button_start")
        (question,) = [one for one in it.all(0) if start in one.labels]
        await it.press(0, question, say(language, "training.button_preview"))
        assert question.message.labels == list(question.labels)  # which was no answer to it
        await it.press(0, question, start)
        await it.chosen(question, start)
        (report,) = [one for one in it.all(0) if promote_button(language, "acme@1").text in one.labels]
        assert bare(say(language, "training.verdict_passed", label="acme@1", champion="base")) in bare(report.text)
        await it.press(0, report, promote_button(language, "acme@1").text)
        champion = await it.here.database.read(
            lambda tx: tx.value("SELECT champion FROM adapter_name WHERE name = 'acme'")
        )
        answer = await it.tell(0, "from which?")
        await it.press(0, answer, "👍")
        voted = await it.here.database.read(
            lambda tx: tx.all("SELECT vote, adapter FROM feedback JOIN generation ON id = generation_id")
        )
        assert champion
        assert voted == [{"vote": 1, "adapter": champion}]
        await it.tell(0, "/adapter rollback")
        assert not await it.here.database.read(
            lambda tx: tx.value("SELECT champion FROM adapter_name WHERE name = 'acme'")
        )


@every_way
async def test_forgetting_leaves_nothing_of_what_was_said(tmp_path: Path, way: str) -> None:
    async with place(way, tmp_path) as it:
        await it.meet(1, "en")
        await it.tell(1, "my secret is blue")
        await it.tell(1, "/forget yes")
        assert await it.here.count("turn") == 0
        await it.tell(1, "what is my secret?")
        assert len(it.here.engine.requests[-1].messages) == 1


@every_way
async def test_an_archived_channel_says_so(tmp_path: Path, way: str) -> None:
    def archived(tx: Tx) -> None:
        found = directory.channel_by_name(tx, "acme")
        assert found is not None
        directory.archive(tx, found.id)

    async with place(way, tmp_path) as it:
        await it.meet(1, "en")
        await it.here.database.write(archived)
        assert bare((await it.tell(1, "hello")).text) == bare(say("en", "service.no_channel"))
        assert await it.here.count("generation") == 0
