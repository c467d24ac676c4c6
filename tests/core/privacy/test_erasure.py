"""Privacy from the first day: what people said is encrypted, short-lived, theirs to erase, and never used unasked."""

from __future__ import annotations

import asyncio
import base64
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from core.adapters import folders, registry
from core.channels import adapter_names, directory, terminal
from core.commands.parser import parse
from core.commands.registry import CommandContext
from core.config.schema import Retention
from core.delivery.deliveries import Deliveries
from core.jobs import datasets, jobs
from core.jobs.commands import prepare_data
from core.privacy import commands, erasure, retention, tombstones
from core.storage.cipher import Cipher
from core.storage.database import Database, Tx
from core.storage.home import Home
from core.types import Address, Body, Caller, Handle, Incoming, Kind, Lane, Receipt
from tests.support.database import write_now
from tests.support.running_service import OWNER, STRANGER, RunningService, running_service

DAY_MS = 86_400_000
PEOPLE = 50


class Clock:
    def __init__(self) -> None:
        self.now_ms = 1_800_000_000_000

    def __call__(self) -> int:
        return self.now_ms


def marker(n: int) -> str:
    """A text that occurs nowhere else, for each person another; some Chinese, some long."""
    return [f"quokka{n:02}marzipan", f"第{n:02}号秘密花园的钥匙", f"tangerine{n:02}" * 40][n % 3]


def forms(text: str) -> Iterator[bytes]:
    """A text as it may lie in a file: at any of three offsets in base64, escaped in JSON, in UTF-8 and UTF-16."""
    yield from (text.encode(), text.encode("utf-16-le"), text.encode("utf-16-be"), json.dumps(text)[1:-1].encode())
    for offset in range(3):
        inside = base64.b64encode(b"\0" * offset + text.encode())
        yield inside[4 if offset else 0 : -4]


def bytes_below(folder: Path) -> bytes:
    return b"\0".join(path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file())


def found(folder: Path, texts: list[str]) -> list[str]:
    data = bytes_below(folder)
    return [text for text in texts if any(form in data for form in forms(text))]


def test_the_search_finds_every_form(tmp_path: Path) -> None:
    for n in range(3):
        for form in forms(marker(n)):
            (tmp_path / "file").write_bytes(b"before" + form + b"after")
            assert found(tmp_path, [marker(n)]) == [marker(n)]


# --- markers ---


async def talk(it: RunningService, people: int) -> None:
    for n in range(people):
        person = f"person-{n}"
        if n % 2:
            await it.send("/consent on", user=person, conversation=f"c{n}")
        await it.send(f"I tell you {marker(n)}", user=person, conversation=f"c{n}")
    await it.settled()


async def bring(it: RunningService) -> str:
    """The data set of what consenting people said, as /finetune conversations makes it: its sha256."""

    def caller(tx: Tx) -> Caller:
        channel = directory.channel_by_name(tx, "acme")
        assert channel is not None
        user = tx.cipher.hash_user("fake", "bot", OWNER)
        return Caller(user, Address("fake", "bot", "p", "c"), channel, "en", 0, 0)

    who = await it.database.read(caller)
    context = CommandContext(it.home, it.database, Deliveries(it.database).fetch)
    return (await prepare_data(context, who, parse("/finetune conversations"))).sha256


async def test_text_lies_in_no_file_in_the_clear_before_anyone_asks(tmp_path: Path) -> None:
    async with running_service(tmp_path) as it:
        await talk(it, PEOPLE)
        assert found(tmp_path, [marker(n) for n in range(PEOPLE)]) == []
    assert found(tmp_path, [marker(n) for n in range(PEOPLE)]) == []


