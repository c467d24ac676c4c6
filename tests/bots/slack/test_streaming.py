"""How answers are written: streams, edits, limits, and every way in which they can break."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import pytest
from aiohttp import ClientConnectorError
from aiohttp.test_utils import unused_port
from slack_sdk.web.async_client import AsyncWebClient

from bots.slack import bot
from bots.slack.pages.text import LIMIT, growing, harmless, split, whole
from bots.slack.sending import api, sink
from bots.slack.sending.rate_limits import RATES, SlackRateLimiter
from core.engine.protocol import Request
from core.i18n.messages import say
from tests.bots.slack.talk import Talk, fast, talk
from tests.fakes.slack import FakeSlack, Held

pytestmark = pytest.mark.slow

LONG = "one two three four five six seven eight nine ten"


def slowly(_: Request) -> str:
    return LONG


def only(there: FakeSlack) -> Held:
    (held,) = there.messages.values()
    return held


async def begun(it: Talk, text: str = "tell me") -> Held:
    """Ask, and wait until something is seen of the answer."""
    await it.there.deliver(it.there.message("UANN", text))
    await it.there.until(lambda: any("one" in held.said for held in it.there.messages.values()))
    return list(it.there.messages.values())[-1]


@pytest.mark.parametrize("transport", ["stream", "edit"])
async def test_every_transport_ends_with_one_whole_answer(tmp_path: Path, transport: str) -> None:
    async with talk(tmp_path, slowly, delay_s=0.02, transport=transport) as it:
        held = await it.ask("UANN", "tell me")
        assert held.said == LONG
        assert held.streamed == (transport == "stream")
        assert bool(it.there.called("chat.update")) == (transport == "edit")
        assert len(it.there.messages) == 1
        assert all(LONG.startswith(seen) or seen == "…" for seen in held.history)


@pytest.mark.parametrize("fault", ["ratelimited", "missing_scope", "500", "unknown_method"])
async def test_where_no_stream_is_to_be_had_the_answer_is_posted_and_edited(tmp_path: Path, fault: str) -> None:
    async with talk(tmp_path, slowly, delay_s=0.01) as it:
        it.there.faults["chat.startStream"].append(fault)
        held = await it.ask("UANN", "tell me")
        assert (held.said, held.streamed) == (LONG, False)
        assert len(it.there.called("chat.startStream")) == 1


@pytest.mark.parametrize("fault", ["lost", "cut", "500", "fatal_error"])
@pytest.mark.parametrize("method", ["chat.appendStream", "chat.stopStream"])
async def test_an_append_with_unknown_outcome_is_never_repeated(tmp_path: Path, method: str, fault: str) -> None:
    async with talk(tmp_path, slowly, delay_s=0.02) as it:
        it.there.faults[method].append(fault)
        held = await it.ask("UANN", "tell me")
        assert (held.said, held.streaming) == (LONG, False)
        assert len(it.there.called("chat.startStream")) == 1
        assert len(it.there.messages) == 1
        if method == "chat.appendStream":
            assert len(it.there.called(method)) == 1
        assert await it.here.count("ledger") == 1


async def test_a_start_whose_answer_is_lost_leaves_one_orphan_and_no_second_stream(tmp_path: Path) -> None:
    async with talk(tmp_path, slowly) as it:
        it.there.faults["chat.startStream"].append("lost")
        await it.there.deliver(it.there.message("UANN", "tell me"))
        await it.settled()
        orphan, held = it.there.messages.values()
        assert (orphan.said, held.said) == ("", LONG)
        assert len(it.there.called("chat.startStream")) == 1
        assert it.here.deliveries.orphans == 1


@pytest.mark.parametrize("fault", ["lost", "500", "fatal_error"])
async def test_a_first_message_of_which_nobody_knows_is_posted_once_more_and_not_again(
    tmp_path: Path, fault: str
) -> None:
    async with talk(tmp_path, slowly, transport="edit") as it:
        it.there.faults["chat.postMessage"].extend([fault] * 6)
        await it.there.deliver(it.there.message("UANN", "tell me"))
        await it.settled()
        assert len(it.there.called("chat.postMessage")) == 2
        assert await it.here.count("ledger") == 0
        it.there.faults["chat.postMessage"].clear()
        assert (await it.ask("UANN", "and now?")).said == LONG


async def test_a_slack_that_is_away_is_waited_for_without_posting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("core.delivery.retry._FIRST_PAUSE_S", 0.01)
    async with talk(tmp_path, slowly, transport="edit") as it:
        it.there.faults["chat.postMessage"].append("500")
        it.there.faults["auth.test"].extend(["500"] * 5)
        assert (await it.ask("UANN", "tell me")).said == LONG
        assert len(it.there.called("chat.postMessage")) == 2


async def test_a_post_that_found_no_connection_is_no_lost_response() -> None:
    there, port = FakeSlack(), unused_port()

    async def token() -> str:
        return there.workspace("T1").token

    client = AsyncWebClient(base_url=f"http://127.0.0.1:{port}/api/", retry_handlers=[])
    given = {"channel": "C1", "text": "hello", "unfurl_links": False, "unfurl_media": False}
    with pytest.raises(ClientConnectorError):
        await api.SlackApi(client, token, fast()).write("chat.postMessage", repeatable=False, **given)
    async with there.open(port):
        await api.SlackApi(client, token, fast()).write("chat.postMessage", repeatable=False, **given)
        assert only(there).said == "hello"


async def test_a_stream_that_expires_is_recovered(tmp_path: Path) -> None:
    async with talk(tmp_path, lambda _: "one " * 300, delay_s=0.01) as it:
        held = await begun(it)
        it.there.later(301)
        assert not held.streaming
        await it.settled()
        assert len(it.there.called("chat.stopStream")) == 1  # what has ended is not asked to end again
        await it.until_session("active")
        assert held.said == ("one " * 300).strip()
        assert len(it.there.messages) == 1
        assert await it.here.count("ledger") == 1


async def test_a_restart_in_the_middle_of_a_stream_ends_in_one_answer(tmp_path: Path) -> None:
    async with FakeSlack().open() as there:
        there.workspace("T1")
        before = there.ts()
        with pytest.raises(ExceptionGroup):  # noqa: PT012 - a kill is in the middle
            async with talk(tmp_path, lambda _: "one " * 2000, there=there, delay_s=0.05) as it:
                asked = there.message("UANN", "tell me", ts=before)
                await there.deliver(asked)
                await there.until(lambda: any("one" in held.said for held in there.messages.values()))
                raise RuntimeError("killed")
        held = only(there)
        there.sockets.clear()
        async with talk(tmp_path, lambda _: "one two", there=there) as it:
            await it.settled()
            assert only(there) is held
            assert not held.streaming
            assert len(there.called("chat.startStream")) == 1
            assert await it.here.count("ledger") == 1


async def test_nothing_goes_out_before_retry_after(tmp_path: Path) -> None:
    async with talk(tmp_path, slowly, transport="edit") as it:
        it.there.faults["chat.postMessage"].append("wait1")
        it.there.faults["chat.update"].append("wait1")
        held = await it.ask("UANN", "tell me")
        assert held.said == LONG
        assert it.there.early == 0


async def test_slacks_own_rates_are_kept_under_load(tmp_path: Path) -> None:
    async with talk(tmp_path, lambda _: "short", pace=SlackRateLimiter) as it:
        it.there.limits = True
        asked = [it.there.message(f"U{number}", "hello") for number in range(20)]
        for one in asked:
            await it.there.deliver(one)
        await it.settled(60)
        assert [held.said for held in it.there.messages.values()] == ["short"] * 20
        started = it.there.called("chat.startStream")
        assert 1 <= len(started) <= RATES["chat.startStream"].burst + 1
        assert len(it.there.called("chat.postMessage")) == 20 - len(started)


@pytest.mark.parametrize("transport", ["stream", "edit"])
async def test_long_answers_are_split_within_slacks_limits(tmp_path: Path, transport: str) -> None:
    text = "\n\n".join(f"Paragraph {number}: " + "@here is text. " * 40 for number in range(60)).strip()
    async with talk(tmp_path, lambda _: text, transport=transport) as it:
        await it.here.database.write(lambda tx: tx.run("UPDATE channel SET tokens_out = 50000"))
        await it.ask("UANN", "tell me all")
        parts = list(it.there.messages.values())
        assert len(parts) > 2
        assert "".join(held.said for held in parts).replace("\u2060", "").split() == text.split()
        assert [len(held.labels) for held in parts[:-1]] == [0] * (len(parts) - 1)
        assert all(len(held.said) <= LIMIT for held in parts)
        assert sum(held.streamed for held in parts) <= 1
        assert {held.thread for held in parts} == {parts[0].thread}


@pytest.mark.parametrize("transport", ["stream", "edit"])
@pytest.mark.parametrize("fence", ["```", "~~~~"])
async def test_a_code_block_that_is_cut_is_whole_in_each_message(tmp_path: Path, transport: str, fence: str) -> None:
    code = "".join(f"def f{number}(x):\n    return x * {number}\n\n" for number in range(800))
    text = f"Here:\n\n{fence}python\n{code}{fence}\n\nThat was **all**."
    async with talk(tmp_path, lambda _: text, transport=transport) as it:
        await it.here.database.write(lambda tx: tx.run("UPDATE channel SET tokens_out = 100000"))
        await it.ask("UANN", "write it")
        first, *between, last = [held.said for held in it.there.messages.values()]
        assert between
        assert first.startswith("Here:")
        assert last.endswith("That was **all**.")
        assert all(said.count(fence) == 2 for said in (first, *between, last))
        assert all(said.startswith(f"{fence}python\ndef f") for said in (*between, last))
        assert all(said.endswith(f"\n{fence}") for said in (first, *between))
        written = "".join((first, *between, last)).replace(f"{fence}python", "").replace(fence, "")
        assert written.split() == text.replace(f"{fence}python", "").replace(fence, "").split()
        kept = "SELECT text FROM turn WHERE role = 'assistant'"
        assert await it.here.database.read(lambda tx: tx.cipher.unseal(tx.value(kept))) == text


@pytest.mark.parametrize(
    ("pieces", "shown"),
    [
        (["a\n```py x\nb\n\n", "c\n```\nd"], ["a\n```py x\nb\n```", "```py\nc\n```\nd"]),
        (["```\nb\n\n", "```\nd ``` e"], ["```\nb\n```", "d ``` e"]),
        (["~~~\n```\n", "~~~~ \n"], ["~~~\n```\n~~~", "~~~\n~~~~ \n"]),
        (["`a```\n", "```a`\n"], ["`a```\n", "```a`\n"]),
        (["```\nnever closed"], ["```\nnever closed"]),
    ],
)
def test_a_cut_fence_is_closed_and_opened_again(pieces: list[str], shown: list[str]) -> None:
    assert whole(pieces) == shown


def table(rows: int, cell: str = "It is {n}. Really, it is. ") -> str:
    return "| what | how much |\n|---|--:|\n" + "".join(f"| {cell.format(n=n)} | {n} |\n" for n in range(rows))


@pytest.mark.parametrize("transport", ["stream", "edit"])
async def test_a_table_that_is_cut_has_its_head_in_each_message(tmp_path: Path, transport: str) -> None:
    text = f"Here:\n\n{table(700)}\nThat was **all**."
    async with talk(tmp_path, lambda _: text, transport=transport) as it:
        await it.here.database.write(lambda tx: tx.run("UPDATE channel SET tokens_out = 100000"))
        await it.ask("UANN", "write it")
        first, *between, last = [held.said for held in it.there.messages.values()]
        assert between
        assert first.startswith("Here:")
        assert last.endswith("That was **all**.")
        head, rows = table(0), table(700).splitlines()[2:]
        assert all(said.startswith(head) for said in (*between, last))
        seen = [line for said in (first, *between, last) for line in said.splitlines() if line[:1] == "|"]
        assert [line for line in seen if line not in head.splitlines()] == rows


@pytest.mark.parametrize(
    ("before", "cell", "line"),
    [
        ("", "It is {n}. Really. ", "\n"),
        ("- a list\n\n", "{n}" + "x" * 3000, "\r\n"),
        ("x" * (LIMIT - 20) + "\n\n", "{n}" + " y" * 7000, "\n"),
        ("x" * (LIMIT - 44) + "\n\n", "It is {n}. Really. ", "\r\n"),
        ("x" * (LIMIT - 44) + "\n\n", "{n}" + "x" * 3000, "\n"),
        ("| no table |\n\n", "{n}" + " y" * 7000, "\r\n"),
    ],
)
def test_a_table_is_cut_between_its_rows_where_a_message_holds_one(before: str, cell: str, line: str) -> None:
    rows = 12 if len(cell) < 9_000 else 4  # each of which is cut itself
    text = f"{before}{table(rows, cell * (1 if len(cell) > 99 else 60))}\nEnd.".replace("\n", line)
    pieces = split(text)
    assert "".join(pieces) == text
    assert all(len(piece) <= LIMIT for piece in pieces)
    shown = whole(pieces)
    assert all(len(one) <= LIMIT + 1_000 for one in shown)
    if len(cell) < 9_000:
        for one in shown:
            assert not any(line.count("|") not in (0, 2, 3) for line in one.splitlines())
            if "| It is" in one or "xxx |" in one:
                assert table(0) in one.replace(line, "\n")


PHASES = [
    ("stream", "chat.startStream", 1),
    ("stream", "chat.appendStream", 1),
    ("stream", "chat.appendStream", 3),
    ("stream", "chat.stopStream", 1),
    ("edit", "chat.postMessage", 1),
    ("edit", "chat.update", 1),
    ("edit", "chat.update", 3),
]


@pytest.mark.parametrize("what", ["call cut", "answer lost", "socket refreshed", "socket cut", "away", "expired"])
@pytest.mark.parametrize("http", [False, True], ids=["socket", "http"])
async def test_what_is_cut_at_every_phase_ends_whole_and_once(
    tmp_path: Path, http: bool, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each phase of an answer meets the same mishap; within 60 s it stands there whole, and is charged once."""
    monkeypatch.setattr(sink, "_APPEND_S", 0.02)
    monkeypatch.setattr(sink, "_EDIT_S", 0.02)
    monkeypatch.setattr("core.delivery.retry._FIRST_PAUSE_S", 0.1)
    monkeypatch.setattr(bot, "_PING_S", 1)
    if http and what.startswith("socket"):
        pytest.skip("there is no socket")
    async with talk(tmp_path, lambda _: LONG, delay_s=0.02, http=http) as it:
        workspace = it.bot.workspaces and it.bot.workspaces.get("T1")
        assert workspace is not None
        for number, (transport, method, nth) in enumerate(PHASES):
            workspace.sink._transport = transport
            nth += len(it.there.called(method))
            if what in ("call cut", "answer lost"):
                it.there.before[method, nth] = lambda method=method: _fault(it, method, what)  # type: ignore[misc]
            else:
                it.there.before[method, nth] = lambda: _mishap(it, what)
            await it.there.deliver(it.there.message("UANN", f"question {number}"))
            await it.settled(60)
            assert not it.there.before, (transport, method, nth)
            whole = [held for held in it.there.messages.values() if held.said == LONG and not held.streaming]
            assert len(whole) == number + 1, (transport, method, nth)
        assert await it.here.count("ledger") == len(PHASES)


