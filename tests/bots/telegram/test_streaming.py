"""How answers grow, end, fail and come back: drafts and edits, the crash table, Telegram's limits."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest
from aiogram.exceptions import TelegramNetworkError
from aiogram.methods import SendMessage

from bots.shared.errors import OutcomeUnknown
from bots.shared.rate_limits import Rate, TokenBucket
from bots.telegram.sending.api import TelegramApi, end, make_bot
from bots.telegram.sending.rate_limits import SendLimits, TelegramRateLimiter
from core.engine.protocol import Request
from core.errors import AppError, EngineError
from core.i18n.messages import say
from tests.bots.telegram.talk import ANN, FAST, LI, talk
from tests.fakes.telegram import FakeTelegram
from tests.fakes.telegram.rules import Refused
from tests.fakes.telegram.server import TOKEN

LONG = "word " * 300


@pytest.mark.slow
@pytest.mark.parametrize("transport", ["draft", "edit", "draft_direct", "off"])
async def test_every_transport_ends_with_one_whole_answer(tmp_path: Path, transport: str) -> None:
    async with talk(tmp_path, lambda request: LONG, delay_s=0.004, transport=transport) as it:
        sent = await it.ask(ANN, "tell me")
        assert sent.text == LONG.strip()
        assert sent.labels[-1] == "👎"
        assert len(it.there.held(ANN.id)) == 1
        shown = [text for text in it.there.drafted if text] if "draft" in transport else sent.texts[:-1]
        assert (len(shown) > 2) == (transport != "off")
        assert not it.there.drafts or it.there.visible_draft(ANN.id) is None
        assert len(sent.texts) == {"draft": 2, "draft_direct": 1, "off": 2}.get(transport, len(sent.texts))
        assert await it.here.count("ledger") == 1


@pytest.mark.slow
async def test_a_draft_is_renewed_before_it_expires_and_typing_is_kept_alive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bots.telegram.sending.drafts.RENEW_S", 0.2)
    monkeypatch.setattr("bots.telegram.sending.drafts.TYPING_S", 0.2)
    started = asyncio.Event()

    async with talk(tmp_path, lambda request: "one two", delay_s=1.0) as it:
        it.there.says(ANN, "slow")
        await it.there.until(lambda: len(it.there.drafted) >= 3)
        assert not it.there.held(ANN.id)
        group = it.there.chat(-9, "group")
        it.there.says(LI, "@acme_bot slow", chat=group)
        await it.there.until(lambda: sum(call.method == "sendChatAction" for call in it.there.calls) >= 3)
        started.set()
        await it.settled()


async def test_a_long_answer_comes_in_parts_and_buttons_hang_on_the_last(tmp_path: Path) -> None:
    text = "\n\n".join(f"Paragraph {n}. " + "word " * 150 for n in range(20))
    async with talk(tmp_path, lambda request: text) as it:
        await it.here.database.write(lambda tx: tx.run("UPDATE channel SET tokens_out = 100000"))
        await it.ask(ANN, "tell me")
        parts = it.there.held(ANN.id)
        assert len(parts) > 3
        assert "".join("".join(part.text for part in parts).split()) == "".join(text.split())
        assert [bool(part.labels) for part in parts] == [False] * (len(parts) - 1) + [True]
        assert all(part.text.startswith("Paragraph") for part in parts)
        assert await it.here.count("ledger") == 1


async def test_a_parse_error_falls_back_to_plain_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.fakes.telegram import server

    check = server.check_text

    def strict(text: str | None, entities: list[object] | None, **more: object) -> None:
        if entities:
            raise Refused(400, "Bad Request: can't parse entities: unsupported")
        check(text, entities, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(server, "check_text", strict)
    async with talk(tmp_path, lambda request: "a **bold** word") as it:
        sent = await it.ask(ANN, "tell me")
        assert (sent.text, sent.entities, sent.labels[-1]) == ("a bold word", [], "👎")


async def test_tables_and_formulas_can_be_rich_and_fall_back(tmp_path: Path) -> None:
    table = "| a | b |\n|---|---|\n| 1 | 2 |"
    async with talk(tmp_path, lambda request: table, rich=True) as it:
        sent = await it.ask(ANN, "tell me")
        assert sent.rich == table

        def refuse() -> None:
            raise Refused(400, "Bad Request: rich messages are not supported here")

        it.there.faults.append(("editMessageText", refuse))
        plain = await it.ask(ANN, "again")
        assert "│" in plain.text
        assert not plain.rich


async def test_what_telegram_takes_without_saying_so_is_not_doubled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("core.delivery.retry._FIRST_PAUSE_S", 0.01)

    def away() -> None:
        raise Refused(502, "Bad Gateway")

    async with talk(tmp_path) as it:
        it.there.faults += [("editMessageText", "cut"), ("editMessageText", away), ("editMessageText", "cut")]
        sent = await it.ask(ANN, "hello")
        assert sent.text == "you said hello"
        assert len(it.there.held(ANN.id)) == 1
        assert await it.here.count("ledger") == 1


async def test_an_orphan_is_at_most_a_first_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("core.delivery.retry._FIRST_PAUSE_S", 0.01)
    async with talk(tmp_path, lambda request: "one\ntwo") as it:
        it.there.faults.append(("sendMessage", "cut"))  # sent, but its id never came back
        it.there.says(ANN, "hello")
        await it.settled()
        assert [one.text for one in it.there.held(ANN.id)] == ["one …", "one\ntwo"]
        assert await it.here.count("ledger") == 1


@pytest.mark.parametrize(("transport", "left"), [("draft", ["one …"] * 2), ("edit", ["…"] * 2)])
async def test_a_first_message_whose_answers_are_lost_is_sent_once_more_and_then_given_up(
    tmp_path: Path, transport: str, left: list[str]
) -> None:
    async with talk(tmp_path, lambda request: "one\ntwo", transport=transport) as it:
        it.there.faults += [("sendMessage", "cut")] * 6
        it.there.says(ANN, "hello")
        await it.settled()
        assert [one.text for one in it.there.held(ANN.id)] == left
        assert await it.here.count("inbox", "outcome = 'unconfirmed'") == 1
        assert await it.here.count("ledger") == 0
        assert it.here.deliveries.orphans == 2


async def test_what_never_went_out_is_repeated_and_what_may_have_been_taken_is_not() -> None:
    async with FakeTelegram().open() as there:
        there.chat(ANN.id)
        there.faults.append(("sendMessage", "cut"))
        bot = make_bot(TOKEN, there.url)
        send = SendMessage(chat_id=ANN.id, text="…")
        with pytest.raises(OutcomeUnknown):
            await TelegramApi(bot, TelegramRateLimiter()).write(ANN.id, send, repeatable=False)
        await end(bot)
        bot = make_bot(TOKEN, there.url)
    with pytest.raises(TelegramNetworkError):  # nobody listens there any more
        await TelegramApi(bot, TelegramRateLimiter()).write(ANN.id, send, repeatable=False)
    await end(bot)


@pytest.mark.slow
async def test_a_message_that_was_deleted_meanwhile_is_written_anew(tmp_path: Path) -> None:
    async with talk(tmp_path, lambda request: LONG, delay_s=0.004, transport="edit") as it:
        it.there.says(ANN, "tell me")
        await it.there.until(lambda: it.there.held(ANN.id) and "word" in it.there.held(ANN.id)[0].text)
        it.there.messages.clear()
        await it.settled()
        (sent,) = it.there.held(ANN.id)
        assert sent.text == LONG.strip()


@pytest.mark.parametrize("transport", ["draft", "edit"])
async def test_a_failure_is_written_where_the_answer_would_have_been(tmp_path: Path, transport: str) -> None:
    def answer(request: Request) -> str | AppError:
        return EngineError()

    async with talk(tmp_path, answer, transport=transport) as it:
        sent = await it.ask(LI, "hello")
        assert sent.text == say("zh", "error.engine")
        assert len(it.there.held(LI.id)) == 1


@pytest.mark.slow
@pytest.mark.parametrize("transport", ["draft", "edit"])
@pytest.mark.parametrize("when", ["before", "streaming", "generated"])
async def test_a_restart_at_any_point_ends_in_one_answer(
    tmp_path: Path, transport: str, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The crash table: the first program is cut without a chance to finish; the second brings the answer."""
    monkeypatch.setattr("core.delivery.retry._FIRST_PAUSE_S", 0.01)
    async with FakeTelegram().open() as there:

        def hang() -> None:
            raise Refused(429, "Too Many Requests: retry after 1", retry_after=1)

        if when == "generated":
            there.faults += [("editMessageText", hang)] * 40
        with pytest.raises(ExceptionGroup):  # noqa: PT012 - a program that is cut at this point
            async with talk(tmp_path, lambda request: LONG, there=there, delay_s=0.005, transport=transport) as it:
                it.here.service.drain = _cut  # type: ignore[method-assign]
                there.says(ANN, "tell me")
                if when == "streaming":
                    await there.until(
                        lambda: there.visible_draft(ANN.id) or any("word" in m.text for m in there.held(ANN.id))
                    )
                elif when == "generated":
                    await there.until(lambda: any(call.status == 429 for call in there.calls))
                else:
                    await there.until(lambda: not there.account.pending)
                raise RuntimeError("cut")
        there.faults.clear()
        there.skip(120)
        async with talk(tmp_path, lambda request: LONG, there=there, transport=transport) as it:
            await it.settled()
            finals = [one for one in there.held(ANN.id) if one.text == LONG.strip()]
            assert len(finals) == 1
            assert all("…" in one.text for one in there.held(ANN.id) if one not in finals)
            assert await it.here.count("ledger") == 1