async def test_50_people_are_forgotten_to_the_last_byte_and_the_others_stay(tmp_path: Path) -> None:
    async with running_service(tmp_path) as it:
        await talk(it, PEOPLE + 2)
        sha256 = await bring(it)
        consenting = [marker(n) for n in range(PEOPLE + 2) if n % 2]
        assert found(tmp_path / "datasets", [marker(n) for n in range(PEOPLE + 2)]) == consenting
        job = await it.database.write(lambda tx: jobs.create(tx, owner(tx), sha256, "conversations"))
        folder = tmp_path / "jobs" / str(job.id)  # as the supervisor lays it out
        folder.mkdir()
        shutil.copy(tmp_path / "datasets" / sha256, folder / "data.jsonl")
        (tmp_path / "logs" / "job-1.log").write_text("train.begin\n")
        forgotten: list[str] = []

        async def note(channel: str, conversation: str = "") -> None:
            forgotten.append(conversation)

        it.engine.forget = note
        for n in range(PEOPLE):
            await it.send("/forget yes", user=f"person-{n}", conversation=f"c{n}")
        await it.settled()
        await retention.sweep(it.database, it.home)
        assert found(tmp_path, [marker(n) for n in range(PEOPLE)]) == []
        turns = await it.database.read(
            lambda tx: [tx.cipher.unseal(r["text"]) for r in tx.all("SELECT text FROM turn")]
        )
        kept = {marker(n) for n in (PEOPLE, PEOPLE + 1)}
        assert {one for one in kept if any(one in text for text in turns)} == kept
        assert not [text for text in turns if any(marker(n) in text for n in range(PEOPLE))]
        assert await it.count("ledger") == PEOPLE + 2
        assert len(set(forgotten)) == PEOPLE


async def test_without_consent_nobody_is_in_a_data_set_and_consent_does_not_look_back(tmp_path: Path) -> None:
    async with running_service(tmp_path) as it:
        await it.ask(f"before {marker(0)}", user="late")
        await it.ask("/consent on", user="late")
        await it.ask(f"after {marker(1)}", user="late")
        await it.ask(f"never {marker(2)}", user="silent", conversation="other")
        await bring(it)
        assert found(tmp_path / "datasets", [marker(n) for n in range(3)]) == [marker(1)]
        whose = await it.database.read(lambda tx: [row["user_hash"] for row in tx.all("SELECT * FROM dataset_person")])
        assert whose == [it.database.cipher.hash_user("fake", "bot", "late")]


async def test_taking_consent_back_erases_the_data_sets_and_ends_their_jobs(tmp_path: Path) -> None:
    async with running_service(tmp_path) as it:
        await it.ask("/consent on")
        await it.ask(marker(0))
        sha256 = await bring(it)
        await it.database.write(lambda tx: jobs.create(tx, owner(tx), sha256, "conversations"))
        await it.ask("/consent off")
        assert await it.count("dataset", "erased_ms IS NULL") == 0
        assert await it.count("job", "state = 'cancelled' AND reason = 'erased'") == 1
        assert found(tmp_path / "datasets", [marker(0)]) == []


def owner(tx: Tx) -> Caller:
    channel = directory.channel_by_name(tx, "acme")
    assert channel is not None
    user = tx.cipher.hash_user("fake", "bot", OWNER)
    return Caller(user, Address("fake", "bot", "p", "c"), channel, "en", 0, 0)


# --- /forget ---


async def test_forget_asks_first_and_says_what_goes(tmp_path: Path) -> None:
    async with running_service(tmp_path) as it:
        await it.ask("hello")
        assert "/forget yes" in await it.ask("/forget")
        assert await it.count("turn") == 2


@pytest.mark.parametrize("discarded", [False, True])
async def test_forget_withdraws_the_versions_that_learned_from_the_person_and_audits_it(
    tmp_path: Path, discarded: bool
) -> None:
    async with running_service(tmp_path) as it:
        await it.ask("/consent on")
        await it.ask(marker(0))
        sha256 = await bring(it)

        def publish(tx: Tx) -> None:
            candidate = folders.Candidate("a" * 64, tmp_path, "base", sha256, "{}")
            registry.publish(tx, candidate, "acme", 1)
            registry.promote(tx, "acme", "a" * 64, "owner", "")
            if discarded:
                registry.unpublish(tx, "a" * 64, "discarded")

        await it.database.write(publish)
        (tmp_path / "adapters" / ("a" * 64)).mkdir()
        await it.ask("/forget yes")
        assert await it.database.read(lambda tx: adapter_names.champion(tx, "acme")) == (None, "base")
        told = await it.count("audit", "action = 'adapter unpublish' AND target = 'acme@1'")
        assert told == (0 if discarded else 1)
        assert not (tmp_path / "adapters" / ("a" * 64)).exists()