async def _fault(it: Talk, method: str, what: str) -> None:
    it.there.faults[method].append("cut" if what == "call cut" else "lost")


async def _mishap(it: Talk, what: str) -> None:
    if what == "socket refreshed":
        await it.there.refresh()
    elif what == "socket cut":
        await it.there.cut()
    elif what == "expired":
        it.there.later(301)
    else:
        it.there.down = True
        asyncio.get_running_loop().call_later(0.5, lambda: setattr(it.there, "down", False))


@pytest.mark.parametrize("refused", [{"markdown"}, {"markdown", "actions"}])
async def test_what_slack_does_not_take_is_written_plainer(tmp_path: Path, refused: set[str]) -> None:
    text = "**bold** <!channel> " + "antidisestablishmentarianism " * 300
    async with talk(tmp_path, lambda _: text, transport="edit") as it:
        it.there.refused = refused
        held = await it.ask("UANN", "tell me")
        assert held.said.replace("\u2060", "") == text.strip()
        assert "<!" not in held.said
        assert held.labels == ([] if "actions" in refused else [say("en", "service.again")])
        assert await it.here.count("ledger") == 1


@pytest.mark.parametrize("transport", ["stream", "edit"])
async def test_an_answer_whose_message_was_removed_is_posted_anew(tmp_path: Path, transport: str) -> None:
    async with talk(tmp_path, lambda _: "one " * 50, delay_s=0.01, transport=transport) as it:
        held = await begun(it)
        del it.there.messages[held.channel, held.ts]
        await it.settled()
        again = only(it.there)
        assert (again.said, again.thread) == (("one " * 50).strip(), held.thread)
        assert again.labels == [say("en", "service.again")]
        await it.until_session("active")
        assert await it.here.count("ledger") == 1


