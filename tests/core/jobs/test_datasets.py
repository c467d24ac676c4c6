"""How a data set comes into the home: by path, by name, or of what consenting people said; and every refusal."""

from __future__ import annotations

import asyncio
import errno
import gzip
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from core.channels import bindings, directory, operators, terminal, training_permission
from core.chat import conversations
from core.chat.dispatch import dispatch
from core.commands.parser import parse
from core.commands.registry import CommandContext
from core.delivery.deliveries import Deliveries
from core.errors import AppError, BadInput, StoredUnreadable
from core.i18n.messages import say
from core.jobs import datasets, examples, jobs
from core.jobs.commands import PreparedData, check_room, prepare_data
from core.jobs.datasets import path_of
from core.storage.cipher import Cipher
from core.storage.database import Database, Tx
from core.storage.home import Home
from core.types import Address, Attachment, Caller, Role
from tests.support.database import read_now, write_now
from tests.support.running_service import FakeBot

ROW = b'{"q": "a question", "a": "an answer"}\n'


class House:
    """The terminal's channel with its operator, and two channels of other platforms with one operator each."""

    def __init__(self, home: Home, database: Database) -> None:
        self.home = home
        self.database = database
        self.now = 1_000_000

    def caller(self, who: str = "local", place: str = "home", *files: Path) -> Caller:
        at = Address("terminal", "home", "home", "c") if place == "home" else Address("fake", "bot", place, "c")
        attachments = tuple(Attachment(str(path), path.name) for path in files)

        def work(tx: Tx) -> Caller:
            channel = bindings.channel_for(tx, at.platform, at.account, at.place)
            assert channel is not None
            conversation = conversations.conversation_id(tx, at, channel.id)
            user = tx.cipher.hash_user(at.platform, at.account, who)
            return Caller(user, at, channel, "en", 0, conversation, attachments)

        return write_now(self.database, work)

    async def prepare(self, text: str, caller: Caller | None = None) -> PreparedData:
        """What `/finetune` would train on; nothing of it is kept in a job."""
        deliveries, who = Deliveries(self.database), caller or self.caller()
        deliveries.register("fake", "bot", FakeBot())
        read_now(self.database, lambda tx: check_room(tx, who))
        return await prepare_data(CommandContext(self.home, self.database, deliveries.fetch), who, parse(text))

    async def refused(self, text: str, caller: Caller | None = None) -> BadInput:
        """The refusal; nothing may be left of it in the store."""
        before = sorted(os.listdir(self.home.datasets))
        with pytest.raises(BadInput) as refusal:
            await self.prepare(text, caller)
        assert sorted(os.listdir(self.home.datasets)) == before
        return refusal.value

    def rows(self, table: str) -> list[dict[str, Any]]:
        return read_now(self.database, lambda tx: tx.all(f"SELECT * FROM {table}"))

    def say(self, caller: Caller, *texts: str) -> None:
        """A question, its answer, and so on."""

        def work(tx: Tx) -> None:
            inbox_id = tx.insert(
                "inbox",
                platform=caller.address.platform,
                account=caller.address.account,
                place=caller.address.place,
                conversation=caller.address.conversation,
                reply_to="",
                user_hash=caller.user,
                lane="turn",
                kind="message",
                language="",
                update_key=os.urandom(8).hex(),
                message_key="",
                received_ms=tx.now_ms,
                state="done",
            )
            for n, text in enumerate(texts):
                role = Role.ASSISTANT if n % 2 else Role.USER
                conversations.append(tx, caller.conversation_id, inbox_id, role, text, caller.user)

        write_now(self.database, work)

    def consent(self, caller: Caller) -> None:
        write_now(
            self.database,
            lambda tx: tx.run("INSERT INTO consent VALUES (?, ?, ?)", [caller.user, caller.channel.id, tx.now_ms]),
        )


@pytest.fixture
def it(tmp_path: Path) -> Iterator[House]:
    home = Home(tmp_path / "home")
    home.create()
    made: list[House] = []
    clock = lambda: made[0].now if made else 0  # noqa: E731
    with Database(home.database, Cipher(b"k" * 32), clock=clock) as database:
        made.append(House(home, database))
        write_now(database, _settle)
        yield made[0]


