"""The flow: accept, take, answer, deliver, settle; and what a person sees when something is wrong."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from core.channels import bindings, directory, people
from core.chat import handler, inbox
from core.chat.admission import AdmissionQueue, PendingReply
from core.chat.inbox import InboxRow
from core.commands.table import Call
from core.delivery import retry
from core.engine.protocol import Request, Scope
from core.errors import BadCommand, EngineError, Overloaded
from core.i18n.messages import say
from core.platform import Unreachable
from core.storage.cipher import Cipher
from core.storage.database import Tx, now_ms
from core.types import Address, Attachment, Body, Handle, Incoming, Kind, Lane, Receipt, Role
from core.usage import ledger
from tests.support.running_service import OWNER, FakeBot, running_service
from tests.support.waiting import DEADLINE_S


async def test_a_question_is_answered_and_charged_once(tmp_path: Path) -> None:
    async with running_service(tmp_path) as it:
        assert await it.ask("hello there") == "you said hello there"
        row = await it.database.read(lambda tx: tx.one("SELECT * FROM ledger"))
        assert row is not None
        assert row["gross_nano"] == row["tokens_in"] * 150 + row["tokens_out"] * 600
        assert row["partner_nano"] == row["gross_nano"] * 3000 // 10_000
        assert await it.database.read(ledger.check) == []


async def test_a_command_is_parsed_when_its_row_is_accepted_and_when_it_is_taken(tmp_path: Path) -> None:
    async with running_service(tmp_path, running=False) as it:
        await it.send("/stop it")
        await it.send("/adapter promote 4 since it's better")
        await it.send("/adaptor", conversation="d")
        await it.send("Again", kind=Kind.PRESS, command="/retry", conversation="e")
        await it.send("is 1/2 = /?", conversation="f")
        rows = await it.database.write(lambda tx: inbox.take(tx, 10, {("fake", "bot")}, ()))
    read = {row.id: (row.lane, row.text, row.command) for row in rows}
    assert [lane for lane, _, _ in read.values()].count(Lane.CONTROL) == 1
    calls = {one.action: one.arguments for _, _, one in read.values() if isinstance(one, Call)}
    assert calls == {"stop": {}, "adapter promote": {"version": "4", "reason": "since it's better"}, "retry": {}}
    assert [one.fields["nearest"] for _, _, one in read.values() if isinstance(one, BadCommand)] == ["/adapter"]
    assert [text for _, text, one in read.values() if one is None] == ["is 1/2 = /?"]
    assert [text for _, text, one in read.values() if isinstance(one, Call)] == ["", "", "Again"]


async def test_that_a_reply_is_a_retry_is_stored_with_it(tmp_path: Path) -> None:
    async with running_service(tmp_path) as it:
        await it.ask("hello")
        await it.ask("Again", kind=Kind.PRESS, command="/retry")
        rows = await it.database.read(lambda tx: tx.all("SELECT retry FROM generation ORDER BY inbox_id"))
        assert [row["retry"] for row in rows] == [0, 1]
        assert await it.count("turn") == 2


async def test_a_repeat_is_a_no_op(tmp_path: Path) -> None:
    async with running_service(tmp_path) as it:
        for _ in range(3):
            await it.send("hello", key="same")
        await it.settled()
        assert it.bot.said() == ["you said hello"]
        assert await it.count("ledger") == 1


async def test_turns_of_a_conversation_are_in_order_and_others_do_not_wait(tmp_path: Path) -> None:
    async with running_service(tmp_path, delay_s=0.002) as it:
        for n in range(4):
            await it.send(f"a{n}", conversation="a", user="ann")
            await it.send(f"b{n}", conversation="b", user="bob")
        await it.settled()
        said = it.bot.said()
        for name in "ab":
            assert [text for text in said if text.startswith(f"you said {name}")] == [
                f"you said {name}{n}" for n in range(4)
            ]
        last = next(request for request in it.engine.requests if request.messages[-1].text == "a3")
        assert [turn.text for turn in last.messages if turn.role is Role.USER] == ["a0", "a1", "a2", "a3"]


async def test_stop_makes_the_visible_text_the_final_one_and_it_is_charged(tmp_path: Path) -> None:
    async with running_service(tmp_path, lambda _: "word " * 500, delay_s=0.005) as it:
        await it.send("talk")
        await it.bot.showing.wait()
        await it.send("", kind=Kind.STOP)
        await it.settled()
        (said,) = it.bot.said()
        assert 0 < len(said) < len("word " * 500)
        row = await it.database.read(lambda tx: tx.one("SELECT tokens_out FROM ledger"))
        assert row is not None
        assert row["tokens_out"] == len(said.split())


@pytest.mark.parametrize(("text", "kind"), [("", Kind.STOP), ("/stop", Kind.MESSAGE)])
async def test_a_stop_before_the_first_word_is_kept_to(tmp_path: Path, text: str, kind: Kind) -> None:
    opening, opened = asyncio.Event(), asyncio.Event()
    async with running_service(tmp_path) as it:
        open_now = it.bot.open

        async def open_slowly(to: Address) -> Handle:
            if not opening.is_set():
                opening.set()
                await opened.wait()
            return await open_now(to)

        it.bot.open = open_slowly  # type: ignore[method-assign]
        await it.send("talk")
        await opening.wait()
        await it.send(text, kind=kind)
        while not await it.count("inbox", "lane = 'control' AND state = 'done'"):  # noqa: ASYNC110 - until the stop is told
            await asyncio.sleep(0.01)
        opened.set()
        await it.settled()
        assert it.bot.said()[-1] == say("en", "service.stopped")
        assert it.engine.requests == []
        assert await it.count("ledger") == 0


@pytest.mark.parametrize(("text", "kind"), [("", Kind.STOP), ("/stop", Kind.MESSAGE)])
async def test_a_question_and_its_stop_may_wait_together(tmp_path: Path, text: str, kind: Kind) -> None:
    async with running_service(tmp_path, running=False) as it:
        await it.send("talk")
        await it.send(text, kind=kind)
    async with running_service(tmp_path) as it:
        await it.settled()
        assert say("en", "service.stopped") in it.bot.said()
        assert it.engine.requests == []


async def test_a_stop_is_for_what_is_being_answered_and_not_for_what_waits(tmp_path: Path) -> None:
    async with running_service(tmp_path, lambda request: f"{request.messages[-1].text} " * 200, delay_s=0.005) as it:
        await it.send("one")
        await it.send("two")
        await it.bot.showing.wait()
        await it.send("", kind=Kind.STOP)
        await it.settled()
        one, two = it.bot.said()
        assert len(one.split()) < 200
        assert two.split() == ["two"] * 200


@pytest.mark.parametrize(("text", "kind"), [("", Kind.STOP), ("/stop", Kind.MESSAGE), ("/forget yes", Kind.MESSAGE)])
async def test_nobody_stops_what_another_asked_for(tmp_path: Path, text: str, kind: Kind) -> None:
    async with running_service(tmp_path, lambda _: "word " * 100, delay_s=0.005) as it:
        await it.send("talk", user="ann")
        await it.bot.showing.wait()
        await it.send(text, kind=kind, user="bob")
        await it.settled()
        assert len(it.bot.said()[0].split()) == 100
        if text == "/stop":
            assert it.bot.said()[1] == say("en", "users.not_yours_to_stop")


@pytest.mark.parametrize(("text", "kind"), [("", Kind.STOP), ("/stop", Kind.MESSAGE)])
async def test_an_operator_stops_what_anybody_asked_for(tmp_path: Path, text: str, kind: Kind) -> None:
    async with running_service(tmp_path, lambda _: "word " * 100, delay_s=0.005) as it:
        await it.send("talk", user="ann")
        await it.bot.showing.wait()
        await it.send(text, kind=kind, user=OWNER)
        await it.settled()
        assert 0 < len(it.bot.said()[0].split()) < 100
        assert it.bot.said()[1:] == [say("en", "users.stop")] * bool(text)


@pytest.mark.parametrize(("user", "answered"), [("ann", False), ("bob", True), (OWNER, False)])
async def test_a_stop_that_waits_beside_a_question_is_for_those_who_may(
    tmp_path: Path, user: str, answered: bool
) -> None:
    async with running_service(tmp_path, running=False) as it:
        await it.send("talk", user="ann")
        await it.send("/stop", user=user)
    async with running_service(tmp_path) as it:
        await it.settled()
        assert ("you said talk" in it.bot.said()) is answered
        assert (say("en", "service.stopped") in it.bot.said()) is not answered


async def test_an_engine_error_is_seen_and_not_charged(tmp_path: Path) -> None:
    async with running_service(tmp_path, lambda _: EngineError(detail="boom")) as it:
        said = await it.ask("hello")
        assert said == say("en", "error.engine")
        assert await it.count("ledger") == 0
        assert await it.count("inbox", "state = 'done' AND outcome = 'failed'") == 1


async def test_a_bug_inside_never_leaves_a_person_without_an_answer(tmp_path: Path) -> None:
    def broken(_: Request) -> str:
        raise ZeroDivisionError

    async with running_service(tmp_path, broken) as it:
        assert await it.ask("hello")
        assert await it.count("inbox", "state IN ('new', 'running')") == 0


async def test_the_limit_is_said_once_with_when_it_ends(tmp_path: Path) -> None:
    async with running_service(tmp_path) as it:
        for n in range(9):
            await it.send(f"m{n}")
        await it.settled()
        said = it.bot.said()
        assert len(said) == 7
        assert "6" in said[-1]
        assert await it.count("ledger") == 6
        assert await it.count("inbox", "outcome = 'refused_quietly'") == 2


async def test_a_limit_is_said_after_any_other_refusal_and_in_each_place(tmp_path: Path) -> None:
    def bind(tx: Tx) -> None:
        channel = directory.channel_by_name(tx, "acme")
        assert channel is not None
        bindings.bind(tx, "fake", "bot", "another", channel.id)

    async with running_service(tmp_path) as it:
        await it.database.write(bind)
        await it.ask("/fintune x")
        for n in range(6):
            await it.ask(f"m{n}")
        for place in ("p", "another"):
            assert "6 messages" in await it.ask("one too many", place=place, conversation=place)
        assert await it.count("inbox", "outcome = 'limited'") == 2


async def test_a_clock_that_was_ahead_locks_nobody_out(tmp_path: Path) -> None:
    ahead_ms = 30 * 86_400_000
    async with running_service(tmp_path, clock=lambda: now_ms() + ahead_ms) as it:
        await it.database.write(lambda tx: tx.run("UPDATE channel SET per_minute = 2"))
        await it.ask("one")
        await it.ask("two")
        ahead_ms = 0
        assert await it.ask("three") == "you said three"


@pytest.mark.parametrize(
    ("text", "attachments", "key"),
    [
        ("", (), "service.empty_message"),
        ("   \n ", (), "service.empty_message"),
        ("", (Attachment("f", "photo.jpg"),), "service.text_only"),
    ],
)
async def test_a_message_without_text_gets_a_polite_answer(
    tmp_path: Path, text: str, attachments: tuple[Attachment, ...], key: str
) -> None:
    async with running_service(tmp_path) as it:
        assert await it.ask(text, attachments=attachments) == say("en", key)
        assert await it.ask(text, attachments=attachments, language="zh") == say("zh", key)


async def test_a_megabyte_is_refused_with_its_size_and_not_kept(tmp_path: Path) -> None:
    async with running_service(tmp_path) as it:
        said = await it.ask("x" * 1_000_000)
        assert "1000000" in said.replace(",", "").replace(" ", "")
        assert it.home.database.stat().st_size < 700_000


async def test_a_file_whose_name_no_text_can_hold_is_taken(tmp_path: Path) -> None:
    async with running_service(tmp_path, running=False) as it:
        await it.send("look", attachments=(Attachment("id", "\ud800.jsonl", media_type="text/\udfff"),))
        (row,) = await it.database.write(lambda tx: inbox.take(tx, 1, {("fake", "bot")}, ()))
        assert row.attachments == (Attachment("id", "?.jsonl", media_type="text/?"),)


async def test_nul_and_lone_surrogates_are_answered(tmp_path: Path) -> None:
    async with running_service(tmp_path) as it:
        assert await it.ask("a\x00b\ud83d") == "you said a\ufffdb?"


async def test_a_place_without_a_channel_gets_a_polite_refusal(tmp_path: Path) -> None:
    async with running_service(tmp_path) as it:
        assert await it.ask("hello", place="elsewhere") == say("en", "service.no_channel")
        assert await it.count("generation") == 0


async def test_an_unknown_command_names_the_nearest(tmp_path: Path) -> None:
    async with running_service(tmp_path) as it:
        assert "/finetune" in await it.ask("/fintune faq.jsonl", user=OWNER)
        assert it.engine.requests == []


async def test_retry_answers_the_last_question_again_and_replaces_the_answer(tmp_path: Path) -> None:
    async with running_service(tmp_path, lambda request: f"{request.sampling.seed} {len(request.messages)}") as it:
        first = await it.ask("hello")
        second = await it.ask("/retry")
        assert first != second
        await it.ask("and now")
        last = it.engine.requests[-1]
        assert [turn.text for turn in last.messages] == ["hello", second, "and now"]
        assert await it.count("ledger") == 3


@pytest.mark.slow
async def test_a_platform_that_is_away_gets_the_answer_later_and_once(tmp_path: Path) -> None:
    async with running_service(tmp_path) as it:
        it.bot.faults = 2
        assert await it.ask("hello") == "you said hello"
        assert await it.count("ledger") == 1


async def test_an_adapter_of_another_base_model_never_answers_from_the_base(tmp_path: Path) -> None:
    async with running_service(tmp_path) as it:

        def promote(tx: Tx) -> None:
            tx.insert(
                "adapter",
                sha256="a" * 64,
                name="acme",
                version=1,
                base_fingerprint="another model",
                manifest="{}",
                created_ms=1,
            )
            tx.run("UPDATE adapter_name SET champion = ? WHERE name = 'acme'", ["a" * 64])

        await it.database.write(promote)
        assert "acme@1" in await it.ask("hello")
        assert it.engine.requests == []
        assert await it.count("ledger") == 0


async def test_after_a_crash_the_owed_answer_is_given_first_and_once(tmp_path: Path) -> None:
    async with running_service(tmp_path, running=False) as it:
        await it.send("first")
        await it.database.write(lambda tx: inbox.take(tx, 10, {("fake", "bot")}, ()))
    async with running_service(tmp_path) as it:
        await it.send("second", key="second")
        await it.settled()
        assert it.bot.said() == ["you said first", "you said second"]
        assert await it.count("ledger") == 2


async def test_an_unreadable_update_is_kept_and_stops_nothing(tmp_path: Path) -> None:
    async with running_service(tmp_path) as it:
        await it.service.accept_dead("fake", "bot", "bad", '{"update_id": 1, "new_field": {}}')
        assert await it.ask("hello") == "you said hello"
        assert await it.count("inbox", "state = 'dead' AND outcome = 'unreadable'") == 1


async def test_a_row_of_another_key_is_given_up_and_stops_nothing(tmp_path: Path) -> None:
    async with running_service(tmp_path, running=False) as it:
        await it.send("lost", key="lost")
        sealed = Cipher(b"x" * 32).seal("{}")
        await it.database.write(lambda tx: tx.run("UPDATE inbox SET payload = ?", [sealed]))
    async with running_service(tmp_path) as it:
        assert await it.ask("hello", conversation="other") == "you said hello"
        assert it.bot.said()[0] == say("en", "error.unreadable_message")
        assert await it.count("inbox", "state = 'dead' AND outcome = 'unreadable' AND update_key = 'lost'") == 1


async def test_a_stop_that_cannot_be_read_says_nothing(tmp_path: Path) -> None:
    async with running_service(tmp_path, running=False) as it:
        await it.send("", kind=Kind.EDIT)
        await it.database.write(lambda tx: tx.run("UPDATE inbox SET payload = ?", [Cipher(b"x" * 32).seal("{}")]))
    async with running_service(tmp_path) as it:
        await it.settled()
        assert it.bot.said() == []
        assert await it.count("inbox", "state = 'done'") == 1


async def test_a_store_that_has_no_time_delays_a_refusal_and_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retry, "STORAGE_S", 0.05)
    busy = ["_close_limited", "_give_up"]

    def busy_once(name: str, step: Callable[[Tx, InboxRow], object]) -> Callable[[Tx, InboxRow], object]:
        def work(tx: Tx, row: InboxRow) -> object:
            if name in busy:
                busy.remove(name)
                raise Overloaded(retry_after_s=5)
            return step(tx, row)

        return work

    for name in busy:
        monkeypatch.setattr(handler, name, busy_once(name, getattr(handler, name)))
    async with running_service(tmp_path) as it:
        for n in range(8):
            await it.send(f"m{n}", user="fast")
        await it.settled()
        assert sum("6" in text for text in it.bot.said()) == 1  # that of the seventh; the eighth is not told again
        monkeypatch.setattr(it.bot, "finish", unreachable)
        await it.send("lost", user="other", key="lost")
        await it.settled()
        assert busy == []
        assert await it.count("inbox", "outcome = 'unconfirmed' AND update_key = 'lost'") == 1


async def unreachable(handle: Handle, body: Body) -> Receipt:
    raise Unreachable


@pytest.mark.parametrize("step", ["begun", "settled"])
async def test_what_the_tables_forbid_is_no_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """A bug of ours costs one row, and holds up no conversation."""
    monkeypatch.setattr(retry, "BOUND_S", 0.3)

    def twice(tx: Tx, *_: object) -> None:
        for _ in range(2):
            tx.insert("setting", key="once", value="")

    async with running_service(tmp_path) as it:
        with monkeypatch.context() as patched:
            patched.setattr(*((people, "touch") if step == "begun" else (ledger, "charge")), twice)
            await it.send("hello")
            async with asyncio.timeout(DEADLINE_S):
                await it.settled()
        if step == "begun":
            assert it.bot.said() == [say("en", "error.internal")]
        assert await it.count("inbox", f"outcome = '{'failed' if step == 'begun' else 'unconfirmed'}'") == 1
        assert await it.count("ledger") == 0
        assert await it.ask("again") == "you said again"
        assert await it.database.read(ledger.check) == []


@pytest.mark.parametrize("answer", ["", "  \n"])
async def test_the_tokens_of_an_answer_that_says_nothing_are_kept_for_cost(tmp_path: Path, answer: str) -> None:
    async with running_service(tmp_path, lambda _: answer) as it:
        assert await it.ask("hello there") == say("en", "service.empty")
        row = await it.database.read(lambda tx: tx.one("SELECT state, tokens_in FROM generation"))
        assert row is not None
        assert row["state"] == "failed"
        assert row["tokens_in"] > 0
        assert await it.count("ledger") == 0
        assert await it.database.read(ledger.check) == []


@pytest.mark.parametrize(
    "damaged", [Cipher(b"x" * 32).seal("hello"), b"", b"\x00" * 40], ids=["of another key", "nothing", "zeros"]
)
async def test_a_conversation_that_cannot_be_read_is_said_to_be_so(tmp_path: Path, damaged: bytes) -> None:
    async with running_service(tmp_path) as it:
        await it.ask("hello")
        await it.database.write(lambda tx: tx.run("UPDATE turn SET text = ? WHERE role = 'user'", [damaged]))
        for again in ("and then?", "/retry"):
            assert await it.ask(again) == say("en", "error.unreadable")
        assert await it.count("ledger") == 1 == await it.count("generation")
        assert await it.count("inbox", "outcome = 'unreadable'") == 2
        assert await it.ask("hello", conversation="other") == "you said hello"
        await it.ask("/new")
        assert await it.ask("hello") == "you said hello"
        assert await it.database.read(ledger.check) == []


async def test_an_answer_that_cannot_be_read_any_more_is_not_charged(tmp_path: Path) -> None:
    with suppress(ExceptionGroup):
        async with running_service(tmp_path) as it:
            it.bot.faults = 1_000
            await it.send("hello")
            while not await it.count("inbox", "state = 'generated'"):  # noqa: ASYNC110 - until it is stored
                await asyncio.sleep(0.01)
            sealed = Cipher(b"x" * 32).seal("{}")
            await it.database.write(lambda tx: tx.run("UPDATE delivery SET body = ?", [sealed]))
            raise ConnectionError("the program is cut here")
    async with running_service(tmp_path) as it:
        await it.settled()
        assert [body.text for body in it.bot.failed.values()] == [say("en", "error.unreadable")]
        assert it.bot.final == {}
        assert await it.count("ledger") == 0
        assert await it.count("generation", "state = 'failed'") == 1
        assert await it.database.read(ledger.check) == []
        assert await it.ask("hello", key="again") == "you said hello"


async def test_drain_cuts_at_the_deadline_and_the_text_so_far_is_the_answer(tmp_path: Path) -> None:
    async with running_service(tmp_path, lambda _: "word " * 5000, delay_s=0.01) as it:
        await it.send("talk")
        await it.bot.showing.wait()
        async with asyncio.timeout(DEADLINE_S):
            await it.service.drain(1.0)
        assert it.bot.said()[0].startswith("word")
        assert await it.count("ledger") == 1


async def test_a_thumb_is_kept_for_the_person_who_was_answered_alone(tmp_path: Path) -> None:
    async with running_service(tmp_path) as it:
        await it.ask("hello")
        (body,) = it.bot.final.values()
        up = next(button for button in body.buttons if button.value.endswith(":1"))
        for user in ("someone-else", "stranger-id", "stranger-id"):
            await it.send("", kind=Kind.PRESS, action=up.action, value=up.value, user=user)
        await it.settled()
        assert await it.count("feedback") == 1


async def test_the_price_of_a_reply_is_the_one_when_it_began(tmp_path: Path) -> None:
    async with running_service(tmp_path, lambda _: "word " * 50, delay_s=0.005) as it:
        await it.send("talk")
        await it.bot.showing.wait()
        await it.ask("/channel set acme price_out=9999", user=OWNER, conversation="other")
        await it.settled()
        price = await it.database.read(
            lambda tx: tx.value("SELECT out_nano FROM ledger JOIN price ON price.id = price_id")
        )
        assert price == 600


async def test_the_engine_hears_of_the_partners_weight(tmp_path):
    async with running_service(tmp_path) as here:
        await here.database.write(lambda tx: tx.run("UPDATE partner SET weight = 2.5"))
        await here.ask("hello")
        assert here.engine.requests[-1].scope.weight == 2.5


# --- who goes first ---


def bind_beta(tx: Tx, platform: str, account: str, place: str) -> None:
    bindings.bind(tx, platform, account, place, directory.create_channel(tx, "beta").id)


@pytest.mark.parametrize("step", ["open", "finish"])
async def test_a_platform_that_is_away_holds_up_no_other(tmp_path: Path, step: str) -> None:
    back = asyncio.Event()
    async with running_service(tmp_path, max_replies=2) as it:
        here = FakeBot()
        await it.database.write(lambda tx: bind_beta(tx, "other", "bot", ""))
        it.service.register("other", "bot", here)
        usual = getattr(it.bot, step)

        async def when_back(*given: object) -> object:
            await back.wait()
            return await usual(*given)

        setattr(it.bot, step, when_back)
        for n in range(4):
            await it.send("hello", conversation=f"c{n}", user=f"u{n}")
        at = Address("other", "bot", "p", "c")
        await it.service.accept(Incoming(Lane.TURN, Kind.MESSAGE, at, "u", "k", "k", "hello"))
        async with asyncio.timeout(DEADLINE_S):
            await it.service.settled("other", "bot")
        assert here.said() == ["you said hello"]
        assert it.bot.said() == []
        back.set()
        await it.settled()
        assert it.bot.said() == ["you said hello"] * 4


async def test_who_stops_while_others_have_all_places_need_not_wait_for_one(tmp_path: Path) -> None:
    async with running_service(tmp_path, lambda _: "word " * 100_000, delay_s=0.01, max_replies=1) as it:
        here = FakeBot()
        await it.database.write(lambda tx: bind_beta(tx, "other", "bot", ""))
        it.service.register("other", "bot", here)
        await it.send("talk")
        await it.bot.showing.wait()
        asked = Incoming(Lane.TURN, Kind.MESSAGE, Address("other", "bot", "p", "c"), "u", "k", "k", "hello")
        await it.service.accept(asked)
        while not here.opened:  # noqa: ASYNC110 - until it waits for a place
            await asyncio.sleep(0.01)
        await it.service.accept(replace(asked, lane=Lane.CONTROL, kind=Kind.STOP, update_key="s", message_key=""))
        async with asyncio.timeout(DEADLINE_S):
            await it.service.settled("other", "bot")
        assert here.said() == [say("en", "service.stopped")]
        assert it.bot.said() == []
        await it.send("", kind=Kind.STOP)
        await it.settled()
        assert len(it.engine.requests) == 1


async def test_of_one_account_the_channel_that_has_least_goes_first(tmp_path: Path) -> None:
    async with running_service(tmp_path, running=False) as it:
        await it.database.write(lambda tx: bind_beta(tx, "fake", "bot", "q"))
        for place, count in (("p", 5), ("q", 3)):
            for n in range(count):
                await it.send(f"{place}{n}", place=place, conversation=f"{place}{n}")
        active: set[int] = set()

        async def begun(room: int) -> list[str]:
            taken = await it.database.write(lambda tx: inbox.take(tx, room, {("fake", "bot")}, active))
            active.update(row.id for row in taken)
            return [row.text for row in taken]

        assert [await begun(room) for room in (3, 5, 5, 6)] == [["p0", "q0", "p1"], ["q1", "p2"], [], ["q2"]]


async def test_at_the_engine_the_parties_take_turns_and_who_leaves_takes_no_place() -> None:
    queue, came, go = AdmissionQueue(1), list[str](), asyncio.Event()

    async def want(partner: str, name: str) -> None:
        async with queue.slot(Scope(partner), PendingReply()):
            came.append(name)
            await go.wait()

    async with asyncio.TaskGroup() as tasks:
        wanted = [tasks.create_task(want(name[0], name)) for name in ("a1", "a2", "a3", "a4", "b1")]
        await asyncio.sleep(0.01)
        assert came == ["a1"]
        wanted[1].cancel()
        go.set()
    assert came == ["a1", "a3", "b1", "a4"]


async def test_a_row_that_has_ended_stays_as_it_ended(tmp_path: Path) -> None:
    async with running_service(tmp_path) as it:
        await it.ask("hello")
        row_id = await it.database.read(lambda tx: tx.value("SELECT id FROM inbox WHERE state = 'done'"))
        await it.database.write(lambda tx: inbox.close(tx, row_id, "unconfirmed", dead=True))
        assert await it.count("inbox", "outcome = 'unconfirmed' OR state = 'dead'") == 0
