"""The home's own facts: one small text for each key. Each caller owns its key."""

from pathlib import Path

from core.errors import StorageError
from core.storage.database import Tx


def get(tx: Tx, key: str) -> str | None:
    found: str | None = tx.value("SELECT value FROM setting WHERE key = ?", [key])
    return found


def put(tx: Tx, key: str, value: str) -> None:
    tx.run("INSERT INTO setting VALUES (?, ?) ON CONFLICT DO UPDATE SET value = excluded.value", [key, value])


def mark_open(tx: Tx) -> bool:
    """Note that a program serves from this home; whether the one before it ended without `mark_closed`."""
    unclean = get(tx, "serving") == "1"
    put(tx, "serving", "1")
    return unclean


def mark_closed(tx: Tx) -> None:
    put(tx, "serving", "0")


def probe(tx: Tx) -> None:
    """A write whose commit proves that the store takes writes."""
    put(tx, "probe", str(tx.now_ms))


def check_key(tx: Tx, key_file: Path) -> None:
    """Seal a sample with the key at the first start, and unseal it at each later one.

    Raises StorageError where the key is not the one that this database is written with.
    """
    sealed = get(tx, "sealed")
    if sealed is None:
        put(tx, "sealed", tx.cipher.seal("").hex())
        return
    try:
        tx.cipher.unseal(bytes.fromhex(sealed))
    except StorageError as error:
        raise StorageError("error.key_other", f"{key_file} is not this home's key", path=str(key_file)) from error
