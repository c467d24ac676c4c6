"""Nothing is confirmed to Telegram before it is in the inbox; nothing that it sends stops the bot."""

from __future__ import annotations

import asyncio
import io
import json
import random
import string
from pathlib import Path

import pytest
from aiohttp import ClientSession

from bots.telegram.bot import TelegramBot
from bots.telegram.webhook import HEADER
from core.errors import BadConfig, StorageFull
from core.types import Incoming
from tests.bots.telegram.talk import ANN, LI, SECRET, talk
from tests.fakes.telegram import FakeTelegram, Person
from tests.fakes.telegram.people import message
from tests.fakes.telegram.server import TOKEN
from tests.support.waiting import DEADLINE_S


async def test_the_offset_moves_only_after_the_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with talk(tmp_path) as it:
        accept, full = it.here.service.accept, asyncio.Event()

        async def refuse(*incoming: Incoming) -> None:
            if not full.is_set():
                refused.append(len(incoming))
                raise StorageFull
            await accept(*incoming)

        refused: list[int] = []
        monkeypatch.setattr(it.here.service, "accept", refuse)
        monkeypatch.setattr("bots.telegram.receiver._STORAGE_S", 0.01)
        it.there.says(ANN, "hello")
        await it.there.until(lambda: len(refused) > 3)
        assert not it.there.account.confirmed
        full.set()
        await it.settled()
        assert it.there.held(ANN.id)[0].text == "you said hello"
        assert it.there.account.confirmed == [1000]


async def test_repeats_gaps_reordering_and_ids_that_begin_anew(tmp_path: Path) -> None:
    async with talk(tmp_path) as it:
        chat = it.there.chat(ANN.id)
        numbers = [5000, 4990, 5000, 5007, 12, 13, 12]  # 12: after a quiet week
        for place, number in enumerate(numbers):
            key = numbers.index(number)
            it.there.account.pending.append(
                {"update_id": number, "message": message(chat, ANN, 100 + key, f"m{number}")}
            )
            it.there.account.came.set()
            if place in (3, 4):
                await it.settled()
        await it.settled()
        said = [one.text for one in it.there.held(ANN.id)]
        assert sorted(said) == sorted(f"you said m{number}" for number in set(numbers))
        assert await it.here.count("ledger") == 5


async def test_an_update_that_cannot_be_read_is_kept_and_stops_nothing(tmp_path: Path) -> None:
    async with talk(tmp_path) as it:
        it.there.update(message={"message_id": "what", "chat": 7})
        it.there.account.pending.append({"update_id": 1001, "message": {"date": "x", "😀": "\ud83d"}})
        it.there.account.next_update = 1002
        sent = await it.ask(ANN, "hello")
        assert sent.text == "you said hello"
        rows = await it.here.database.read(lambda tx: tx.all("SELECT * FROM inbox WHERE state = 'dead' ORDER BY id"))
        assert [row["update_key"] for row in rows] == ["1000", "1001"]
        assert it.there.account.confirmed[:2] == [1000, 1001]


async def test_kinds_that_are_not_used_are_confirmed_and_forgotten(tmp_path: Path) -> None:
    async with talk(tmp_path) as it:
        it.there.update(message=message(it.there.chat(-7, "group"), ANN, 1, "talk"))
        it.there.update(message=message(it.there.chat(ANN.id), ANN, 1) | {"pinned_message": None})
        await it.ask(ANN, "hello")
        assert await it.here.count("inbox") == 1


async def test_only_what_is_used_is_asked_for(tmp_path: Path) -> None:
    async with talk(tmp_path, webhook=True) as it:
        await it.ask(ANN, "hello")
        assert it.there.account.webhook is not None
    from bots.telegram.updates import ALLOWED

    assert set(ALLOWED) == {
        "message", "edited_message", "callback_query", "my_chat_member", "stopped_message_generation",
    }  # fmt: skip


async def test_a_second_poller_is_explained_and_waited_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("bots.telegram.receiver._CONFLICT_S", 0.05)
    async with FakeTelegram().open() as there, talk(tmp_path, there=there) as it:
        there.account.take_over()  # somebody else asks for updates
        await it.there.until(lambda: any(call.status == 409 for call in there.calls))
        assert (await it.ask(ANN, "hello")).text == "you said hello"
    assert "telegram.two_pollers" in caplog.text


async def test_a_webhook_that_was_left_is_removed_before_polling(tmp_path: Path) -> None:
    async with FakeTelegram().open() as there:
        there.account.webhook = {"url": "https://old.example", "secret": "x"}
        async with talk(tmp_path, there=there) as it:
            assert (await it.ask(ANN, "hello")).text == "you said hello"


@pytest.mark.parametrize("webhook", [False, True])
async def test_many_accounts_in_one_process(tmp_path: Path, webhook: bool) -> None:
    async with FakeTelegram().open() as there:
        other = there.add_account("7777:BBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBB", "delta_bot")
        settings: dict[str, object] = {"token": other.token, "api": there.url}
        if webhook:
            hook = {"webhook": "https://example.org", "webhook_secret": "b" * 20, "listen": "127.0.0.1:0"}
            settings |= hook
        async with talk(tmp_path, there=there, webhook=webhook) as it, asyncio.TaskGroup() as tasks:
            second = tasks.create_task(TelegramBot.configure(settings).run(it.here.service))
            await there.until(lambda: other.webhook if webhook else other.polling)
            if webhook:
                assert other.webhook is not None
                assert there.account.webhook is not None
                path = other.webhook["url"].removeprefix("https://example.org")
                base = it.url.split("/telegram/")[0]
                update = {"update_id": 7, "message": message(there.chat(LI.id), LI, 1, "hello")}
                async with ClientSession() as session:
                    wrong = await session.post(f"{base}{path}", json=update, headers={HEADER: SECRET})
                    right = await session.post(f"{base}{path}", json=update, headers={HEADER: "b" * 20})
                assert (wrong.status, right.status) == (401, 200)
            else:
                there.update(token=other.token, message=message(there.chat(LI.id), LI, 1, "hello"))
            assert (await it.ask(ANN, "hi")).text == "you said hi"
            await there.until(lambda: there.held(LI.id))
            async with asyncio.timeout(DEADLINE_S):
                await it.here.service.settled("telegram", "delta_bot")
            assert "No channel" in there.held(LI.id)[0].text or there.held(LI.id)[0].text  # bound to none: refused
            assert await it.here.count("ledger") == 1
            second.cancel()