async def test_forget_erases_what_an_operator_asked_two_versions(tmp_path: Path) -> None:
    async with running_service(tmp_path) as it:
        await it.database.write(lambda tx: _compared(tx, typed=True))
        await it.ask("/forget yes", user=OWNER)
        assert await it.count("comparison", "question IS NULL") == 1


@pytest.mark.slow
async def test_a_reply_that_runs_while_its_person_is_forgotten_is_not_kept(tmp_path: Path) -> None:
    async with running_service(tmp_path, lambda _: f"{marker(0)} " * 400, delay_s=0.005) as it:
        await it.send("talk", conversation="one")
        await it.bot.showing.wait()
        await it.send("/forget yes", conversation="two")
        await it.settled()
        assert await it.count("turn") == 0
        assert await it.count("ledger") == 0
        assert await it.count("delivery", "body IS NOT NULL") == 0
        assert await it.count("inbox", "state NOT IN ('done', 'dead')") == 0


async def test_a_reply_whose_person_is_forgotten_while_it_is_written_is_written_once(tmp_path: Path) -> None:
    writing, forgotten, written = asyncio.Event(), asyncio.Event(), []
    async with running_service(tmp_path, lambda _: marker(0)) as it:
        finish_now = it.bot.finish

        async def finish_slowly(handle: Handle, body: Body) -> Receipt:
            if body.text == marker(0):
                written.append(handle)
                writing.set()
                await forgotten.wait()
            return await finish_now(handle, body)

        it.bot.finish = finish_slowly  # type: ignore[method-assign]
        await it.send("talk", conversation="one")
        await writing.wait()
        await it.send("/forget yes", conversation="two")
        while not await it.count("inbox", "outcome = 'command'"):  # noqa: ASYNC110 - until it is told
            await asyncio.sleep(0.01)
        forgotten.set()
    assert len(written) == 1
    async with running_service(tmp_path) as it:
        assert await it.count("ledger") == 0
        assert await it.count("inbox", "outcome = 'forgotten' AND state = 'done'") == 1


async def test_a_database_from_a_copy_forgets_the_same_people_again(tmp_path: Path) -> None:
    home, copy = tmp_path / "home", tmp_path / "copy.db"
    async with running_service(home) as it:
        await it.ask(marker(0))
        await it.ask("another person stays", user="other", conversation="other")
    shutil.copy(home / "distributary.db", copy)
    async with running_service(home) as it:
        await it.send("/forget yes", key="forget")
        await it.settled()
        assert await it.count("turn") == 2
    shutil.copy(copy, home / "distributary.db")
    async with running_service(home) as it:
        await it.send("/whoami", user="other", conversation="other", key="who")
        await it.settled()
        assert await it.count("turn") == 2
        assert await it.count("turn", f"user_hash = '{it.database.cipher.hash_user('fake', 'bot', STRANGER)}'") == 0


@pytest.mark.parametrize("restarted", [False, True])
async def test_files_that_a_full_disk_or_a_crash_has_left_go_later_and_the_answer_says_what_was_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, restarted: bool
) -> None:
    def full(home: Home, found: object) -> None:
        raise OSError(28, "No space left on device")

    async with running_service(tmp_path) as it:
        await it.ask("/consent on")
        await it.ask(marker(0))
        await bring(it)
        monkeypatch.setattr(tombstones, "append_to_file", full)
        assert "is erased" in await it.ask("/forget yes")
        assert await it.count("inbox", "outcome = 'failed'") == 0
        assert found(tmp_path / "datasets", [marker(0)]) == [marker(0)]
        monkeypatch.undo()
        if not restarted:
            await retention.clean(it.database, it.home, Retention())
    async with running_service(tmp_path, running=False) as it:
        if restarted:
            await erasure.reapply(it.database, it.home)
        assert found(tmp_path / "datasets", [marker(0)]) == []
        assert it.database.cipher.hash_user("fake", "bot", STRANGER) in (tmp_path / "erasures").read_text()


