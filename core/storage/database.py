"""SQLite with one writer thread and a pool of read connections.

A write is a function of a `Tx`, run inside BEGIN IMMEDIATE with synchronous=FULL. Writes that wait at the same time
are committed together, each in its own savepoint: they share one fsync, and a failing write undoes only itself.

Only the writer checkpoints: SQLite up to 3.51.2 can corrupt a WAL that two connections checkpoint
(https://sqlite.org/wal.html#walresetbug).
"""

import asyncio
import errno
import logging
import os
import queue
import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import sqlite_utils

from core.errors import Overloaded, StorageError, StorageFull, StorageRefused
from core.storage.cipher import Cipher
from core.storage.migrations import migrate

log = logging.getLogger(__name__)
T = TypeVar("T")
Value = str | bytes | int | float | None
Row = dict[str, Any]
_MAX_WAITING = 10_000
_MAX_BATCH = 128
_MAX_WAL_BYTES = 4 * 2**20
_BUSY_MS = 5000


def now_ms() -> int:
    return time.time_ns() // 1_000_000


@dataclass(frozen=True, slots=True)
class Tx:
    """One open transaction; `now_ms` is when it began."""

    db: sqlite_utils.Database
    cipher: Cipher
    now_ms: int

    def run(self, sql: str, values: Sequence[Value] = ()) -> int:
        """Run one statement; returns the number of rows changed."""
        return int(self.db.conn.execute(sql, tuple(values)).rowcount)

    def insert(self, table: str, **values: Value) -> int:
        """Insert one row; returns its rowid."""
        names = ", ".join(values)
        marks = ", ".join("?" * len(values))
        cursor = self.db.conn.execute(f"INSERT INTO {table} ({names}) VALUES ({marks})", tuple(values.values()))
        return int(cursor.lastrowid or 0)

    def all(self, sql: str, values: Sequence[Value] = ()) -> list[Row]:
        return list(self.db.query(sql, list(values)))

    def one(self, sql: str, values: Sequence[Value] = ()) -> Row | None:
        return next(iter(self.all(sql, values)), None)

    def value(self, sql: str, values: Sequence[Value] = ()) -> Any:
        """The first column of the first row, or None."""
        row = self.db.conn.execute(sql, tuple(values)).fetchone()
        return row[0] if row else None


@dataclass(slots=True)
class _Write:
    work: Callable[[Tx], Any]
    done: Future[Any]