async def test_a_token_that_telegram_does_not_know_is_said_without_showing_it(tmp_path: Path) -> None:
    async with FakeTelegram().open() as there:
        wrong = "99:CCCCCCCCCCCCCCCCCCCCCCCCCCCCCCCCCCC"
        async with talk(tmp_path, there=there) as it:
            with pytest.raises(BadConfig) as caught:
                await TelegramBot.configure({"token": wrong, "api": there.url}).run(it.here.service)
            assert "BotFather" in str(caught.value)
            assert "CCC" not in str(caught.value)


async def test_tokens_are_in_no_log_no_error_and_no_answer(
    tmp_path: Path, written: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("core.delivery.retry._FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr("bots.shared.backoff.PAUSES_S", (0.01,))
    async with talk(tmp_path) as it:

        def fail() -> None:
            from tests.fakes.telegram.rules import Refused

            raise Refused(500, "Internal Server Error")

        it.there.faults += [("editMessageText", "cut"), ("editMessageText", fail), ("getUpdates", "cut")]
        await it.ask(ANN, "hello")
        sent = await it.ask(ANN, "/finetune", document={"file_id": "gone", "file_unique_id": "u", "file_name": "a.csv"})
        assert TOKEN not in sent.text
    assert "telegram.away" in written.getvalue()
    assert "AAAAAAAA" not in written.getvalue()


# --- the webhook ---


def _forgeries(url: str, count: int) -> list[tuple[str, str, bytes, dict[str, str]]]:
    """(method, URL, body, headers): each wrong in one way at least."""
    draw = random.Random(7)
    base, path = url.split("/telegram/")
    body = json.dumps({"update_id": 1, "message": message_of()}).encode()
    made = []
    for number in range(count):
        letters = list(SECRET)
        at = draw.randrange(len(letters))
        kind = number % 10
        method, where, said, headers = "POST", url, body, {HEADER: SECRET}
        if kind == 0:
            letters[at] = draw.choice([c for c in string.ascii_letters if c != letters[at]])
            headers = {HEADER: "".join(letters)}
        elif kind == 1:
            headers = {}
        elif kind == 2:
            headers = {HEADER: SECRET[:at]}
        elif kind == 3:
            headers = {HEADER: SECRET + draw.choice(string.ascii_letters)}
        elif kind == 4:
            where = f"{base}/telegram/{''.join(draw.choices('0123456789abcdef', k=len(path)))}"
        elif kind == 5:
            headers = {HEADER: "".join(draw.choices("é中ÿ\u00a0", k=9))}
        elif kind == 6:
            said = body[: draw.randrange(1, len(body) - 1)]
        elif kind == 7:
            method = draw.choice(["GET", "PUT", "DELETE", "PATCH", "OPTIONS"])
        elif kind == 8:
            said = draw.choice([b"", b"[]", b"7", b"[" * 100_000, b"\xff\xfe", b'{"update_id": "1"}', b"x" * 1_100_000])
        else:
            headers = {HEADER: SECRET.swapcase(), "X-Forwarded-For": "149.154.160.1"}
        made.append((method, where, said, headers))
    return made


def message_of() -> dict[str, object]:
    return message(FakeTelegram().chat(1), Person(1), 1, "forged")


async def _forge(tmp_path: Path, count: int) -> None:
    async with talk(tmp_path, webhook=True) as it:
        async with ClientSession() as session:
            for method, url, body, headers in _forgeries(it.url, count):
                async with session.request(method, url, data=io.BytesIO(body), headers=headers) as response:
                    assert response.status == 401, (method, headers, body[:80])
                    assert await response.read() == b""
        assert (await it.ask(ANN, "hello")).text == "you said hello"
        assert await it.here.count("inbox") == 1


async def test_1000_forged_webhook_requests_are_all_401(tmp_path: Path) -> None:
    await _forge(tmp_path, 1_000)


@pytest.mark.drill
async def test_10000_forged_webhook_requests_are_all_401(tmp_path: Path) -> None:
    await _forge(tmp_path, 10_000)


async def test_a_webhook_says_200_only_after_the_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with talk(tmp_path, webhook=True) as it:
        accept, times = it.here.service.accept, 0

        async def refuse(*incoming: Incoming) -> None:
            nonlocal times
            times += 1
            if times < 3:
                raise StorageFull
            await accept(*incoming)

        monkeypatch.setattr(it.here.service, "accept", refuse)
        assert (await it.ask(ANN, "hello")).text == "you said hello"
        assert times == 3


def test_a_webhook_without_a_secret_is_refused() -> None:
    with pytest.raises(BadConfig) as caught:
        TelegramBot.configure({"token": TOKEN, "webhook": "https://example.org"})
    assert "webhook_secret" in str(caught.value)
    with pytest.raises(BadConfig) as caught:
        TelegramBot.configure({"token": "oops", "transport": "drafts", "colour": 1})
    said = str(caught.value)
    assert "colour is unknown" in said
    assert "draft, edit" in said
    assert "oops" not in said
