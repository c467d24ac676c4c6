"""After an unclean stop the file and the ledger are checked; nothing is charged on books that are broken."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from bots import app
from core.config.loader import read_config
from core.errors import StorageError
from core.storage import state
from core.storage.home import Home

CONFIG = read_config({"engine": {"kind": "scripted"}}, {})


async def started(home: Home) -> bool:
    """One clean start and stop; whether the check is left to a task beside the serving."""
    async with app.open_parts(CONFIG, home) as parts:
        return parts.unchecked


async def leave_unclean(home: Home) -> None:
    async with app.open_store(CONFIG, home) as database:
        await database.write(state.mark_open)


def charge_what_was_not_delivered(home: Home) -> None:
    with closing(sqlite3.connect(home.database, isolation_level=None)) as connection:
        columns = len(connection.execute("PRAGMA table_info(usage_daily)").fetchall())
        connection.execute(f"INSERT INTO usage_daily VALUES ('2026-12-01', 1, 1{', 1' * (columns - 3)})")


def damage_a_page(home: Home) -> None:
    """Of an index: queries that do not use it still work."""
    with closing(sqlite3.connect(home.database)) as connection:
        page, size = (
            connection.execute("SELECT rootpage FROM sqlite_master WHERE name = 'inbox_user'").fetchone()[0],
            connection.execute("PRAGMA page_size").fetchone()[0],
        )
    with home.database.open("r+b") as file:
        file.seek((page - 1) * size + 3)
        file.write(b"\x00\x07")  # the number of its cells


@pytest.mark.parametrize("damage", [charge_what_was_not_delivered, damage_a_page])
async def test_broken_books_are_found_at_the_start_after_an_unclean_stop(tmp_path: Path, damage: object) -> None:
    home = Home(tmp_path)
    await started(home)
    damage(home)  # type: ignore[operator]
    assert await started(home) is False  # after a clean stop nothing is read
    await leave_unclean(home)
    with pytest.raises(StorageError) as raised:
        await started(home)
    assert raised.value.key in ("error.books_broken", "error.storage")


async def test_a_sound_home_starts_after_an_unclean_stop_and_a_large_one_is_checked_beside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = Home(tmp_path)
    await started(home)
    await leave_unclean(home)
    assert await started(home) is False
    await leave_unclean(home)
    monkeypatch.setattr(app, "_CHECKED_AT_START", 0)
    assert await started(home) is True
