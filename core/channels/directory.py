"""Channels: look up, create, change, archive."""

from collections.abc import Mapping
from dataclasses import asdict, fields
from functools import cache
from typing import Any

from core.channels import adapter_names, partners
from core.config.keys import NAME, Key
from core.config.schema import OWNER_PARTNER, RESERVED, channel_columns
from core.errors import BadInput, UnknownThing
from core.storage import migrations
from core.storage.database import Row, Tx, Value
from core.types import Channel, Limits, Sampling
from core.usage import prices

SELECT_CHANNEL = (
    "SELECT channel.*, partner.name AS partner, weight FROM channel JOIN partner ON partner.id = partner_id"
)


def channel_by_name(tx: Tx, name: str) -> Channel | None:
    """The channel of that name, archived or not."""
    row = tx.one(f"{SELECT_CHANNEL} WHERE channel.name = ?", [name])
    return channel_of_row(row) if row else None


def channels(tx: Tx, user_hash: str) -> tuple[Channel, ...]:
    """The channels that this person operates, by name."""
    rows = tx.all(
        f"{SELECT_CHANNEL} WHERE EXISTS (SELECT 1 FROM operator WHERE user_hash = ?"
        " AND (channel_id IS NULL OR channel_id = channel.id)) ORDER BY channel.name",
        [user_hash],
    )
    return tuple(channel_of_row(row) for row in rows)


def create_channel(
    tx: Tx, name: str, *, title: str = "", partner: str = OWNER_PARTNER, limits: Limits | None = None
) -> Channel:
    """A channel on base, free of charge, with an adapter name of its own.

    Raises BadInput for a name that is taken or not allowed, UnknownThing for a partner that does not exist.
    """
    if not NAME.fullmatch(name) or name in RESERVED:
        raise BadInput("operators.channel_bad_name", name=name[:80])
    if channel_by_name(tx, name):
        raise BadInput("operators.channel_taken", name=name)
    if adapter_names.exists(tx, name):
        raise BadInput("operators.adapter_taken", name=name)
    owner = partners.find(tx, partner)
    if owner is None:
        raise UnknownThing(name=partner)
    limits = limits or Limits()
    adapter_names.create(tx, name, owner["id"])
    channel_id = tx.insert(
        "channel",
        name=name,
        title=title or name,
        partner_id=owner["id"],
        adapter=name,
        **asdict(limits),
        created_ms=tx.now_ms,
    )
    prices.set_price(tx, channel_id, 0, 0, owner["share_bps"])
    made = channel_by_name(tx, name)
    assert made is not None
    return made


def set_channel(tx: Tx, channel_id: int, **values: Value) -> None:
    """Change columns of a channel; the caller has checked them."""
    marks = ", ".join(f"{name} = ?" for name in values)
    tx.run(f"UPDATE channel SET {marks} WHERE id = ?", [*values.values(), channel_id])


def archive(tx: Tx, channel_id: int) -> None:
    """Stop answering in its places; charges stay."""
    tx.run("UPDATE channel SET archived_ms = ? WHERE id = ? AND archived_ms IS NULL", [tx.now_ms, channel_id])


def channel_of_row(row: Row) -> Channel:
    same = ("id", "name", "title", "partner", "adapter", "instructions", "language", "weight")
    return Channel(
        **{key: row[key] for key in same},
        questions=tuple(row["questions"].splitlines()),
        limits=Limits(**{one.name: row[one.name] for one in fields(Limits)}),
        sampling=Sampling(temperature=row["temperature"], top_p=row["top_p"]),
        settings={name: _read(one, row[name]) for name, one in _others().items()},
        archived=row["archived_ms"] is not None,
    )


@cache
def _others() -> Mapping[str, Key]:
    """The columns of settings that have no field of their own in Channel, Limits or Sampling."""
    own = {one.name for made in (Channel, Limits, Sampling) for one in fields(made)}
    return {name: one for name, one in channel_columns().items() if name not in own}


# A setting of a channel is a column of its table; those without a migration are added by their definition.
for _name, _key in channel_columns().items():
    _kind = {"integer": "INTEGER", "boolean": "INTEGER", "number": "REAL"}.get(_key.schema["type"], "TEXT")
    migrations.add_column("channel", _name, _kind, "" if _key.default == () else _key.default)


def _read(key: Key, stored: Any) -> Any:
    kind = key.schema["type"]
    return tuple(stored.splitlines()) if kind == "array" else bool(stored) if kind == "boolean" else stored
