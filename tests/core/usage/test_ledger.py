"""The books: integer money, one charge per delivery, and a checker that finds each kind of damage."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.channels import directory, terminal
from core.storage.cipher import Cipher
from core.storage.database import Database, Tx
from core.types import Price
from core.usage import ledger, prices
from tests.support.database import read_now, write_now


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    with Database(tmp_path / "a.db", Cipher(b"k" * 32)) as database:
        write_now(database, lambda tx: terminal.ensure_terminal(tx, "home"))
        yield database


def deliver(tx: Tx, n: int, tokens_in: int = 10, tokens_out: int = 5) -> str:
    """The rows that a delivered reply leaves."""
    channel = directory.channel_by_name(tx, "terminal")
    assert channel is not None
    inbox_id = tx.insert(
        "inbox",
        platform="terminal",
        account="home",
        place="",
        conversation="",
        reply_to="",
        user_hash="u",
        lane="turn",
        kind="message",
        language="",
        update_key=str(n),
        message_key="",
        received_ms=tx.now_ms,
        state="done",
        outcome="replied",
    )
    tx.insert(
        "generation",
        id=f"g{n}",
        inbox_id=inbox_id,
        channel_id=channel.id,
        user_hash="u",
        price_id=prices.price_now(tx, channel.id).id,
        seed=1,
        state="delivered",
        tokens_in=tokens_in,
        tokens_out=tokens_out,
        started_ms=tx.now_ms,
    )
    ledger.charge(tx, f"g{n}")
    return f"g{n}"


@given(
    tokens_in=st.integers(0, 10**9),
    tokens_out=st.integers(0, 10**9),
    in_nano=st.integers(0, 10**6),
    out_nano=st.integers(0, 10**6),
    share=st.integers(0, 10_000),
)
def test_shares_always_sum_to_the_gross(
    tokens_in: int, tokens_out: int, in_nano: int, out_nano: int, share: int
) -> None:
    gross, partner, owner = ledger.amounts(Price(1, in_nano, out_nano, share), tokens_in, tokens_out)
    assert gross == tokens_in * in_nano + tokens_out * out_nano
    assert partner + owner == gross
    assert 0 <= partner <= gross
    assert partner <= gross * share / 10_000 < partner + 1 or gross > 2**53


def test_sound_books_have_no_violation(database: Database) -> None:
    for n in range(5):
        write_now(database, lambda tx, n=n: deliver(tx, n))  # type: ignore[misc]
    assert read_now(database, ledger.check) == []
    assert read_now(database, lambda tx: tx.value("SELECT sum(replies) FROM usage_daily")) == 5


def test_a_second_charge_is_impossible(database: Database) -> None:
    write_now(database, lambda tx: deliver(tx, 1))
    with pytest.raises(Exception, match="UNIQUE"):
        write_now(database, lambda tx: ledger.charge(tx, "g1"))


DAMAGES = (
    ("UPDATE usage_daily SET tokens_out = tokens_out + 1", "I1"),
    ("DELETE FROM usage_daily", "I1"),
    ("UPDATE generation SET state = 'failed'", "I2"),
    ("UPDATE inbox SET outcome = 'failed'", "I3"),
    ("UPDATE generation SET tokens_in = tokens_in + 1", "I4"),
    ("UPDATE price SET in_nano = in_nano + 7", "I4"),
    ("DELETE FROM inbox", "I11"),
)


def test_the_checker_finds_each_kind_of_damage(tmp_path: Path) -> None:
    """A checker that cannot fail proves nothing."""
    path = tmp_path / "a.db"
    with Database(path, Cipher(b"k" * 32)) as database:
        write_now(database, lambda tx: terminal.ensure_terminal(tx, "home"))
        write_now(database, lambda tx: deliver(tx, 1))
    for number, (damage, found) in enumerate(DAMAGES):
        path = tmp_path / f"{number}.db"
        shutil.copyfile(tmp_path / "a.db", path)
        with closing(sqlite3.connect(path)) as connection:
            connection.execute("PRAGMA foreign_keys = OFF")
            connection.execute(damage)
            connection.commit()
        with Database(path, Cipher(b"k" * 32)) as database:
            assert any(problem.startswith(found) for problem in read_now(database, ledger.check)), damage