class Database:
    """Open with `async with` or `with`. `clock` returns milliseconds since 1970."""

    def __init__(self, path: Path, cipher: Cipher, *, clock: Callable[[], int] = now_ms) -> None:
        self.path = path
        self.cipher = cipher
        self.clock = clock
        self._waiting: queue.Queue[_Write | None] = queue.Queue(_MAX_WAITING)
        self._writer = threading.Thread(target=self._write_loop, name="sqlite-writer", daemon=True)
        self._opened: Future[None] = Future()
        self._readers = ThreadPoolExecutor(2, thread_name_prefix="sqlite-reader")
        self._local = threading.local()
        self._read_connections: list[sqlite3.Connection] = []
        self.committed_ms = clock()  # of the last commit, or of the start
        self._fold_owed = False
        self._closed = False

    @property
    def now_ms(self) -> int:
        return self.clock()

    async def write(self, work: Callable[[Tx], T]) -> T:
        """Run `work` in a transaction on the writer thread and return its result once it is committed.

        Raises what `work` raises, after undoing it; StorageFull or StorageError when the disk refuses.
        Cancelling the waiting task does not undo a write that was queued.
        """
        return await asyncio.wrap_future(self._submit(work))

    async def read(self, work: Callable[[Tx], T]) -> T:
        """Run `work` on a read-only connection; it sees everything committed before the call."""
        return await asyncio.wrap_future(self._readers.submit(self._read, work))

    async def checkpoint(self) -> None:
        """Checkpoint and truncate the WAL, so that deleted text is in neither file.

        Where a reader blocks the checkpoint this returns anyway, and each later commit tries again.
        """
        await self.write(_checkpoint_marker)

    def __enter__(self) -> Self:
        self._writer.start()
        self._opened.result()
        return self

    def __exit__(self, *_: object) -> None:
        if self._closed:
            return
        self._closed = True
        self._readers.shutdown(wait=True)
        for connection in self._read_connections:
            connection.close()
        self._waiting.put(None)
        self._writer.join()

    async def __aenter__(self) -> Self:
        return await asyncio.to_thread(self.__enter__)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.shield(asyncio.to_thread(self.__exit__))

    def _submit(self, work: Callable[[Tx], T]) -> Future[T]:
        if self._closed:
            raise StorageError(detail="the database is closed")
        done: Future[T] = Future()
        done.set_running_or_notify_cancel()  # cancelling the waiting task does not undo the write
        try:
            self._waiting.put_nowait(_Write(work, done))
        except queue.Full:
            raise Overloaded(detail="too many writes are waiting", retry_after_s=5) from None
        return done

    def _write_loop(self) -> None:
        try:
            connection = self._open_writer()
        except BaseException as error:
            self._opened.set_exception(_translate_file(error))
            return
        self._opened.set_result(None)
        current: sqlite3.Connection | None = connection
        while batch := self._next_batch():
            try:
                current = current or self._open_writer()
                self._commit(current, batch)
            except BaseException as error:  # a writer that ended would leave every later write waiting
                log.critical("store.writer_failed", extra={"error": type(error).__name__}, exc_info=error)
                _fail(batch, error)
                _discard(current)
                current = None
        try:
            if current is not None:
                _truncate_wal(current, patience_ms=_BUSY_MS)
        except (sqlite3.Error, OSError) as error:  # commits stay in the WAL, which the next start reads
            log.warning("store.checkpoint_failed", extra={"error": str(error)})
        _discard(current)

    def _next_batch(self) -> list[_Write]:
        """The waiting writes, at most _MAX_BATCH; empty when the database closes."""
        first = self._waiting.get()
        if first is None:
            return []
        batch = [first]
        while len(batch) < _MAX_BATCH:
            try:
                item = self._waiting.get_nowait()
            except queue.Empty:
                break
            if item is None:
                self._waiting.put(None)
                break
            batch.append(item)
        return batch

    def _commit(self, connection: sqlite3.Connection, batch: list[_Write]) -> None:
        results: list[tuple[_Write, Any]] = []
        failed: list[tuple[_Write, BaseException]] = []
        try:
            connection.execute("BEGIN IMMEDIATE")
            tx = Tx(sqlite_utils.Database(connection, execute_plugins=False), self.cipher, self.clock())
            for item in batch:
                connection.execute("SAVEPOINT one")
                try:
                    results.append((item, item.work(tx)))
                except Exception as error:
                    if not connection.in_transaction:  # the disk was full: SQLite has undone it all
                        raise
                    connection.execute("ROLLBACK TO one")
                    failed.append((item, error))
                connection.execute("RELEASE one")
            connection.execute("COMMIT")
        except BaseException as error:
            _fail(batch, error)
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            return
        self.committed_ms = self.clock()
        trouble = self._fold(connection, asked=any(item.work is _checkpoint_marker for item in batch))
        for item, problem in failed:
            item.done.set_exception(_translate(problem))
        for item, result in results:
            if trouble is not None and item.work is _checkpoint_marker:
                item.done.set_exception(_translate_file(trouble))
            else:
                item.done.set_result(result)

    def _open_writer(self) -> sqlite3.Connection:
        # SQLite gives the log and its index the mode of the database, so it has to be private before they are made. A
        # file that is there is not opened: to close it would drop this process's locks on it.
        if not self.path.exists():
            os.close(os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        for suffix in ("", "-wal", "-shm"):
            with suppress(FileNotFoundError):
                self.path.with_name(self.path.name + suffix).chmod(0o600)
        connection = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False)
        for pragma in (
            f"busy_timeout = {_BUSY_MS}",
            "journal_mode = WAL",
            "synchronous = FULL",
            "foreign_keys = ON",
            "secure_delete = ON",
            "wal_autocheckpoint = 0",
        ):
            connection.execute(f"PRAGMA {pragma}").fetchall()
        migrate(sqlite_utils.Database(connection, execute_plugins=False))
        return connection

    def _fold(self, connection: sqlite3.Connection, *, asked: bool) -> Exception | None:
        """Truncate the WAL where asked for or where it is large; returns the error, if any. Commits stay."""
        try:
            wal = self.path.with_name(f"{self.path.name}-wal")
            self._fold_owed = self._fold_owed or asked or wal.stat().st_size > _MAX_WAL_BYTES
            if self._fold_owed:
                self._fold_owed = not _truncate_wal(connection, patience_ms=0)
        except FileNotFoundError:
            pass
        except (sqlite3.Error, OSError) as error:
            log.warning("store.checkpoint_failed", extra={"error": str(error)})
            return error
        return None

    def _read(self, work: Callable[[Tx], T]) -> T:
        try:
            connection = getattr(self._local, "connection", None)
            if connection is None:
                connection = self._local.connection = open_read_only(self.path)
                self._read_connections.append(connection)
            connection.execute("BEGIN")
            try:
                tx = Tx(sqlite_utils.Database(connection, execute_plugins=False), self.cipher, self.clock())
                return work(tx)
            finally:
                connection.execute("ROLLBACK")
        except sqlite3.Error as error:
            if (connection := self._local.__dict__.pop("connection", None)) is not None:  # the next read opens another
                self._read_connections.remove(connection)
                _discard(connection)
            raise _translate(error) from error


