"""Adapter names: the partner that owns each, and its champion, the version that its channels answer from."""

from core.storage.database import Tx

BASE = "base"


def create(tx: Tx, name: str, partner_id: int) -> None:
    """A name without versions: its channels answer from base."""
    tx.insert("adapter_name", name=name, partner_id=partner_id)


def exists(tx: Tx, name: str) -> bool:
    return bool(tx.value("SELECT 1 FROM adapter_name WHERE name = ?", [name]))


def belongs_to(tx: Tx, name: str, partner: str) -> bool:
    sql = "SELECT 1 FROM adapter_name JOIN partner ON partner.id = partner_id WHERE adapter_name.name = ?"
    return bool(tx.value(f"{sql} AND partner.name = ?", [name, partner]))


def champion(tx: Tx, name: str) -> tuple[str | None, str]:
    """(sha256, name@version) of the version in service, or (None, "base")."""
    sql = "SELECT sha256, adapter.name, version FROM adapter_name JOIN adapter ON sha256 = champion"
    row = tx.one(f"{sql} WHERE adapter_name.name = ?", [name])
    return (row["sha256"], f"{row['name']}@{row['version']}") if row else (None, BASE)


def set_champion(tx: Tx, name: str, sha256: str | None) -> None:
    tx.run("UPDATE adapter_name SET champion = ? WHERE name = ?", [sha256, name])


def championed(tx: Tx, sha256: str) -> list[str]:
    """The names whose champion is this version."""
    return [row["name"] for row in tx.all("SELECT name FROM adapter_name WHERE champion = ?", [sha256])]


def champion_instructions(tx: Tx, name: str) -> str | None:
    """SHA-256 of the instructions that the champion was trained with; None for base, and where it is not recorded."""
    found: str | None = tx.value(
        "SELECT json_extract(manifest, '$.instructions_sha256') FROM adapter_name JOIN adapter ON sha256 = champion"
        " WHERE adapter_name.name = ?",
        [name],
    )
    return found