async def _cut(deadline_s: float) -> None:
    """What SIGKILL leaves no time for."""


# --- pace ---


def test_a_bucket_never_gives_more_than_its_rate() -> None:
    bucket, now, taken = TokenBucket(Rate(2.0, 3), 0.0), 0.0, 0
    for _ in range(1_000):
        now += 0.037
        if bucket.wait_s(now) <= 0:
            bucket.take(now)
            taken += 1
    assert 3 + 2.0 * now - 2 <= taken <= 3 + 2.0 * now


def test_nothing_goes_out_before_retry_after() -> None:
    now = 0.0
    pace = TelegramRateLimiter(SendLimits(FAST, FAST, FAST, FAST), clock=lambda: now)
    pace.refused(1, 7)
    assert pace.wait_s(1) == 7
    assert pace.wait_s(2) == 0
    pace.refused(2, 9)  # two chats: it is the bot
    assert pace.wait_s(3) == 9
    now = 9.1
    assert pace.wait_s(1) == pace.wait_s(3) == 0


async def _storm(tmp_path: Path, seconds: float) -> None:
    async with talk(tmp_path, lambda request: LONG, delay_s=0.001) as it:
        end, turn = time.monotonic() + seconds, 0

        def storm() -> int:
            nonlocal turn
            turn += 1
            return 1 + turn % 2 if time.monotonic() < end and turn % 3 else 0

        it.there.storm = storm
        people = [type(ANN)(100 + n, f"P{n}") for n in range(12)]
        for person in people:
            it.there.says(person, "tell me")
        await it.settled(seconds + 60)
        assert sum(call.status == 429 for call in it.there.calls) >= 5
        assert not it.there.violations
        for person in people:
            (sent,) = [one for one in it.there.held(person.id) if one.text == LONG.strip()]
            assert sent.labels


@pytest.mark.slow
async def test_a_storm_of_429_loses_nothing_and_is_waited_out(tmp_path: Path) -> None:
    await _storm(tmp_path, 3)


@pytest.mark.drill
async def test_a_storm_of_30_s_loses_nothing_and_is_waited_out(tmp_path: Path) -> None:
    await _storm(tmp_path, 30)


@pytest.mark.slow
async def test_telegrams_own_limits_are_kept(tmp_path: Path) -> None:
    async with (
        FakeTelegram(limits=True).open() as there,
        talk(tmp_path, lambda request: LONG, delay_s=0.01, there=there, pace=TelegramRateLimiter()) as it,
    ):
        group = there.chat(-9, "group")
        there.says(ANN, "tell me")
        there.says(LI, "@acme_bot tell me", chat=group)
        await it.settled()
        assert there.held(ANN.id)[0].text == there.held(-9)[0].text == LONG.strip()
        assert all(call.status != 429 for call in there.calls)
