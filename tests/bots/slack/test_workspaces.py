"""Many workspaces: installing, tokens, being thrown out, and nobody seeing what is another's."""

from __future__ import annotations

import asyncio
import io
import sqlite3
import time
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from aiohttp import ClientSession, CookieJar

from core.engine.protocol import Request
from core.store import directory
from core.store.database import Tx
from core.texts import say
from tests.bots.slack.talk import Talk, talk
from tests.fakes.slack import FakeSlack
from tests.fakes.slack.server import CLIENT, CLIENT_SECRET

OAUTH: dict[str, Any] = {"client_id": CLIENT, "client_secret": CLIENT_SECRET, "url": "http://127.0.0.1"}


def links(tx: Tx) -> None:
    for name in ("north", "south"):
        made = directory.create_channel(tx, name, title=name.title())
        directory.bind(tx, "slack", "install", f"start={name}", made.id)


def everything(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())


def browser() -> ClientSession:
    return ClientSession(cookie_jar=CookieJar(unsafe=True))


async def begin(it: Talk, session: ClientSession, link: str = "") -> str:
    """Press "Add to Slack"; the state that Slack will bring back."""
    assert it.bot.web is not None
    url = f"http://127.0.0.1:{it.bot.web.port}/slack/install?link={link}"
    async with session.get(url, allow_redirects=False) as answer:
        assert answer.status == 302
        there = urlsplit(answer.headers["Location"])
    assert there.path == "/oauth/v2/authorize"
    return parse_qs(there.query)["state"][0]


async def end(it: Talk, session: ClientSession, state: str, code: str, language: str = "en") -> tuple[int, str]:
    assert it.bot.web is not None
    url = f"http://127.0.0.1:{it.bot.web.port}/slack/oauth_redirect"
    given = {"state": state, "code": code}
    async with session.get(url, params=given, headers={"Accept-Language": language}) as answer:
        return answer.status, await answer.text()


async def install(it: Talk, team: str, link: str = "", **more: Any) -> None:
    it.there.codes[f"code-{team}"] = it.there.workspaces.get(team) or it.there.workspace(team, **more)
    async with browser() as session:
        status, _ = await end(it, session, await begin(it, session, link), f"code-{team}")
    assert status == 200


async def test_a_workspace_installs_by_a_link_and_gets_the_channel_of_that_link(tmp_path: Path) -> None:
    async with talk(tmp_path, lambda request: request.scope.channel, http=True, **OAUTH) as it:
        await it.here.database.write(links)
        await install(it, "T2", "south", name="<Deep> South")
        await install(it, "T3", "north")
        it.teams = ("T2", "T3")
        assert (await it.ask("UANN", "who", team="T2")).said == "south"
        assert (await it.ask("UBEN", "who", team="T3")).said == "north"


async def test_the_pages_are_in_the_persons_language_and_harmless(tmp_path: Path) -> None:
    async with talk(tmp_path, http=True, **OAUTH) as it:
        for language in ("en", "zh"):
            it.there.codes["c"] = it.there.workspace("T2", name="<script>x")
            async with browser() as session:
                status, page = await end(it, session, await begin(it, session), "c", language)
            assert status == 200
            assert say(language, "slack.installed_title") in page
            assert "<script>" not in page
            async with browser() as session:
                status, page = await end(it, session, await begin(it, session), "no such code", language)
            assert status == 400
            assert say(language, "slack.install_failed_title") in page


async def test_of_two_racing_uses_of_one_state_one_wins(tmp_path: Path) -> None:
    async with talk(tmp_path, http=True, **OAUTH) as it:
        for round in range(20):
            space = it.there.workspace(f"T{round + 10}")
            it.there.codes |= {f"a{round}": space, f"b{round}": space}
            async with browser() as session:
                state = await begin(it, session)
                uses = (end(it, session, state, f"{name}{round}") for name in "ab")
                statuses = [status for status, _ in await asyncio.gather(*uses)]
            assert sorted(statuses) == [200, 401]


async def test_a_state_counts_in_its_own_browser_only_and_not_for_ever(tmp_path: Path) -> None:
    async with talk(tmp_path, http=True, **OAUTH) as it:
        it.there.codes["c"] = it.there.workspace("T2")
        async with browser() as one, browser() as other:
            state = await begin(it, one)
            assert (await end(it, other, state, "c"))[0] == 401
            await it.here.database.write(lambda tx: tx.run("UPDATE install_state SET made_ms = made_ms - 600001"))
            assert (await end(it, one, state, "c"))[0] == 401
        assert await it.here.count("installation") == 0


