"""Partners: who is paid a share of what their channels earn."""

from collections.abc import Mapping

from core.storage.database import Row, Tx, Value


def find(tx: Tx, name: str) -> Row | None:
    """The row of a partner: id, name, title, share_bps, weight."""
    return tx.one("SELECT * FROM partner WHERE name = ?", [name])


def create(tx: Tx, name: str, **values: Value) -> int:
    """A new partner's id. `values` are its columns: title, share_bps, weight."""
    return tx.insert("partner", name=name, created_ms=tx.now_ms, **values)


def channel_ids(tx: Tx, name: str) -> tuple[int, ...]:
    """The channels of a partner."""
    sql = "SELECT channel.id FROM channel JOIN partner ON partner.id = partner_id WHERE partner.name = ?"
    return tuple(row["id"] for row in tx.all(sql, [name]))


def update(tx: Tx, name: str, values: Mapping[str, Value]) -> None:
    """Change columns of a partner; the caller has checked them."""
    marks = ", ".join(f"{key} = ?" for key in values)
    tx.run(f"UPDATE partner SET {marks} WHERE name = ?", [*values.values(), name])
