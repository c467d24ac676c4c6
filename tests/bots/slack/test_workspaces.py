"""Many workspaces: installing, tokens, being thrown out, and nobody seeing what is another's."""

from __future__ import annotations

import asyncio
import io
import sqlite3
import time
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from aiohttp import ClientSession, CookieJar
from yarl import URL

from core.channels import bindings, directory
from core.channels.installations import Installations
from core.engine.protocol import Request
from core.errors import StorageError
from core.i18n.messages import say
from core.storage.database import Tx
from tests.bots.slack.talk import Talk, talk
from tests.fakes.slack import FakeSlack
from tests.fakes.slack.held import CLIENT, CLIENT_SECRET

OAUTH: dict[str, Any] = {"client_id": CLIENT, "client_secret": CLIENT_SECRET, "url": "http://127.0.0.1"}


def links(tx: Tx) -> None:
    for name in ("north", "south"):
        made = directory.create_channel(tx, name, title=name.title())
        bindings.bind(tx, "slack", "install", f"start={name}", made.id)


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


async def test_late_or_replayed_news_of_a_removal_do_not_remove_what_was_installed_since(tmp_path: Path) -> None:
    async with talk(tmp_path, http=True, **OAUTH) as it:
        await it.here.database.write(links)
        it.teams = ("T2",)
        await install(it, "T2", "north")
        removed = it.there.event("T2", {"type": "app_uninstalled"})
        await it.there.deliver(removed)
        assert await it.here.count("installation") == 0
        removed["event_time"] = int(time.time()) - 2
        await install(it, "T2")
        for attempt in range(4):
            assert await it.there.send(removed, attempt) is not None
        assert await it.here.count("installation") == 1
        assert (await it.ask("UANN", "hello", team="T2")).said == "you said hello"


async def test_who_installs_it_gets_one_dm_that_says_where_things_are(tmp_path: Path) -> None:
    async with talk(tmp_path, http=True, **OAUTH) as it:
        await it.here.database.write(links)
        it.teams = ("T2",)
        for _ in range(2):
            await install(it, "T2", "north", installer="UBOSS")
            await it.settled()
        (held,) = it.there.messages.values()
        assert held.channel == "DUBOSS"
        assert "North" in held.said
        assert "`/distributary claim`" in held.said


async def test_a_token_that_cannot_be_renewed_is_used_until_it_ends(tmp_path: Path) -> None:
    async with FakeSlack().open() as there:
        async with talk(tmp_path, there=there, http=True, **OAUTH) as it:
            await it.here.database.write(links)
            await install(it, "T2", "north", refresh="xoxe-1-first-refresh")
            kept = (await it.here.service.installations.all("slack"))["T2"]
            left = {**kept, "expires_s": str(time.time() + 60)}
            await it.here.service.installations.keep("slack", "T2", left)
        async with talk(tmp_path, there=there, http=True, **OAUTH) as it:
            it.teams = ("T2",)
            there.faults["oauth.v2.access"].extend(["cut", "internal_error"] * 20)
            assert (await it.ask("UANN", "hello", team="T2")).said == "you said hello"
            assert len(there.called("oauth.v2.access")) > 1


async def test_what_was_renewed_while_the_disk_was_full_is_kept_as_soon_as_it_can_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, failing = Installations.keep, 1

    async def keep(self: Installations, *given: Any) -> None:
        nonlocal failing
        if failing:
            failing -= 1
            raise StorageError(detail="no room")
        await whole(self, *given)

    async with FakeSlack().open() as there:
        async with talk(tmp_path, there=there, http=True, **OAUTH) as it:
            await it.here.database.write(links)
            await install(it, "T2", "north", refresh="xoxe-1-first-refresh")
            kept = (await it.here.service.installations.all("slack"))["T2"]
            await it.here.service.installations.keep("slack", "T2", {**kept, "expires_s": str(time.time() + 60)})
        async with talk(tmp_path, there=there, http=True, **OAUTH) as it:
            it.teams = ("T2",)
            monkeypatch.setattr(Installations, "keep", keep)
            assert (await it.ask("UANN", "hello", team="T2")).said == "you said hello"
            kept = (await it.here.service.installations.all("slack"))["T2"]
            assert kept["token"] == there.workspaces["T2"].token


async def test_a_workspace_of_its_own_token_and_those_that_installed_live_side_by_side(tmp_path: Path) -> None:
    async with FakeSlack().open() as there:
        there.workspace("T1")
        both = OAUTH | {"token": there.workspaces["T1"].token}
        async with talk(tmp_path, there=there, http=True, **both) as it:
            await it.here.database.write(links)
            await install(it, "T2", "north")
        async with talk(tmp_path, there=there, http=True, **both) as it:
            it.teams = ("T1", "T2")
            for team in it.teams:
                assert (await it.ask("UANN", "hello", team=team, channel=f"D{team}")).said == "you said hello"
            await it.there.deliver(it.there.event("T1", {"type": "app_uninstalled"}))
            assert (await it.ask("UANN", "hello", team="T1", channel="D9")).said == "you said hello"


