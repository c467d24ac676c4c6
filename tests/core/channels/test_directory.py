"""Who and where: the most specific place wins, prices are never edited, a code is good once and for a week."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from core.channels import adapter_names, audit, bindings, directory, operators, people, terminal
from core.errors import BadInput, UnknownThing
from core.storage.cipher import Cipher
from core.storage.database import Database, Tx
from core.types import Address, Caller, Channel, Grant, Limits, Price
from core.usage import prices
from tests.support.database import read_now, write_now

NOW_MS = 1_800_000_000_000


class Clock:
    now_ms = NOW_MS

    def __call__(self) -> int:
        return self.now_ms


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def database(tmp_path: Path, clock: Clock) -> Iterator[Database]:
    with Database(tmp_path / "a.db", Cipher(b"k" * 32), clock=clock) as database:
        write_now(database, lambda tx: terminal.ensure_terminal(tx, "home"))
        yield database


def create(database: Database, name: str = "acme") -> Channel:
    return write_now(database, lambda tx: directory.create_channel(tx, name))


def test_the_terminal_is_made_once_and_its_user_operates_everything(database: Database) -> None:
    def counts(tx: Tx) -> list[int]:
        return [
            tx.value(f"SELECT count(*) FROM {table}")
            for table in ("partner", "channel", "adapter_name", "price", "binding", "operator")
        ]

    assert read_now(database, counts) == [1] * 6
    write_now(database, lambda tx: terminal.ensure_terminal(tx, "home"))
    assert read_now(database, counts) == [1] * 6
    channel = read_now(database, lambda tx: bindings.channel_for(tx, "terminal", "home", "home"))
    assert channel is not None
    assert (channel.name, channel.title, channel.adapter) == ("terminal", "Terminal", "terminal")
    assert channel.limits == Limits(per_minute=0, per_hour=0, tokens_in=2000, tokens_out=512)
    user = database.cipher.hash_user("terminal", "home", "local")
    acme = create(database)
    assert read_now(database, lambda tx: operators.grant_of(tx, user, acme.id)) is Grant.OWNER


def test_a_channel_begins_with_the_default_limits_free_and_on_base(database: Database) -> None:
    acme = create(database)
    assert acme.limits == Limits()
    assert acme.title == "acme"
    assert read_now(database, lambda tx: adapter_names.champion(tx, acme.adapter)[1]) == "base"
    price = read_now(database, lambda tx: prices.price_now(tx, acme.id))
    assert (price.in_nano, price.out_nano, price.share_bps) == (0, 0, 0)


def test_a_partners_share_is_the_channels_first_price(database: Database) -> None:
    def work(tx: Tx) -> Price:
        tx.insert("partner", name="p", title="P", share_bps=3000, created_ms=1)
        return prices.price_now(tx, directory.create_channel(tx, "acme", partner="p").id)

    assert write_now(database, work).share_bps == 3000


def test_names_are_checked(database: Database) -> None:
    create(database)
    for name in ("acme", "base", "all", "", "A", "a b", "../x", "x" * 64):
        with pytest.raises(BadInput):
            create(database, name)
    with pytest.raises(UnknownThing):
        write_now(database, lambda tx: directory.create_channel(tx, "other", partner="nobody"))


def test_the_most_specific_place_wins_and_an_archived_channel_answers_nowhere(database: Database) -> None:
    acme, delta = create(database), create(database, "delta")
    write_now(database, lambda tx: bindings.bind(tx, "slack", "T1", "", acme.id))
    write_now(database, lambda tx: bindings.bind(tx, "slack", "T1", "C1", delta.id))

    def at(account: str, place: str) -> str | None:
        found = read_now(database, lambda tx: bindings.channel_for(tx, "slack", account, place))
        return found.name if found else None

    assert (at("T1", "C1"), at("T1", "C2"), at("T1", ""), at("T2", "C1")) == ("delta", "acme", "acme", None)
    write_now(database, lambda tx: directory.archive(tx, delta.id))
    assert (at("T1", "C1"), at("T1", "C2")) == (None, "acme")
    named = read_now(database, lambda tx: directory.channel_by_name(tx, "delta"))
    assert named is not None
    assert named.archived
    write_now(database, lambda tx: bindings.bind(tx, "slack", "T1", "C1", acme.id))
    assert at("T1", "C1") == "acme"
    assert read_now(database, lambda tx: bindings.places(tx, acme.id)) == ("slack:T1", "slack:T1/C1")


def test_prices_of_the_same_millisecond_are_in_order(database: Database) -> None:
    acme = create(database)
    for price in (1, 2, 3):
        write_now(database, lambda tx, price=price: prices.set_price(tx, acme.id, price, price, 0))  # type: ignore[misc]
        assert read_now(database, lambda tx: prices.price_now(tx, acme.id)).in_nano == price
    assert read_now(database, lambda tx: tx.value("SELECT count(*) FROM price WHERE channel_id = ?", [acme.id])) == 4


def test_a_persons_language_is_kept_when_they_come_again(database: Database, clock: Clock) -> None:
    write_now(database, lambda tx: people.touch(tx, "u", "fake"))
    assert read_now(database, lambda tx: people.language_of(tx, "u")) == ""
    write_now(database, lambda tx: people.set_language(tx, "u", "fake", "zh"))
    clock.now_ms += 5
    write_now(database, lambda tx: people.touch(tx, "u", "fake"))
    row = read_now(database, lambda tx: tx.one("SELECT * FROM person"))
    assert row is not None
    assert (row["language"], row["first_ms"], row["last_ms"]) == ("zh", NOW_MS, NOW_MS + 5)
    assert read_now(database, lambda tx: people.language_of(tx, "nobody")) == ""


def test_grants_are_per_channel(database: Database) -> None:
    acme, delta = create(database), create(database, "delta")
    write_now(database, lambda tx: operators.grant(tx, "u", acme.id, "U", "test"))
    write_now(database, lambda tx: operators.grant(tx, "u", acme.id, "U", "test"))

    def grants(tx: Tx) -> list[Grant]:
        return [operators.grant_of(tx, "u", channel.id) for channel in (acme, delta)]

    assert read_now(database, grants) == [Grant.OPERATOR, Grant.ANYONE]
    assert [one.name for one in read_now(database, lambda tx: directory.channels(tx, "u"))] == ["acme"]
    (one,) = read_now(database, lambda tx: operators.find(tx, acme.id))
    write_now(database, lambda tx: operators.remove(tx, one))
    assert read_now(database, grants) == [Grant.ANYONE, Grant.ANYONE]


def test_a_code_is_good_once_and_for_a_week(database: Database, clock: Clock) -> None:
    acme = create(database)
    codes = [write_now(database, lambda tx: operators.invite(tx, acme.id, "Kim", "test")) for _ in range(2)]
    assert len(set(codes)) == 2
    assert not set("".join(codes)) & set("01OILol")
    clock.now_ms += operators.INVITE_MS - 1
    claimed = write_now(database, lambda tx: operators.claim(tx, f" {codes[0].lower()} ", "a"))
    assert claimed == operators.Claimed(acme.id, "acme", "Kim")
    assert write_now(database, lambda tx: operators.claim(tx, codes[0], "b")) is None
    clock.now_ms += 1
    assert write_now(database, lambda tx: operators.claim(tx, codes[1], "b")) is None
    assert read_now(database, lambda tx: operators.grant_of(tx, "b", acme.id)) is Grant.ANYONE


def test_the_audit_log_keeps_before_and_after(database: Database) -> None:
    def work(tx: Tx) -> None:
        channel = directory.channel_by_name(tx, "terminal")
        assert channel is not None
        caller = Caller("u", Address("fake", "bot", "p", "c"), channel, "en", 0, 0)
        audit.record(tx, caller, "channel set", "acme", {"title": "旧"}, {"title": "新"})
        audit.record(tx, caller, "channel set", "acme", allowed=False)

    write_now(database, work)
    rows = read_now(database, lambda tx: tx.all("SELECT * FROM audit"))
    assert [(row["actor"], row["platform"], row["allowed"], row["before"], row["after"]) for row in rows] == [
        ("u", "fake", 1, '{"title": "旧"}', '{"title": "新"}'),
        ("u", "fake", 0, "", ""),
    ]