async def test_tokens_are_in_no_file_no_log_and_no_error(tmp_path: Path, written: io.StringIO) -> None:
    async with talk(tmp_path, http=True, **OAUTH) as it:
        await install(it, "T2", refresh="xoxe-1-first-refresh")
        it.teams = ("T2",)
        it.there.faults["chat.startStream"].append("500")
        await it.there.deliver(it.there.message("UANN", "hello", team="T2"))
        await it.settled()
        secrets = [it.there.workspaces["T2"].token, "xoxe-1-first-refresh", CLIENT_SECRET]
    held = await asyncio.to_thread(everything, tmp_path)
    for secret in secrets:
        assert secret.encode() not in held
        assert secret not in written.getvalue()


async def test_a_token_that_ends_soon_is_renewed_once_and_kept(tmp_path: Path) -> None:
    async with FakeSlack().open() as there:
        there.workspace("T1")
        async with talk(tmp_path, there=there, http=True, **OAUTH) as it:
            await install(it, "T1", refresh="")
            there.workspaces["T1"].refresh = "xoxe-1-first-refresh"
            known = it.there.workspaces["T1"]
            space = await it.here.service.installations.all("slack")
            kept = {**space["T1"], "refresh_token": known.refresh, "expires_s": str(time.time() + 60)}
            await it.here.service.installations.keep("slack", "T1", kept)
        async with talk(tmp_path, there=there, http=True, **OAUTH) as it:
            for one in [there.message("UANN", f"hello {number}") for number in range(5)]:
                await there.deliver(one)
            await it.settled()
            renewed = [c for c in there.called("oauth.v2.access") if c.body.get("grant_type") == "refresh_token"]
            assert len(renewed) == 1
            assert {held.said for held in there.messages.values()} == {f"you said hello {n}" for n in range(5)}
        async with talk(tmp_path, there=there, http=True, **OAUTH) as it:
            assert (await it.ask("UANN", "after a restart")).said == "you said after a restart"


async def test_who_throws_the_app_out_is_forgotten_and_can_come_back(tmp_path: Path) -> None:
    async with talk(tmp_path, http=True, **OAUTH) as it:
        for event in ({"type": "app_uninstalled"}, {"type": "tokens_revoked", "tokens": {"bot": ["BT2"], "oauth": []}}):
            await install(it, "T2")
            await it.there.deliver(it.there.event("T2", event))
            assert await it.here.count("installation") == 0
            await it.there.deliver(it.there.message("UANN", "anybody there", team="T2"))
            assert await it.here.count("inbox") == 0
        await install(it, "T2")
        await it.there.deliver(it.there.event("T2", {"type": "tokens_revoked", "tokens": {"oauth": ["U1"]}}))
        assert await it.here.count("installation") == 1


async def test_an_organisation_installs_for_all_its_workspaces(tmp_path: Path) -> None:
    async with talk(tmp_path, http=True, **OAUTH) as it:
        await it.here.database.write(links)
        await install(it, "T2", "north", enterprise="E1")
        it.teams = ("E1",)
        held = await it.ask("UANN", "hello", team="T2")
        assert held.said == "you said hello"
        assert await it.here.count("inbox", "account = 'E1'") == 1


async def test_50_workspaces_at_once_see_nothing_of_each_other(tmp_path: Path) -> None:
    def answer(request: Request) -> str:
        return f"{request.scope.channel} | {request.messages[-1].text}"

    def fifty(tx: Tx) -> None:
        for number in range(50):
            made = directory.create_channel(tx, f"c{number}", title=f"C{number}")
            tx.run("UPDATE channel SET per_minute = 0, per_hour = 0 WHERE id = ?", [made.id])
            directory.bind(tx, "slack", "install", f"start=c{number}", made.id)

    async with talk(tmp_path, answer, http=True, **OAUTH) as it:
        await it.here.database.write(fifty)
        for number in range(50):
            await install(it, f"W{number}", f"c{number}")
        it.teams = tuple(f"W{number}" for number in range(50))
        asked = [
            it.there.message(
                f"U{talker}", f"secret {number}/{talker}", team=f"W{number}", channel=f"D{number}x{talker}"
            )
            for talker in range(20)
            for number in range(50)
        ]
        for start in range(0, len(asked), 100):
            await asyncio.gather(*(it.there.deliver(one) for one in asked[start : start + 100]))
        await it.settled(120)
        assert len(it.there.messages) == 1000
        for held in it.there.messages.values():
            number, talker = held.channel[1:].split("x")
            assert held.team == f"W{number}"
            assert held.said == f"c{number} | secret {number}/{talker}"
        for call in it.there.calls:
            place = str(call.body.get("channel") or call.body.get("channel_id") or "")
            if "x" in place:
                assert call.token == it.there.workspaces[f"W{place[1:].split('x')[0]}"].token
        rows = await it.here.database.read(
            lambda tx: tx.all("SELECT channel_id, count(*) AS n FROM ledger GROUP BY channel_id")
        )
        assert [row["n"] for row in rows] == [20] * 50


def test_sqlite_knows_returning() -> None:
    assert sqlite3.sqlite_version_info >= (3, 35)  # what makes a state count once