async def test_the_limits_are_not_renewed_by_forgetting(tmp_path: Path) -> None:
    async with running_service(tmp_path) as it:
        for n in range(6):
            await it.ask(f"question {n}")
        await it.ask("/forget yes")
        assert "6 messages" in await it.ask("one more")


async def test_an_hour_later_no_count_says_whose_it_was(tmp_path: Path) -> None:
    clock = Clock()
    async with running_service(tmp_path, clock=clock) as it:
        await it.ask("hello")
        await it.ask("/forget yes")
        clock.now_ms += 2 * 3_600_000
        await retention.clean(it.database, it.home, Retention())
        assert await it.count("generation", "user_hash <> ''") == 0
        assert await it.count("inbox", "user_hash <> ''") == 0


async def test_no_number_of_a_person_stays_anywhere_once_nothing_can_be_answered_any_more(tmp_path: Path) -> None:
    clock = Clock()
    async with running_service(tmp_path, clock=clock) as it:
        for n, text in enumerate(("hello", "/forget yes")):  # a private chat, where its number is the person's
            await it.service.accept(
                Incoming(
                    lane=Lane.TURN,
                    kind=Kind.MESSAGE,
                    address=Address("fake", "bot", "777000777", "777000777", "777000777"),
                    user="777000777",
                    update_key=f"{n}",
                    message_key=f"777000777:{n}",
                    text=text,
                )
            )
            await it.settled()
        at = Address("fake", "bot", "777000777", "777000777")
        assert await it.service.places.heard(at, "777000777:0")
        assert not await it.service.places.heard(at, "777000777:2")
        clock.now_ms += 8 * DAY_MS
        await retention.clean(it.database, it.home, Retention())
        assert found(tmp_path, ["777000777"]) == []


@pytest.mark.parametrize(("state", "reason"), [("cancelled", jobs.REQUESTED), ("failed", f"{jobs.KEPT}: a reason")])
async def test_a_job_keeps_its_address_while_it_may_be_resumed_or_has_something_to_say(
    tmp_path: Path, state: str, reason: str
) -> None:
    clock = Clock()

    def stopped(tx: Tx) -> None:
        _job_of_a_file(tx)
        tx.run("UPDATE job SET state = ?, reason = ?, started_ms = created_ms", [state, reason])

    async with running_service(tmp_path, clock=clock, running=False) as it:
        await it.database.write(stopped)
        for age_days, change, kept in (
            (8, "SELECT 1", 1),
            (31, "UPDATE delivery SET state = 'open'", 1),
            (31, "UPDATE delivery SET state = 'done'", 0),
        ):
            clock.now_ms = Clock().now_ms + age_days * DAY_MS
            await it.database.write(lambda tx, change=change: tx.run(change))
            await retention.clean(it.database, it.home, Retention())
            await retention.clean(it.database, it.home, Retention())  # the data set went in the pass before
            assert await it.count("job", "place <> ''") == kept


# --- expiry ---


KEPT_FOR_MS = {
    15 * 60_000: [("inbox", "state = 'done' AND payload IS NOT NULL")],
    DAY_MS: [("turn", "1"), ("conversation", "1"), ("comparison", "question IS NOT NULL AND typed = 1")],
    7 * DAY_MS: [
        ("inbox", "state = 'dead' AND payload IS NOT NULL"),
        ("inbox", "place <> ''"),
        ("part", "handle <> ''"),
        ("job", "place <> ''"),
    ],
    30 * DAY_MS: [
        ("dataset", "erased_ms IS NULL"),
        ("comparison", "question IS NOT NULL"),
        ("job_event", "1"),
        ("person", "user_hash NOT IN (SELECT user_hash FROM operator)"),
    ],
    400 * DAY_MS: [("audit", "1")],
    407 * DAY_MS: [("invite", "1")],
}


