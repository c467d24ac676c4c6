"""Migrations: numbered steps that never change once released. The SQL of each stands in a file of its own."""

import sqlite3
from collections.abc import Iterator
from importlib.resources import files

import sqlite_utils
from sqlite_utils import Migrations

from core.errors import StorageError

MIGRATIONS = Migrations("distributary")
_columns: dict[tuple[str, str], tuple[str, str | float | None]] = {}


def migrate(db: sqlite_utils.Database) -> None:
    """Bring a database to this release's schema. Raises StorageError where a newer release has written it."""
    applied = {step.name for step in MIGRATIONS.applied(db)}
    if newer := sorted(applied - {step.__name__ for step in STEPS}):
        raise StorageError(detail=f"the database is of another release: it has {', '.join(newer)}")
    MIGRATIONS.apply(db)
    for (table, name), (kind, default) in _columns.items():
        if name not in db[table].columns_dict:
            quoted = db.quote(default) if isinstance(default, str) else default
            needed = "" if default is None else f" NOT NULL DEFAULT {quoted}"
            db.execute(f"ALTER TABLE {table} ADD COLUMN {name} {kind}{needed}")


def add_column(table: str, name: str, kind: str, default: str | float | None = None) -> None:
    """Register a column that no migration creates; it is added when a database is opened. Its owner calls this."""
    _columns[table, name] = kind, default


def m001_schema(db: sqlite_utils.Database) -> None:
    for statement in _statements("m001_schema.sql"):
        db.conn.execute(statement)


def m002_floor(db: sqlite_utils.Database) -> None:
    for statement in _statements("m002_floor.sql"):
        db.conn.execute(statement)


STEPS = (m001_schema, m002_floor)
for _step in STEPS:
    MIGRATIONS()(_step)


def _statements(name: str) -> Iterator[str]:
    """The statements of a file, one by one: executescript would commit the migration's own transaction."""
    statement = ""
    for line in (files("core.storage") / name).read_text("utf-8").splitlines(keepends=True):
        statement += line
        if line.rstrip().endswith(";") and sqlite3.complete_statement(statement):
            yield statement
            statement = ""
