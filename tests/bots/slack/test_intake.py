"""What comes in: committed before it is acknowledged, once, and only from Slack."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest

from bots.slack.pages.text import plain_text
from core.chat.service import Service
from core.errors import StorageError
from tests.bots.slack.talk import talk
from tests.fakes.slack.held import SIGNING
from tests.fakes.slack.server import sign, signed

both_ways = pytest.mark.parametrize("http", [False, True], ids=["socket", "http"])


@pytest.mark.slow
@both_ways
async def test_nothing_is_acknowledged_before_it_is_committed(
    tmp_path: Path, http: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, failing = Service.accept, 2

    async def accept(self: Service, *incoming: object) -> None:
        nonlocal failing
        if failing:
            failing -= 1
            raise StorageError(detail="no disk")
        await whole(self, *incoming)  # type: ignore[arg-type]

    monkeypatch.setattr(Service, "accept", accept)
    async with talk(tmp_path, http=http) as it:
        asked = it.there.message("UANN", "hello")
        for attempt in (0, 1):
            assert await it.there.send(asked, attempt) is None
        assert await it.here.count("inbox") == 0
        assert await it.there.send(asked, 2) is not None
        assert await it.here.count("inbox") == 1
        await it.settled()
        assert [one.said for one in it.there.held("DUANN")] == ["you said hello"]


@both_ways
async def test_the_commit_stands_ahead_of_any_call_to_slack(tmp_path: Path, http: bool) -> None:
    async with talk(tmp_path, http=http) as it:
        called = len(it.there.calls)
        it.there.faults["chat.startStream"].extend(["500"] * 3)
        await it.there.deliver({**it.there.event("T1", {"type": "nothing_known", "x": 1})})
        assert len(it.there.calls) == called  # no auth.test, no users.info
        assert await it.here.count("inbox") == 0


@pytest.mark.slow
@both_ways
async def test_1000_replays_have_one_effect(tmp_path: Path, http: bool) -> None:
    async with talk(tmp_path, http=http) as it:
        asked = it.there.message("UANN", "hello")
        slash = it.there.command("UANN", "whoami", channel="DUANN")
        same = {**asked, "event_id": "EvOther"}  # the same message under another event id
        payloads = [asked, slash, same]
        for round in range(334):
            await asyncio.gather(*(it.there.send(one, round % 4) for one in payloads))
        await it.settled()
        assert await it.here.count("inbox") == 2
        assert await it.here.count("ledger") == 1
        assert len(it.there.messages) == 2


@both_ways
async def test_a_mention_that_comes_as_two_events_is_answered_once(tmp_path: Path, http: bool) -> None:
    async with talk(tmp_path, http=http) as it:
        text, ts = "<@BT1> hello", it.there.ts()
        one = it.there.message("UANN", text, channel="C1", ts=ts)
        two = it.there.message("UANN", text, channel="C1", ts=ts)
        two["event"]["type"] = "app_mention"
        await asyncio.gather(it.there.deliver(one), it.there.deliver(two))
        await it.settled()
        assert [held.said for held in it.there.held("C1")] == ["you said hello"]


@pytest.mark.parametrize(
    ("sent", "meant"),
    [
        ("see <https://acme.example/p|our leave policy>", "see [our leave policy](https://acme.example/p)"),
        ("<https://a.example/?a=1&amp;b=2|R&amp;D>", "[R&D](https://a.example/?a=1&b=2)"),
        ("<mailto:hr@acme.example|write to us>", "[write to us](mailto:hr@acme.example)"),
        ("<https://acme.example/p>", "https://acme.example/p"),
        ("<https://acme.example/p/|https://acme.example/p/>", "https://acme.example/p/"),
        ("<http://acme.example|acme.example>", "http://acme.example"),
        ("<https://acme.example/|acme.example>", "https://acme.example/"),
        ("<mailto:hr@acme.example|hr@acme.example>", "hr@acme.example"),
        ("<tel:+4681|+4681>", "tel:+4681"),
        ("<#C1|general> <@U1|ann> <!here>", "#general @ann @here"),
    ],
)
def test_the_words_of_a_link_reach_the_model(sent: str, meant: str) -> None:
    assert plain_text(sent) == (False, meant)


@both_ways
async def test_what_cannot_be_read_is_kept_and_stops_nothing(tmp_path: Path, http: bool) -> None:
    async with talk(tmp_path, http=http) as it:
        broken = it.there.event("T1", {"type": "message", "channel": "DUANN", "text": "no user", "ts": 5})
        for payload in (broken, broken, {**broken, "event": {"type": "message"}, "event_id": "Ev-b"}):
            assert await it.there.send(payload) is not None
        assert await it.here.count("inbox", "state = 'dead'") == 2
        assert (await it.ask("UANN", "hello")).said == "you said hello"


async def test_what_is_signed_and_no_json_is_kept_and_acknowledged(tmp_path: Path) -> None:
    async with talk(tmp_path, http=True) as it:
        body = "{not json"
        status, _ = await it.there.post(body, sign(body) | {"Content-Type": "application/json"})
        assert status == 200
        assert await it.here.count("inbox", "state = 'dead'") == 1


async def test_slacks_own_question_is_answered(tmp_path: Path) -> None:
    async with talk(tmp_path, http=True) as it:
        status, body = await it.there.post(*signed({"type": "url_verification", "challenge": "c1"}))
        assert (status, body) == (200, {"challenge": "c1"})


def forge(random: random.Random, body: str) -> tuple[bytes, dict[str, str]]:
    """A request that Slack did not make: one thing about a right one is wrong."""
    right = sign(body) | {"Content-Type": "application/json"}
    stamp, signature = "X-Slack-Request-Timestamp", "X-Slack-Signature"
    data = body.encode()
    match random.randrange(12):
        case 0:
            del right[signature]
        case 1:
            del right[stamp]
        case 2:
            right |= sign(body, "another-secret-of-slack")
        case 3:
            right |= sign(body, SIGNING, int(right[stamp]) - 301 - random.randrange(10_000))
        case 4:
            right |= sign(body, SIGNING, int(right[stamp]) + 301 + random.randrange(10_000))
        case 5:
            right[stamp] = random.choice(["", "x", "１２３", "1e9", "-1", "9" * 40, right[stamp] + ".0"])
        case 6:
            right[signature] = random.choice(
                ["", "v0=", "v1" + right[signature][2:], "é" * 67, right[signature].upper()]
            )
        case 7:
            place = random.randrange(len(data))
            data = data[:place] + bytes([data[place] ^ 1 << random.randrange(7)]) + data[place + 1 :]
        case 8:
            data = data + random.choice([b" ", b"\x00", b"\xff\xfe"])
        case 9:
            data = b"\xff" + data
        case 10:
            data = b""
        case 11:
            place = 3 + random.randrange(64)
            old = right[signature]
            right[signature] = old[:place] + ("0" if old[place] != "0" else "1") + old[place + 1 :]
    return data, right


@pytest.mark.slow
async def test_10000_forged_requests_are_all_401(tmp_path: Path) -> None:
    chance = random.Random(6)
    async with talk(tmp_path, http=True) as it:
        body, _ = signed(it.there.message("UANN", "hello"))
        statuses: dict[int, int] = {}
        for _ in range(200):
            given = [forge(chance, body) for _ in range(50)]
            for status, _said in await asyncio.gather(*(it.there.post(*one) for one in given)):
                statuses[status] = statuses.get(status, 0) + 1
        assert statuses == {401: 10_000}
        assert await it.here.count("inbox") == 0