async def test_what_is_kept_goes_when_its_time_is_over_and_not_before(tmp_path: Path) -> None:
    clock = Clock()
    begun_ms = clock.now_ms
    async with running_service(tmp_path, clock=clock) as it:
        await it.ask("hello")
        await it.ask("/operator invite acme someone", user=OWNER, conversation="owner")
        await it.service.accept_dead("fake", "bot", "bad", "unreadable")
        await it.database.write(_job_of_a_file)
        await it.database.write(lambda tx: _compared(tx, typed=True))
        await it.database.write(lambda tx: _compared(tx, typed=False))
        for age_ms, rows in KEPT_FOR_MS.items():
            for now_ms, left in ((begun_ms + age_ms - 1000, True), (begun_ms + age_ms + 1000, False)):
                clock.now_ms = now_ms
                await retention.clean(it.database, it.home, Retention())
                for table, where in rows:
                    assert (await it.count(table, where) > 0) == left, (table, where, age_ms)
        assert await it.count("ledger") == 1


def _job_of_a_file(tx: Tx) -> None:
    datasets.keep_dataset(tx, "d" * 64, "faq.jsonl", source="file", size_bytes=1, brought_by="owner")
    job = jobs.create(tx, owner(tx), "d" * 64, "faq.jsonl")
    tx.insert("job_event", job_id=job.id, seq=1, at_ms=tx.now_ms, kind="x", data="{}")
    jobs.end(tx, job.id, "failed", "ours: x")
    told = tx.insert("delivery", job_id=job.id, state="done")
    tx.insert("part", delivery_id=told, number=1, handle="h", receipt="r")


def _compared(tx: Tx, *, typed: bool) -> None:
    """A question to a version of that data set and to base, typed or one of its test rows."""
    if registry.versions(tx, "acme") == []:
        registry.publish(tx, folders.Candidate("a" * 64, Path("."), "base", "d" * 64, "{}"), "acme", 1)
        tx.run("UPDATE job SET result = ?", ["a" * 64])
    tx.insert(
        "comparison",
        inbox_id=1000 + typed,
        channel_id=owner(tx).channel.id,
        candidate="a" * 64,
        candidate_first=1,
        question=tx.cipher.seal(marker(0)),
        typed=typed,
        actor=owner(tx).user,
        at_ms=tx.now_ms,
    )


async def test_what_was_typed_at_the_terminal_goes_with_the_conversations_and_with_forget(tmp_path: Path) -> None:
    clock = Clock()
    history = tmp_path / "history"

    def typed(*ages_h: float) -> str:
        times = [time.localtime(clock.now_ms // 1000 - age_h * 3600) for age_h in ages_h]
        return "".join(f"\n# {time.strftime('%Y-%m-%d %H:%M:%S', at)}.000000\n+line\n" for at in times)

    async with running_service(tmp_path, clock=clock, running=False) as it:
        history.write_text(typed(25, 23, 0))
        await retention.clean(it.database, it.home, Retention())
        assert history.read_text() == typed(23, 0)
        local = it.database.cipher.hash_user(terminal.TERMINAL, "home", terminal.LOCAL_USER)
        await it.database.write(lambda tx: tx.insert("erasure", user_hash=local, at_ms=tx.now_ms - 3_600_000))
        await retention.clean(it.database, it.home, Retention())
        assert history.read_text() == typed(0)


def test_privacy_says_the_periods_that_are_in_force(tmp_path: Path) -> None:
    home = Home(tmp_path)
    home.create()
    with Database(home.database, Cipher.open(home.key_file, create=True)) as database:

        def said(tx: Tx) -> str:
            terminal.ensure_terminal(tx, "home")
            retention.keep_retention(tx, Retention(conversation_hours=2, payload_minutes=5))
            channel = directory.channel_by_name(tx, "terminal")
            assert channel is not None
            caller = Caller("u", Address("terminal", "home", "home", "home"), channel, "en", 0, 0)
            return commands.privacy(tx, caller, parse("/privacy")).body.text

        text = write_now(database, said)
    assert "120 min" in text or "2 h" in text
    assert "5 min" in text
