"""A filled database of an earlier release is opened by this one: nothing of it is lost, and it holds together."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import sqlite_utils

from core.errors import StorageError
from core.storage import migrations
from core.storage.database import Database
from core.storage.home import Cipher

# One row and more of every table of m005, children after parents. Columns are in the order of the table.
FILLED = """
    setting: 'base', 'loaded'
    partner: 1, 'owner', 'Owner', 0, 10 | 2, 'acme', 'Acme', 7000, 11
    adapter_name: 'acme', 2, 'a1' | 'none', 1, NULL
    adapter: 'a1', 'acme', 1, 'base', 'd1', '{}', 20, NULL, NULL | 'a2', 'acme', 2, 'base', NULL, '{}', 21, 22, 'gone'
    promotion: 1, 'acme', NULL, 'a1', 'ann', 'better', 23, NULL
    channel: 3, 'acme', 'Acme', 2, 'acme', 'Be brief.', 'zh', 10, 100, 0, 256, 0.7, 0.9, 12, NULL, 'How long?'
    binding: 'telegram', 'bot', '', 3
    price: 4, 3, 12, 300, 600, 7000
    person: 'ann', 'telegram', 'en', 13, 14, 3
    consent: 'ann', 3, 15
    operator: 5, 'kim', 3, 'Kim', 'owner', 16
    invite: 'c0de', 3, 'Lee', 'owner', 17, 99, NULL, NULL
    audit: 9, 18, 'owner', 'terminal', 'channel create', 'acme', 1, '', '"x"'
    erasure: 1, 'bob', 19
    conversation: 6, 'telegram', 'bot', 'p', 'c', 3, 24
    inbox: 7, 'telegram', 'bot', 'p', 'c', 'r', 'ann', 'turn', 'message', 'en', 'u7', 'm7', x'00', 2, 'done', '', 1, 2
        | 8, 'telegram', 'bot', 'p', 'c', '', 'ann', 'turn', 'message', 'en', 'u8', '', NULL, 2, 'dead', 'failed', 3, 2
    turn: 1, 6, 7, 'user', x'01', 'ann', 25 | 2, 6, 7, 'assistant', x'02', 'ann', 26
    generation: 'g1', 7, 3, 'ann', 'a1', 4, 42, 'delivered', 'stop', 30, 10, 12, 25, 26
    delivery: 1, 7, NULL, x'03', 'done' | 2, NULL, 1, NULL, 'open'
    part: 1, 1, 'h', 'receipt'
    ledger: 1, 'usage', 'g1', '2026-11-26', 3, 4, 30, 10, 12, 13200, 9240, 3960, 26
    dataset: 'd1', 'faq.jsonl', 'file', 'CC0', 100, 'kim', 20, NULL
    dataset_person: 'd1', 'ann'
    job: 1, 3, 'acme', 3, 'd1', 'faq', 'queued', '', NULL, 'telegram', 'bot', 'p', 'c', 'en', 'kim', 0, 30, NULL, NULL
        | 2, 3, 'acme', 1, 'd1', 'faq', 'published', '', 'a1', 'telegram', 'bot', 'p', 'c', 'zh', 'kim', 1, 18, 19, 20
    job_event: 2, 1, 19, 'done', '{"steps": 3}'
    feedback: 'g1', 'ann', -1, 27, 'wrong'
    installation: 'slack', 'T1', x'04', 31
    install_state: 'h1', 'slack', 'l', 32
