"""What one person sends is bounded, and takes nothing from the others."""

from __future__ import annotations

from pathlib import Path

import pytest

from core.chat import inbox
from core.errors import Overloaded
from core.i18n.messages import duration, say
from core.types import Kind
from tests.support.running_service import running_service

NOTICE = say("en", "error.limit_open", limit=inbox.MAX_OPEN_PERSON)


async def test_a_flood_of_one_person_is_refused_with_one_notice_and_the_others_are_answered(tmp_path: Path) -> None:
    async with running_service(tmp_path, running=False) as it:
        await it.database.write(lambda tx: tx.run("UPDATE channel SET per_minute = 0, per_hour = 0"))
        for _ in range(inbox.MAX_OPEN_PERSON + 50):
            await it.send("flood", user="flooder")
        await it.send("a question", user="another", conversation="own")
        assert await it.count("inbox", "state = 'new'") == inbox.MAX_OPEN_PERSON + 2  # the notice, and the other's
        assert await it.count("inbox", "outcome = 'refused_quietly'") == 49
    async with running_service(tmp_path) as it:
        await it.settled()
        said = it.bot.said()
        assert said.count("you said flood") == inbox.MAX_OPEN_PERSON
        assert said.count(NOTICE) == 1
        assert said.index("you said a question") < 10
        assert await it.ask("again", user="flooder", key="again") == "you said again"


async def test_where_an_account_is_full_stops_and_buttons_get_through(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inbox, "MAX_OPEN", 5)
    async with running_service(tmp_path, running=False) as it:
        for number in range(5):
            await it.send("a question", user=f"u{number}")
        with pytest.raises(Overloaded):
            await it.send("one more", user="u6")
        await it.send("", kind=Kind.STOP)
        await it.send("/stop")
        await it.send("", kind=Kind.PRESS, action="feedback", value="x:1")
        assert await it.count("inbox") == 8


async def test_commands_are_limited_as_messages_are(tmp_path: Path) -> None:
    async with running_service(tmp_path) as it:
        await it.database.write(lambda tx: tx.run("UPDATE channel SET per_minute = 1"))
        for _ in range(10):
            assert "/usage" in await it.ask("/help")
        limited = say("en", "error.limit_commands", limit=10, wait=duration("en", 60))
        assert await it.ask("/help") == limited
        await it.send("/help")
        await it.settled()
        await it.ask("/stop")
        assert it.bot.said().count(limited) == 1
        assert await it.count("inbox", "outcome = 'refused_quietly'") == 1
        assert it.bot.said()[-1] == say("en", "users.nothing_to_stop")
        await it.database.write(lambda tx: tx.run("UPDATE channel SET per_minute = 0"))
        assert "/usage" in await it.ask("/help")


async def test_wrong_codes_are_limited_and_audited(tmp_path: Path) -> None:
    async with running_service(tmp_path) as it:
        for _ in range(5):
            assert await it.ask("/claim AAAA-AAAA-AAAA") == say("en", "users.claim_bad")
        limited = say("en", "error.limit_claims", limit=5, wait=duration("en", 600))
        assert await it.ask("/claim AAAA-AAAA-AAAA") == limited
        assert await it.count("audit", "action = 'claim' AND NOT allowed") == 5
        assert await it.ask("/claim AAAA-AAAA-AAAA", user="another") == say("en", "users.claim_bad")