async def test_an_answer_whose_message_was_removed_while_nothing_ran_is_posted_anew(tmp_path: Path) -> None:
    async with FakeSlack().open() as there:
        there.workspace("T1")
        with pytest.raises(ExceptionGroup):  # noqa: PT012 - a kill is in the middle
            async with talk(tmp_path, lambda _: "one " * 2000, there=there, delay_s=0.05) as it:
                await begun(it)
                raise RuntimeError("killed")
        there.messages.clear()
        there.sockets.clear()
        async with talk(tmp_path, lambda _: "one two", there=there) as it:
            await it.settled()
            assert only(there).said == "one two"
            assert await it.here.count("ledger") == 1


@pytest.mark.parametrize("how", ["refresh", "cut"])
async def test_a_socket_that_is_refreshed_or_cut_in_mid_answer_loses_nothing(
    tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bot, "_PING_S", 1)
    async with talk(tmp_path, lambda _: "one " * 100, delay_s=0.01) as it:
        held = await begun(it)
        before = len(it.there.sockets)
        await (it.there.refresh() if how == "refresh" else it.there.cut())
        await it.there.until(lambda: len(it.there.sockets) > before, 60)
        await it.settled(60)
        assert held.said == ("one " * 100).strip()
        assert (await it.ask("UANN", "again")).said == ("one " * 100).strip()