"""
AFTER = [
    "m006_numbers",
    "m007_comparisons",
    "m008_presets",
    "m009_confirmed_jobs",
    "m010_price_of_training",
    "m011_refused_replies",
    "m012_hashed_messages",
    "m013_typed_questions",
]


@contextmanager
def opened(path: Path) -> Iterator[sqlite_utils.Database]:
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA foreign_keys = ON")
        connection.create_function("hash_message", 1, Cipher(b"k" * 32).hash_message)
        yield sqlite_utils.Database(connection, execute_plugins=False)


def fill(db: sqlite_utils.Database) -> None:
    with db.atomic():
        for line in FILLED.strip().replace("\n        |", " |").splitlines():
            table, _, rows = line.strip().partition(": ")
            for row in rows.split(" | "):
                db.conn.execute(f"INSERT INTO {table} VALUES ({row})")


def state(db: sqlite_utils.Database) -> dict[str, list[dict[str, Any]]]:
    return {name: list(db[name].rows) for name in db.table_names() if not name.startswith(("sqlite_", "_sqlite_"))}


@pytest.fixture
def earlier(tmp_path: Path) -> Path:
    with opened(tmp_path / "a.db") as db:
        migrations.MIGRATIONS.apply(db, stop_before=AFTER[0])
        fill(db)
        assert [name for name, rows in state(db).items() if not rows] == []  # usage_daily by its trigger
    return tmp_path / "a.db"


def check_same(path: Path, before: dict[str, list[dict[str, Any]]]) -> None:
    with opened(path) as db:
        after = state(db)
        for table, rows in before.items():
            assert [{key: row[key] for key in old} for old, row in zip(rows, after[table], strict=True)] == rows, table
        assert db.conn.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert db.conn.execute("PRAGMA foreign_key_check").fetchall() == []


def check_upgraded(path: Path, before: dict[str, list[dict[str, Any]]]) -> None:
    """Nothing is another but what a platform calls a message: that is hashed."""
    hashed = Cipher(b"k" * 32).hash_message
    rows = [row | {"message_key": row["message_key"] and hashed(row["message_key"])} for row in before["inbox"]]
    check_same(path, before | {"inbox": rows})


@pytest.mark.parametrize("following", AFTER)
def test_an_upgrade_from_any_release_keeps_every_row(earlier: Path, following: str) -> None:
    with opened(earlier) as db:
        before = state(db)
        migrations.MIGRATIONS.apply(db, stop_before=following)
    with Database(earlier, Cipher(b"k" * 32)):
        pass
    check_upgraded(earlier, before)


def test_what_was_there_works_as_before_and_what_is_new_works(earlier: Path) -> None:
    with Database(earlier, Cipher(b"k" * 32)), opened(earlier) as db:
        run = db.conn.execute
        assert list(db["partner"].rows)[1]["weight"] == 1
        for refused, error in (
            ("DELETE FROM ledger", "append-only"),
            ("UPDATE ledger SET gross_nano = 0", "append-only"),
            ("UPDATE job SET channel_id = 99", "FOREIGN KEY"),
            ("UPDATE job SET state = NULL", "NOT NULL"),
            ("UPDATE job SET version = 1", "UNIQUE"),
            (
                "INSERT INTO ledger SELECT 2, kind, NULL, day, channel_id, 4, 0, 0, 0, 0, 0, 0, 1, 9, 0 FROM ledger",
                "FOREIGN",
            ),
            (
                "INSERT INTO ledger SELECT 2, kind, NULL, day, channel_id, 4, 0, 0, 0, 0, 0, 0, 1, NULL, 0 FROM ledger",
                "CHECK",
            ),
            (
                "INSERT INTO ledger SELECT 2, kind, 'g1', day, channel_id, 4, 0, 0, 0, 0, 0, 0, 1, 1, 0 FROM ledger",
                "CHECK",
            ),
            ("INSERT INTO example VALUES ('g9', 3, 'ann', 'telegram', 0, x'00', NULL, NULL, 1)", "FOREIGN KEY"),
        ):
            with pytest.raises(sqlite3.IntegrityError, match=error):
                run(refused)
        charged = (
            "INSERT INTO ledger SELECT {}, kind, NULL, day, 3, 4, 0, 0, 0, 70, 0, 70, 1, 2, 10 FROM ledger LIMIT 1"
        )
        run(charged.format(2))
        with pytest.raises(sqlite3.IntegrityError, match="UNIQUE"):
            run(charged.format(3))
        assert list(
            db.query("SELECT replies, tokens_out, gross_nano, jobs, tokens_trained, jobs_nano FROM usage_daily")
        ) == [{"replies": 1, "tokens_out": 12, "gross_nano": 13270, "jobs": 1, "tokens_trained": 10, "jobs_nano": 70}]
        run("UPDATE job SET state = 'waiting', shown = x'05' WHERE id = 1")
        run("INSERT INTO comparison VALUES (1, 7, 3, 'a1', NULL, 1, x'06', 'kim', 40, NULL, NULL, 1)")
        run("UPDATE job SET shown = x'07' WHERE id = 2")
        run("UPDATE dataset SET erased_ms = 50 WHERE sha256 = 'd1'")
        assert [job["shown"] for job in db["job"].rows] == [None, None]
        assert [one["question"] for one in db["comparison"].rows] == [None]


def test_an_upgrade_that_breaks_off_leaves_the_release_before_and_is_made_up_for(
    earlier: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the last one, where the schema has been rewritten already."""
    run = migrations._run

    def breaks(db: sqlite_utils.Database, script: str) -> None:
        if "asked_ms" in script:
            script = script.replace("ADD COLUMN rows INTEGER", "ADD COLUMN no such thing (")
        run(db, script)

    with opened(earlier) as db:
        before = state(db)
    with monkeypatch.context() as patched:
        patched.setattr(migrations, "_run", breaks)
        with pytest.raises(StorageError), Database(earlier, Cipher(b"k" * 32)):
            pass
    with opened(earlier) as db:
        assert "CHECK (state IN" in db["job"].schema
        assert "asked_ms" not in db["job"].columns_dict
    check_same(earlier, before)
    with Database(earlier, Cipher(b"k" * 32)):
        pass
    check_upgraded(earlier, before)