def open_read_only(path: Path) -> sqlite3.Connection:
    """Open a connection that can neither write nor checkpoint."""
    connection = sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True, isolation_level=None, check_same_thread=False)
    connection.execute("PRAGMA query_only = ON")
    return connection


def _truncate_wal(connection: sqlite3.Connection, *, patience_ms: int) -> bool:
    """Checkpoint and truncate the WAL; whether no reader blocked it.

    SQLite's own checkpoints leave the frames in the log until it wraps, and damage to them would reach the file.
    """
    connection.execute(f"PRAGMA busy_timeout = {patience_ms}")
    busy, _, _ = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
    connection.execute(f"PRAGMA busy_timeout = {_BUSY_MS}")
    return not busy


def _fail(batch: list[_Write], error: BaseException) -> None:
    """Fail what is not answered yet for an error outside of the writes themselves."""
    for item in batch:
        if not item.done.done():
            item.done.set_exception(_translate_file(error))


def _translate_file(error: BaseException) -> BaseException:
    """The StorageError for an error of SQLite or of its files; any other error unchanged."""
    if not isinstance(error, OSError):
        return _translate(error)
    kind = StorageFull if error.errno in (errno.ENOSPC, errno.EDQUOT) else StorageError
    made = kind(detail=f"the files of the database: {error.strerror or error}")
    made.__cause__ = error
    return made


def _discard(connection: sqlite3.Connection | None) -> None:
    """Close a connection whose state is unknown; the next batch opens another one."""
    with suppress(sqlite3.Error, OSError):
        if connection is not None:
            connection.close()


def _checkpoint_marker(_: Tx) -> None:
    """A write without effect: the writer recognises it and checkpoints after the commit."""


def _translate(error: BaseException) -> BaseException:
    """The StorageError for an SQLite error; any other error unchanged."""
    if not isinstance(error, sqlite3.Error):
        return error
    code = getattr(error, "sqlite_errorname", "")
    if code.startswith("SQLITE_FULL") or "disk is full" in str(error):
        ours: StorageError = StorageFull(detail=f"the disk is full: {error}")
    elif isinstance(error, sqlite3.IntegrityError):
        ours = StorageRefused(detail=f"{code}: {error}")
    else:
        ours = StorageError(detail=f"{code or 'SQLite'}: {error}")
    ours.__cause__ = error
    return ours