async def test_whatever_a_browser_sends_it_is_never_an_error_of_ours(tmp_path: Path) -> None:
    async with talk(tmp_path, http=True, **OAUTH) as it:
        assert it.bot.web is not None
        at = f"http://127.0.0.1:{it.bot.web.port}/slack"
        nasty = ["", "x", "%ff%fe", "%ED%A0%80", "%00", "a" * 5000, "é", "%F0%9F%98%80", "..%2f..%2f"]
        async with browser() as session:
            state = await begin(it, session)
            for text in nasty:
                for url in (
                    f"{at}/oauth_redirect?state={text}&code=c",
                    f"{at}/oauth_redirect?state={state}{text}&code={text}",
                    f"{at}/oauth_redirect?code={text}",
                    f"{at}/install?link={text}%20",
                    f"{at}/{text}",
                ):
                    cookies = {"Cookie": f"slack-install={text or state}"}
                    async with session.get(URL(url, encoded=True), headers=cookies, allow_redirects=False) as answer:
                        assert answer.status in (200, 400, 401), url
        assert await it.here.count("installation") == 0


async def test_an_organisation_installs_for_all_its_workspaces(tmp_path: Path) -> None:
    async with talk(tmp_path, http=True, **OAUTH) as it:
        await it.here.database.write(links)
        await install(it, "T2", "north", enterprise="E1")
        it.teams = ("E1",)
        held = await it.ask("UANN", "hello", team="T2")
        assert held.said == "you said hello"
        held.team = "T2"
        again = await it.answer(it.there.press("UANN", held, say("en", "service.again")))
        assert again.said == "you said hello"
        told = await it.answer(it.there.command("UANN", "whoami", team="T2"))
        assert "North" in told.said
        # somebody of another workspace of the organisation is the same person everywhere in it
        elsewhere = await it.ask("UANN", "<@BT2> /whoami", team="T2", channel="C1", user_team="T7")
        assert elsewhere.said == told.said
        assert await it.here.count("inbox", "account = 'E1'") == 4


@pytest.mark.parametrize("more", [{}, {"user_team": "E9"}, {"user_team": "E9", "source_team": "E9"}])
async def test_in_a_workspace_of_an_organisation_people_are_the_same_whatever_slack_calls_their_team(
    tmp_path: Path, more: dict[str, Any]
) -> None:
    async with talk(tmp_path) as it:
        it.there.workspaces["T1"].belongs_to = "E9"
        told = await it.ask("UOWNER", "/whoami")
        assert (await it.ask("UOWNER", "<@BT1> /whoami", channel="C1", **more)).said == told.said
        assert (await it.ask("UOWNER", " /operator list", **more)).said.startswith("Operators")
        await it.ask("UOWNER", "<@BT1> hello", channel="C1", **more)
        assert {
            call.body["recipient_team_id"]
            for call in it.there.called("chat.startStream")
            if "C1" in call.body["channel"]
        } == {"T1"}
        # a guest of another organisation, with the id of an operator here
        guest = await it.ask("UOWNER", "<@BT1> /operator list", channel="C1", user_team="E8")
        assert guest.said == say("en", "error.not_allowed")


@pytest.mark.slow
async def test_50_workspaces_at_once_see_nothing_of_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bots.slack.sending.api.CALL_S", 600)  # on a busy machine too, no call times out

    def answer(request: Request) -> str:
        return f"{request.scope.channel} | {request.messages[-1].text}"

    def fifty(tx: Tx) -> None:
        for number in range(50):
            made = directory.create_channel(tx, f"c{number}", title=f"C{number}")
            tx.run("UPDATE channel SET per_minute = 0, per_hour = 0 WHERE id = ?", [made.id])
            bindings.bind(tx, "slack", "install", f"start=c{number}", made.id)

    async with talk(tmp_path, answer, http=True, **OAUTH) as it:
        await it.here.database.write(fifty)
        for number in range(50):
            await install(it, f"W{number}", f"c{number}")
        it.teams = tuple(f"W{number}" for number in range(50))
        asked = [
            it.there.message(
                f"U{talker}", f"secret {number}/{talker}", team=f"W{number}", channel=f"D{number}x{talker}"
            )
            for talker in range(4)
            for number in range(50)
        ]
        for start in range(0, len(asked), 100):
            await asyncio.gather(*(it.there.deliver(one) for one in asked[start : start + 100]))
        await it.settled(600)
        assert len(it.there.messages) == 200
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
        assert [row["n"] for row in rows] == [4] * 50


def test_sqlite_knows_returning() -> None:
    assert sqlite3.sqlite_version_info >= (3, 35)  # what makes a state count once