async def test_a_workspace_that_cannot_be_reached_ends_the_reply_without_a_charge(tmp_path: Path) -> None:
    async with talk(tmp_path, slowly) as it:
        it.there.workspaces["T1"].alive = False
        await it.there.deliver(it.there.message("UANN", "tell me"))
        await it.settled(60)
        assert not it.there.messages
        assert await it.here.count("ledger") == 0


GROWING = [
    *[
        "<!channel> x",
        "a @here b <@U1>",
        "< @ <",
        "mail@here.example @channels",
        "x@",
        "<!DOCTYPE html> <!doc",
        "x/@here",
    ],
    *["<!-- <!d", "a<@NonNull T> <@UA <@W", "<#C1> <#if>", "@channel", "/@everyone.", "@everyonex <!everyone"],
]


@pytest.mark.parametrize("text", GROWING)
def test_what_is_shown_while_it_grows_begins_what_is_shown_in_the_end(text: str) -> None:
    final = harmless(text.strip())
    for end in range(len(text) + 1):
        assert final.startswith(growing(text[:end]))


@pytest.mark.parametrize(
    "text",
    [
        "<!DOCTYPE html>\n<!-- a comment -->\n<![CDATA[x]]>",
        "support@here.com or https://medium.com/@channel",
        "List<@NonNull String> x; <#if a> <#default> #include <stdio.h>",
        "@channels @hereby @everyone1",
    ],
)
def test_code_and_addresses_stay_as_they_are(text: str) -> None:
    assert harmless(text) == text


def test_what_rings_is_made_harmless() -> None:
    texts = [
        *["<!channel>", "<!HERE|here>", "<!everyone>", "<!group>", "<!subteam^S1>", "<!date^1^{date}|x>", "x<!here>"],
        *["<@U012AB>", "<@W1|ann>", "<#C1>", "<#D1|x>", "<<!channel>", "<!doctyp <!channel>"],
        *[
            "@here",
            "**@channel**",
            "_@everyone_",
            "(@here)",
            "大家@channel开会",
            " /@here",
            "@@channel",
            "a.@Channel",
            "\t@HERE!",
        ],
    ]
    for text in texts:
        made = harmless(text)
        assert made != text
        assert made.replace("\u2060", "") == text
        assert not re.search(
            r"<(?:!(?:channel|here|everyone|group|subteam|date)|@[UW]|#[CDG])|@(?:channel|here|every)", made, re.I
        )
