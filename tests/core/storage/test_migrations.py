"""The schema: what its constraints refuse, what its triggers do, and databases of another release."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
import sqlite_utils

from core.errors import StorageError
from core.storage import migrations
from core.storage.cipher import Cipher
from core.storage.database import Database

FILLED = """
    partner: 1, 'owner', 'Owner', 0, 10, 1
    adapter_name: 'acme', 1, 'a1'
    adapter: 'a1', 'acme', 1, 'base', 'd1', '{}', 20, NULL, NULL
    channel: 3, 'acme', 'Acme', 1, 'acme', '', 'zh', 10, 100, 0, 256, 0.7, 0.9, 12, NULL, 'How long?'
    price: 4, 3, 12, 300, 600, 7000, 7
    conversation: 6, 'telegram', 'bot', 'p', 'c', 3, 24
    inbox: 7, 'tg', 'b', 'p', 'c', 'r', 'a', 'turn', 'message', 'en', 'u7', 'm7', x'00', 2, 'done', '', 1, 2, '', 0, 0
    generation: 'g1', 7, 3, 'ann', 'a1', 4, 42, 'delivered', 'stop', 30, 10, 12, 25, 26, 0
    dataset: 'd1', 'faq.jsonl', 'file', 'CC0', 100, 'kim', 20, NULL, NULL, 3
    ledger: 1, 'usage', 'g1', '2026-11-26', 3, 4, 30, 10, 12, 13200, 9240, 3960, 26, NULL, 0
"""
JOB = "INSERT INTO job VALUES ({0}, 3, 'acme', {0}, 'd1', 'faq', 'waiting', '', {1}, 'telegram', 'bot', 'p', 'c', 'en',"
JOB += " 'kim', 0, 30, NULL, NULL, '', x'05', '', '', NULL, 0, 4, NULL)"
CHARGE = "INSERT INTO ledger VALUES ({}, 'usage', {}, '2026-11-26', 3, 4, 0, 0, 0, 70, 0, 70, 1, {}, 10)"


@contextmanager
def opened(path: Path) -> Iterator[sqlite_utils.Database]:
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA foreign_keys = ON")
        yield sqlite_utils.Database(connection, execute_plugins=False)


@pytest.fixture
def db(tmp_path: Path) -> Iterator[sqlite_utils.Database]:
    with opened(tmp_path / "a.db") as db:
        migrations.migrate(db)
        with db.atomic():
            for line in FILLED.strip().splitlines():
                table, _, row = line.strip().partition(": ")
                db.conn.execute(f"INSERT INTO {table} VALUES ({row})")
            db.conn.execute(JOB.format(1, "NULL"))
            db.conn.execute(JOB.format(2, "'a1'"))
        yield db


def test_constraints_refuse_what_the_books_may_not_hold(db: sqlite_utils.Database) -> None:
    for refused, error in (
        ("DELETE FROM ledger", "append-only"),
        ("UPDATE ledger SET gross_nano = 0", "append-only"),
        ("UPDATE job SET channel_id = 99", "FOREIGN KEY"),
        ("UPDATE job SET version = 1", "UNIQUE"),
        (CHARGE.format(2, "NULL", 9), "FOREIGN"),
        (CHARGE.format(2, "NULL", "NULL"), "CHECK"),
        (CHARGE.format(2, "'g1'", 1), "CHECK"),
        (CHARGE.format(2, "'g1'", "NULL"), "UNIQUE"),
        ("INSERT INTO example VALUES ('g9', 3, 'ann', 'telegram', 0, x'00', NULL, NULL, 1)", "FOREIGN KEY"),
    ):
        with pytest.raises(sqlite3.IntegrityError, match=error):
            db.conn.execute(refused)


def test_a_charge_is_added_to_its_day_once(db: sqlite_utils.Database) -> None:
    db.conn.execute(CHARGE.format(2, "NULL", 1))
    with pytest.raises(sqlite3.IntegrityError, match="UNIQUE"):
        db.conn.execute(CHARGE.format(3, "NULL", 1))
    columns = "replies, tokens_out, gross_nano, jobs, tokens_trained, jobs_nano"
    assert db.conn.execute(f"SELECT {columns} FROM usage_daily").fetchall() == [(1, 12, 13270, 1, 10, 70)]


def test_an_erased_data_set_takes_what_is_shown_of_it_along(db: sqlite_utils.Database) -> None:
    db.conn.execute("INSERT INTO comparison VALUES (1, 7, 3, 'a1', NULL, 1, x'06', 'kim', 40, NULL, NULL, 0)")
    db.conn.execute("UPDATE dataset SET erased_ms = 50 WHERE sha256 = 'd1'")
    assert [job["shown"] for job in db["job"].rows] == [None, None]
    assert [one["question"] for one in db["comparison"].rows] == [None]


def test_a_migration_that_breaks_off_leaves_nothing_and_is_made_up_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = migrations._statements
    with monkeypatch.context() as patched:
        patched.setattr(migrations, "_statements", lambda name: [*list(whole(name))[:9], "CREATE no such thing ("])
        with pytest.raises(StorageError), Database(tmp_path / "a.db", Cipher(b"k" * 32)):
            pass
    with opened(tmp_path / "a.db") as db:
        assert "partner" not in db.table_names()
    with Database(tmp_path / "a.db", Cipher(b"k" * 32)), opened(tmp_path / "a.db") as db:
        assert "job_event" in db.table_names()


def test_a_database_of_a_newer_release_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    with Database(tmp_path / "a.db", Cipher(b"k" * 32)), opened(tmp_path / "a.db") as db:
        db.conn.execute("INSERT INTO _sqlite_migrations VALUES (9, 'distributary', 'm009_later', 'now')")
    with pytest.raises(StorageError, match="m009_later"), Database(tmp_path / "a.db", Cipher(b"k" * 32)):
        pass


def test_each_table_is_written_by_one_module_alone() -> None:
    root = Path(migrations.__file__).parents[2]
    sources = {path: path.read_text("utf-8") for name in ("core", "bots") for path in (root / name).rglob("*.py")}
    tables = re.findall(r"CREATE TABLE (\w+)", (root / "core/storage/m001_schema.sql").read_text("utf-8"))
    assert len(tables) > 20
    for table in tables:
        writes = rf"(INSERT (OR \w+ )?INTO|UPDATE( OR \w+)?|DELETE FROM)\s+{table}\b|\.insert\(\s*\"{table}\""
        writers = sorted(str(path) for path, text in sources.items() if re.search(writes, text))
        assert len(writers) <= 1, (table, writers)
