"""Bindings: which channel answers in a place of a platform account."""

import sqlite3

from core.channels.directory import SELECT_CHANNEL, channel_of_row
from core.storage.database import Tx
from core.types import Channel

LINK = "start="  # a link is bound as the place start=<payload>


def bind(tx: Tx, platform: str, account: str, place: str, channel_id: int) -> None:
    """Bind a place to a channel; "" is the account's default."""
    tx.run(
        "INSERT INTO binding VALUES (?, ?, ?, ?) ON CONFLICT DO UPDATE SET channel_id = excluded.channel_id",
        [platform, account, place, channel_id],
    )


def channel_for(tx: Tx, platform: str, account: str, place: str) -> Channel | None:
    """The channel bound to a place, else to its account. None where there is none, or it is archived."""
    row = tx.one(
        f"{SELECT_CHANNEL} JOIN binding ON channel_id = channel.id"
        " WHERE platform = ? AND account = ? AND place IN (?, '') ORDER BY place = '' LIMIT 1",
        [platform, account, place],
    )
    return channel_of_row(row) if row and row["archived_ms"] is None else None


def channel_of_person(tx: Tx, platform: str, account: str, place: str, user_hash: str) -> Channel | None:
    """The channel of a place; in a chat with one person, the channel whose link they used.

    None where there is none, or it is archived.
    """
    if tx.cipher.hash_user(platform, account, place) == user_hash:
        row = tx.one(
            f"{SELECT_CHANNEL} JOIN person ON channel.id = person.channel_id"
            " WHERE user_hash = ? AND archived_ms IS NULL"
            " AND NOT EXISTS (SELECT 1 FROM binding WHERE platform = ? AND account = ? AND place = ?)",
            [user_hash, platform, account, place],
        )
        if row is not None:
            return channel_of_row(row)
    return channel_for(tx, platform, account, place)


def channel_of_link(tx: Tx, platform: str, account: str, payload: str) -> Channel | None:
    """The channel of a link: the one bound to the place `start=<payload>` of the account."""
    row = tx.one(
        f"{SELECT_CHANNEL} JOIN binding ON channel_id = channel.id"
        " WHERE platform = ? AND account = ? AND place = ? AND archived_ms IS NULL",
        [platform, account, f"{LINK}{payload}"],
    )
    return channel_of_row(row) if row else None


def split(place: str) -> tuple[str, str, str]:
    """platform:account/place in its three parts; the last is "" for the account's default."""
    platform, _, rest = place.partition(":")
    account, _, where = rest.partition("/")
    return platform, account, where


def places(tx: Tx, channel_id: int) -> tuple[str, ...]:
    """The places of a channel, written as platform:account/place."""
    rows = tx.all("SELECT * FROM binding WHERE channel_id = ? ORDER BY platform, account, place", [channel_id])
    return tuple(f"{row['platform']}:{row['account']}" + f"/{row['place']}" * bool(row["place"]) for row in rows)


def bound_platforms(connection: sqlite3.Connection) -> set[str]:
    """The platforms on which any place is bound. Raises sqlite3.Error."""
    return {str(row[0]) for row in connection.execute("SELECT DISTINCT platform FROM binding")}


def channels_of_account(tx: Tx, platform: str, account: str) -> list[str]:
    """The names of the channels that answer in places of the account."""
    rows = tx.all(
        "SELECT DISTINCT name FROM channel JOIN binding ON channel_id = channel.id"
        " WHERE platform = ? AND account = ? AND archived_ms IS NULL ORDER BY name",
        [platform, account],
    )
    return [str(row["name"]) for row in rows]


def bound_to(tx: Tx, platform: str, account: str, place: str) -> str:
    """The name of the channel bound to exactly this place, or ""."""
    sql = "SELECT name FROM channel JOIN binding ON channel_id = channel.id WHERE platform = ? AND account = ?"
    return tx.value(f"{sql} AND place = ?", [platform, account, place]) or ""


def move_place(tx: Tx, platform: str, account: str, before: str, now: str) -> None:
    """Rename a place that the platform has renamed."""
    sql = "UPDATE OR IGNORE binding SET place = ? WHERE platform = ? AND account = ? AND place = ?"
    tx.run(sql, [now, platform, account, before])
