"""One writer: what is committed stays, what fails undoes only itself, and a full disk is a clear error."""

from __future__ import annotations

import asyncio
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from core.errors import HomeBusy, StorageError, StorageFull
from core.storage.cipher import Cipher
from core.storage.database import Database, Tx, open_read_only
from core.storage.home import Home, Lock
from tests.support.database import read_now, write_now

pytestmark = pytest.mark.slow


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    with Database(tmp_path / "a.db", Cipher(b"k" * 32)) as database:
        yield database


def put(key: str, value: str = "x") -> object:
    return lambda tx: tx.insert("setting", key=key, value=value)


def keys(tx: Tx) -> list[str]:
    return [row["key"] for row in tx.all("SELECT key FROM setting ORDER BY key")]


def test_the_pragmas_that_promises_rest_on_are_set(database: Database) -> None:
    def pragmas(tx: Tx) -> list[object]:
        return [tx.value(f"PRAGMA {name}") for name in ("journal_mode", "synchronous", "foreign_keys", "secure_delete")]

    assert write_now(database, pragmas) == ["wal", 2, 1, 1]


def test_every_table_is_strict(database: Database) -> None:
    loose = "SELECT name FROM pragma_table_list WHERE schema = 'main' AND type = 'table' AND NOT strict"
    names = [row["name"] for row in read_now(database, lambda tx: tx.all(loose))]
    assert [name for name in names if not name.startswith(("sqlite_", "_sqlite_"))] == []


def test_migrations_are_numbered_and_run_once(tmp_path: Path) -> None:
    for _ in range(2):
        with Database(tmp_path / "a.db", Cipher(b"k" * 32)) as database:
            names = read_now(database, lambda tx: tx.all("SELECT name FROM _sqlite_migrations ORDER BY rowid"))
    assert [row["name"][:4] for row in names] == [f"m{n:03}" for n in range(1, len(names) + 1)]


async def test_a_failing_write_undoes_only_itself(database: Database) -> None:
    def fails(tx: Tx) -> None:
        tx.insert("setting", key="lost", value="x")
        raise ValueError("no")

    results = await asyncio.gather(
        *(database.write(put(f"k{n}")) for n in range(20)),  # type: ignore[arg-type]
        database.write(fails),
        database.write(put("k3")),  # type: ignore[arg-type]
        database.write(put("last")),  # type: ignore[arg-type]
        return_exceptions=True,
    )
    assert isinstance(results[20], ValueError)
    assert isinstance(results[21], StorageError)
    assert len(await database.read(keys)) == 21


def test_a_committed_write_is_seen_by_the_next_read(database: Database) -> None:
    for n in range(50):
        write_now(database, put(f"{n:03}"))  # type: ignore[arg-type]
        assert read_now(database, keys)[-1] == f"{n:03}"


def test_a_reader_cannot_write(database: Database) -> None:
    with pytest.raises(StorageError):
        read_now(database, put("k"))  # type: ignore[arg-type]


def test_text_is_in_no_file_in_the_clear(tmp_path: Path) -> None:
    cipher = Cipher(b"k" * 32)
    with Database(tmp_path / "a.db", cipher) as database:
        write_now(database, lambda tx: tx.run("CREATE TABLE t (x BLOB)"))
        write_now(database, lambda tx: tx.run("INSERT INTO t VALUES (?)", [tx.cipher.seal("marker-7f3a")]))
        stored = b"".join(path.read_bytes() for path in tmp_path.iterdir())
        assert b"marker-7f3a" not in stored
        assert read_now(database, lambda tx: tx.cipher.unseal(tx.value("SELECT x FROM t"))) == "marker-7f3a"


async def test_a_wal_that_a_reader_holds_is_emptied_by_the_first_commit_without_it(tmp_path: Path) -> None:
    wal = tmp_path / "a.db-wal"
    async with Database(tmp_path / "a.db", Cipher(b"k" * 32)) as database:
        await database.write(put("k", "marker-7f3a"))  # type: ignore[arg-type]
        reader = open_read_only(tmp_path / "a.db")
        reader.execute("BEGIN")
        reader.execute("SELECT * FROM setting").fetchall()
        await database.write(lambda tx: tx.run("DELETE FROM setting"))
        await database.checkpoint()
        assert b"marker-7f3a" in wal.read_bytes()
        reader.close()
        await database.write(put("later"))  # type: ignore[arg-type]
        assert wal.stat().st_size == 0
        assert b"marker-7f3a" not in (tmp_path / "a.db").read_bytes()


def test_another_key_reads_nothing() -> None:
    sealed = Cipher(b"a" * 32).seal("text")
    with pytest.raises(StorageError):
        Cipher(b"b" * 32).unseal(sealed)


def test_a_second_program_on_the_same_home_is_refused_by_name(tmp_path: Path) -> None:
    home = Home(tmp_path)
    with Lock(home), pytest.raises(HomeBusy) as refused, Lock(home):
        pass
    assert refused.value.fields["pid"] == str(os.getpid())
    with Lock(home):
        pass


def test_a_missing_key_is_never_made_anew_over_old_text(tmp_path: Path) -> None:
    with pytest.raises(StorageError):
        Cipher.open(tmp_path / "secret.key", create=False)
    Cipher.open(tmp_path / "secret.key", create=True)
    assert (tmp_path / "secret.key").stat().st_mode & 0o777 == 0o600


def test_eight_processes_lose_no_write_to_a_lock(tmp_path: Path) -> None:
    """Foreign writers are not ours, but BEGIN IMMEDIATE waits for them instead of failing (reliability row 3)."""
    with Database(tmp_path / "a.db", Cipher(b"k" * 32)) as database:
        other = sqlite3.connect(tmp_path / "a.db", isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        waiting = database._submit(put("k"))  # type: ignore[arg-type]
        assert not waiting.done()
        other.execute("COMMIT")
        other.close()
        waiting.result(timeout=10)


def test_a_full_disk_is_a_clear_error_and_goes_on_when_there_is_room(small_disk: Path) -> None:
    ballast = small_disk / "ballast"
    ballast.write_bytes(b"x" * 700_000)
    with Database(small_disk / "a.db", Cipher(b"k" * 32)) as database:
        kept = []
        with pytest.raises(StorageFull):  # noqa: PT012
            for n in range(1000):
                write_now(database, put(f"{n:04}", "x" * 20_000))  # type: ignore[arg-type]
                kept.append(f"{n:04}")
        assert read_now(database, keys) == kept
        ballast.unlink()
        write_now(database, put("after"))  # type: ignore[arg-type]
        assert read_now(database, keys)[-1] == "after"
    connection = open_read_only(small_disk / "a.db")
    assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    connection.close()