def _settle(tx: Tx) -> None:
    terminal.ensure_terminal(tx, "home")
    operators.grant(tx, tx.cipher.hash_user("terminal", "home", "local"), None, "local", "test")
    for name in ("acme", "delta"):
        channel = directory.create_channel(tx, name, title=name.title())
        bindings.bind(tx, "fake", "bot", name, channel.id)
        operators.grant(tx, tx.cipher.hash_user("fake", "bot", f"{name}-op"), channel.id, name, "test")


def brought(data: PreparedData) -> tuple[str, str]:
    return data.sha256, data.name


# --- files ---


@pytest.mark.parametrize("form", ["/finetune {}", "/finetune {} yes"])
async def test_a_file_is_kept_under_its_hash_for_this_user_alone(it: House, tmp_path: Path, form: str) -> None:
    (tmp_path / "faq.jsonl").write_bytes(ROW)
    sha256 = hashlib.sha256(ROW).hexdigest()
    assert brought(await it.prepare(form.format(tmp_path / "faq.jsonl"))) == (sha256, "faq.jsonl")
    kept = path_of(it.home, sha256)
    assert await asyncio.to_thread(kept.read_bytes) == ROW
    assert kept.stat().st_mode & 0o777 == 0o600
    assert os.listdir(it.home.datasets) == [sha256]
    (row,) = it.rows("dataset")
    assert (row["name"], row["source"], row["size_bytes"], row["brought_by"]) == (
        "faq.jsonl",
        "file",
        len(ROW),
        it.caller().user,
    )


async def test_a_packed_file_is_kept_as_it_is(it: House, tmp_path: Path) -> None:
    packed = gzip.compress(ROW)
    (tmp_path / "faq.jsonl.gz").write_bytes(packed)
    sha256, name = brought(await it.prepare(f"/finetune {tmp_path}/faq.jsonl.gz"))
    assert name == "faq.jsonl.gz"
    assert await asyncio.to_thread(path_of(it.home, sha256).read_bytes) == packed


async def test_the_same_bytes_are_kept_once(it: House, tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_bytes(ROW)
        assert brought(await it.prepare(f"/finetune {tmp_path / name}"))[1] == name
    assert len(it.rows("dataset")) == len(os.listdir(it.home.datasets)) == 1


async def test_a_path_may_begin_with_the_home_and_hold_spaces(
    it: House, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "my faq.jsonl").write_bytes(ROW)
    assert brought(await it.prepare('/finetune "~/my faq.jsonl"'))[1] == "my faq.jsonl"


async def test_a_file_that_was_sent_at_the_terminal_goes_before_what_was_typed(it: House, tmp_path: Path) -> None:
    (tmp_path / "sent.jsonl").write_bytes(ROW)
    call = await it.prepare("/finetune", it.caller("local", "home", tmp_path / "sent.jsonl"))
    assert brought(call)[1] == "sent.jsonl"


async def test_a_file_may_change_after_it_was_brought(it: House, tmp_path: Path) -> None:
    (tmp_path / "faq.jsonl").write_bytes(ROW)
    sha256, _ = brought(await it.prepare(f"/finetune {tmp_path}/faq.jsonl"))
    (tmp_path / "faq.jsonl").write_bytes(b"other")
    assert await asyncio.to_thread(path_of(it.home, sha256).read_bytes) == ROW


async def test_a_path_to_nothing_is_named_in_the_refusal(it: House) -> None:
    for typed in ("nowhere.jsonl", "~nobody-of-this-name/x", "x" * 5000, "/etc/passwd/x", "‮.jsonl"):
        refusal = await it.refused(f"/finetune {typed}")
        assert refusal.key == "training.dataset_not_found"
        assert typed[:100] in say("en", refusal.key, **refusal.fields)


async def test_a_folder_an_empty_file_and_a_pipe_each_have_their_own_sentence(it: House, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    os.mkfifo(tmp_path / "pipe")
    keys = [
        (await it.refused(f"/finetune {path}")).key
        for path in (tmp_path, tmp_path / "empty.jsonl", tmp_path / "pipe", "/dev/zero")
    ]
    assert keys == [
        "training.dataset_is_folder",
        "training.dataset_empty",
        "training.dataset_unreadable",
        "training.dataset_unreadable",
    ]


async def test_a_file_that_may_not_be_read_says_so(it: House, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "secret.jsonl"
    path.write_bytes(ROW)
    whole = os.open

    def refuse(name: Any, *given: Any, **more: Any) -> int:
        if name == path:
            raise PermissionError(errno.EACCES, "Permission denied")
        return whole(name, *given, **more)

    monkeypatch.setattr(os, "open", refuse)  # root may read everything
    refusal = await it.refused(f"/finetune {path}")
    assert (refusal.key, refusal.fields["reason"]) == ("training.dataset_unreadable", "Permission denied")


async def test_a_file_that_is_too_large_is_refused_before_it_is_read_whole(
    it: House, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets, "MAX_BYTES", 3_000_000)
    with (tmp_path / "huge.jsonl").open("wb") as file:
        file.truncate(2**40)
    refusal = await it.refused(f"/finetune {tmp_path}/huge.jsonl")
    assert (refusal.key, refusal.fields["limit"]) == ("training.dataset_too_large", 3)


async def test_a_full_disk_is_said_and_leaves_nothing(
    it: House, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "faq.jsonl").write_bytes(ROW)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(AppError) as refusal:
        await it.prepare(f"/finetune {tmp_path}/faq.jsonl")
    assert refusal.value.key == "error.storage_full"
    assert os.listdir(it.home.datasets) == []


async def test_without_a_file_the_right_form_is_said(it: House) -> None:
    refusal = await it.refused("/finetune")
    assert "/finetune faq.jsonl" in say("en", refusal.key)


# --- who may, and where ---


async def test_who_may_not_is_refused_and_no_file_is_looked_at(it: House, tmp_path: Path) -> None:
    call = parse(f"/finetune {tmp_path}/nothing.jsonl")
    context = CommandContext(it.home, it.database, Deliveries(it.database).fetch)
    for caller in (it.caller("stranger"), it.caller("delta-op", "acme")):
        assert (await dispatch(context, caller, call)).body.text == say("en", "error.not_allowed")


async def test_a_path_is_a_path_at_the_terminal_only(it: House, tmp_path: Path) -> None:
    (tmp_path / "faq.jsonl").write_bytes(ROW)
    refusal = await it.refused(f"/finetune {tmp_path}/faq.jsonl", it.caller("acme-op", "acme"))
    assert refusal.key == "training.dataset_not_found"
    refusal = await it.refused("/finetune", it.caller("acme-op", "acme", tmp_path / "faq.jsonl"))
    assert refusal.key == "training.no_files_here"


async def test_a_data_set_is_found_by_its_name_or_hash_where_it_may_be_known(it: House, tmp_path: Path) -> None:
    (tmp_path / "faq.jsonl").write_bytes(ROW)
    sha256, _ = brought(await it.prepare(f"/finetune {tmp_path}/faq.jsonl"))
    mine, other = it.caller("acme-op", "acme"), it.caller("delta-op", "delta")
    for typed in ("faq.jsonl", sha256, sha256[:10]):
        assert (await it.refused(f"/finetune {typed}", mine)).key == "training.dataset_not_found"
    job = write_now(it.database, lambda tx: jobs.create(tx, mine, sha256, "faq.jsonl"))
    write_now(it.database, lambda tx: jobs.end(tx, job.id, "published"))
    for typed in ("faq.jsonl", sha256, sha256[:10]):
        assert brought(await it.prepare(f"/finetune {typed}", mine)) == (sha256, "faq.jsonl")
        assert (await it.refused(f"/finetune {typed}", other)).key == "training.dataset_not_found"


async def test_while_a_job_is_open_nothing_is_brought(it: House, tmp_path: Path) -> None:
    (tmp_path / "faq.jsonl").write_bytes(ROW)
    sha256, _ = brought(await it.prepare(f"/finetune {tmp_path}/faq.jsonl"))
    caller = it.caller()
    write_now(it.database, lambda tx: jobs.create(tx, caller, sha256))
    (tmp_path / "faq.jsonl").write_bytes(ROW * 2)
    refusal = await it.refused(f"/finetune {tmp_path}/faq.jsonl")
    assert refusal.key == "training.busy"


# --- what people said ---


async def test_only_what_was_said_after_consent_and_was_answered_is_in_it(it: House) -> None:
    asker, silent = it.caller("ann", "acme"), it.caller("bob", "acme")
    it.say(asker, "before", "not this")
    it.now += 1
    it.consent(asker)
    it.say(asker, "first", "one", "second", "two", "never answered")
    it.say(silent, "no consent", "never")
    sha256, name = brought(await it.prepare("/finetune conversations", it.caller("acme-op", "acme")))
    lines = (await asyncio.to_thread(path_of(it.home, sha256).read_text)).splitlines()
    assert name == "conversations"
    assert [json.loads(line) for line in lines] == [
        {
            "messages": [
                {"role": "user", "content": "first"},
                {"role": "assistant", "content": "one"},
                {"role": "user", "content": "second"},
                {"role": "assistant", "content": "two"},
            ]
        }
    ]
    assert it.rows("dataset_person") == [{"dataset_sha256": sha256, "user_hash": asker.user}]


async def test_of_more_than_can_be_learned_from_the_newest_is_taken_whatever_is_said_meanwhile(
    it: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(examples, "MOST_TURNS", 4)
    ann, bob = it.caller("ann", "acme"), it.caller("bob", "acme")
    for who in (ann, bob):
        it.consent(who)
    it.say(ann, "oldest", "one", "older", "two")
    it.say(bob, "newer", "three")
    whole = datasets.store

    def keep(*given: Any) -> tuple[str, int]:
        it.say(bob, "newest", "four", "after it was read", "five")
        return whole(*given)

    monkeypatch.setattr(datasets, "store", keep)
    sha256, _ = brought(await it.prepare("/finetune conversations", it.caller("acme-op", "acme")))
    lines = (await asyncio.to_thread(path_of(it.home, sha256).read_text)).splitlines()
    asked = [[one["content"] for one in json.loads(line)["messages"]] for line in lines]
    assert sorted(asked) == [["newer", "three"], ["older", "two"]]


async def test_what_was_said_in_slack_stays_out_with_consent_too(it: House) -> None:
    ann = it.caller("ann", "acme")
    it.consent(ann)
    it.say(ann, "a question", "an answer")
    write_now(it.database, lambda tx: tx.run("UPDATE conversation SET platform = 'slack'"))
    write_now(it.database, lambda tx: training_permission.declare(tx, "slack", allowed=False))
    refusal = await it.refused("/finetune conversations", it.caller("acme-op", "acme"))
    assert refusal.key == "training.no_conversations"
    write_now(it.database, lambda tx: training_permission.set_exceptions(tx, ["slack"]))
    sha256, _ = brought(await it.prepare("/finetune conversations", it.caller("acme-op", "acme")))
    assert b"a question" in await asyncio.to_thread(path_of(it.home, sha256).read_bytes)


def damage(it: House, *numbers: int) -> None:
    """These of the turns that were stored, the first is 1."""
    for number in numbers:
        sealed = Cipher(b"x" * 32).seal("of another key")
        write_now(
            it.database,
            lambda tx, sealed=sealed, n=number: tx.run("UPDATE turn SET text = ? WHERE id = ?", [sealed, n]),
        )


@pytest.mark.parametrize(
    ("damaged", "learned"),
    [
        ([3], ["one", "1", "three", "3"]),  # a question: its answer does not go to the one before it
        ([4], ["one", "1", "three", "3"]),
        ([3, 4], ["one", "1", "three", "3"]),
        ([2, 3], ["three", "3"]),
        ([1, 2, 3, 4], ["three", "3"]),
    ],
)
async def test_a_turn_that_cannot_be_read_is_left_out_with_its_other_half_and_counted(
    it: House, damaged: list[int], learned: list[str]
) -> None:
    ann = it.caller("ann", "acme")
    it.consent(ann)
    it.say(ann, "one", "1", "two", "2", "three", "3")
    damage(it, *damaged)
    call = await it.prepare("/finetune conversations", it.caller("acme-op", "acme"))
    assert call.unreadable == len(damaged)
    (line,) = (await asyncio.to_thread(path_of(it.home, brought(call)[0]).read_text)).splitlines()
    assert [one["content"] for one in json.loads(line)["messages"]] == learned


async def test_where_no_turn_can_be_read_it_is_the_key_and_an_error(it: House) -> None:
    ann = it.caller("ann", "acme")
    it.consent(ann)
    it.say(ann, "one", "1")
    damage(it, 1, 2)
    with pytest.raises(StoredUnreadable):
        await it.prepare("/finetune conversations", it.caller("acme-op", "acme"))
    assert os.listdir(it.home.datasets) == []


async def test_where_what_can_be_read_makes_no_row_the_refusal_counts_what_cannot(it: House) -> None:
    ann = it.caller("ann", "acme")
    it.consent(ann)
    it.say(ann, "one", "1")
    damage(it, 1)
    refusal = await it.refused("/finetune conversations", it.caller("acme-op", "acme"))
    assert (refusal.key, refusal.fields) == ("training.none_readable", {"n": 1})


async def test_the_licence_is_recorded_and_stays_when_it_is_not_said_again(it: House, tmp_path: Path) -> None:
    (tmp_path / "faq.jsonl").write_bytes(ROW)
    for said, kept in (("", ""), (' licence="CC BY 4.0"', "CC BY 4.0"), ("", "CC BY 4.0"), (" licence=CC0", "CC0")):
        await it.prepare(f"/finetune {tmp_path}/faq.jsonl{said}")
        assert [row["licence"] for row in it.rows("dataset")] == [kept]
    refusal = await it.refused(f"/finetune {tmp_path}/faq.jsonl licence={'x' * 101}")
    assert (refusal.key, refusal.fields["setting"]) == ("training.setting_too_long", "licence")


async def test_people_in_one_conversation_stay_apart(it: House) -> None:
    ann, bob = it.caller("ann", "acme"), it.caller("bob", "acme")
    for one in (ann, bob):
        it.consent(one)
    it.say(ann, "ann asks", "for ann")
    it.say(bob, "bob asks", "for bob")
    sha256, _ = brought(await it.prepare("/finetune conversations", it.caller("acme-op", "acme")))
    rows = [json.loads(line) for line in (await asyncio.to_thread(path_of(it.home, sha256).read_text)).splitlines()]
    said = sorted([message["content"] for message in row["messages"]] for row in rows)
    assert said == [["ann asks", "for ann"], ["bob asks", "for bob"]]
    assert {row["user_hash"] for row in it.rows("dataset_person")} == {ann.user, bob.user}


async def test_consent_is_for_one_channel(it: House) -> None:
    here, there = it.caller("ann", "acme"), it.caller("ann", "delta")
    it.consent(there)
    it.say(here, "said in acme", "answer")
    it.say(there, "said in delta", "answer")
    refusal = await it.refused("/finetune conversations", it.caller("acme-op", "acme"))
    assert refusal.fields == {"people": 0}
    sha256, _ = brought(await it.prepare("/finetune conversations", it.caller("delta-op", "delta")))
    assert "acme" not in await asyncio.to_thread(path_of(it.home, sha256).read_text)


async def test_without_anything_said_the_refusal_counts_who_consented(it: House) -> None:
    it.consent(it.caller("ann", "acme"))
    refusal = await it.refused("/finetune conversations", it.caller("acme-op", "acme"))
    assert (refusal.key, refusal.fields) == ("training.no_conversations", {"people": 1})


async def test_a_consent_that_is_taken_back_meanwhile_leaves_no_file(
    it: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    asker = it.caller("ann", "acme")
    it.consent(asker)
    it.say(asker, "question", "answer")
    whole = datasets.store

    def keep(*given: Any) -> tuple[str, int]:
        write_now(it.database, lambda tx: tx.run("DELETE FROM consent"))
        return whole(*given)

    monkeypatch.setattr(datasets, "store", keep)
    with pytest.raises(AppError) as refusal:
        await it.prepare("/finetune conversations", it.caller("acme-op", "acme"))
    assert refusal.value.key == "training.consent_changed"
    assert os.listdir(it.home.datasets) == []
    assert it.rows("dataset") == it.rows("dataset_person") == []
