"""Rows of adapter versions: publish, promote, undo, unpublish. Each function runs inside a transaction."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from core.adapters.folders import Candidate
from core.channels import adapter_names
from core.storage import lifecycle, state
from core.storage.database import Row, Tx
from core.storage.home import Home
from core.storage.lifecycle import Erasure, Periods, Stage

ERASED = "erased"  # why a version was unpublished: its data set was erased


@dataclass(frozen=True, slots=True)
class Version:
    """One row of `adapter`; where a Version may be None, None is base."""

    sha256: str
    name: str
    version: int
    base_fingerprint: str
    dataset_sha256: str
    manifest: dict[str, Any]
    created_ms: int
    unpublished: str  # why it was taken out of use, or ""

    @property
    def label(self) -> str:
        return f"{self.name}@{self.version}"

    @property
    def judged(self) -> Mapping[str, Any]:
        """The gate's numbers; empty where it was not judged."""
        return self.manifest.get("judged") or {}

    @property
    def verdict(self) -> str:
        return str(self.judged.get("verdict", "passed"))

    @property
    def passed(self) -> bool:
        """Whether it may go into service without a reason given."""
        return self.verdict == "passed"


def publish(tx: Tx, candidate: Candidate, name: str, version: int) -> None:
    """Record the version. Repeatable; it answers nobody before it is promoted."""
    found = tx.one("SELECT name, version FROM adapter WHERE sha256 = ?", [candidate.sha256])
    if found == {"name": name, "version": version}:
        return
    tx.insert(
        "adapter",
        sha256=candidate.sha256,
        name=name,
        version=version,
        base_fingerprint=candidate.base_fingerprint,
        dataset_sha256=candidate.dataset_sha256 or None,
        manifest=candidate.manifest,
        created_ms=tx.now_ms,
    )


def versions(tx: Tx, name: str) -> list[Version]:
    """Newest first."""
    return [_version(row) for row in tx.all("SELECT * FROM adapter WHERE name = ? ORDER BY version DESC", [name])]


def by_sha(tx: Tx, sha256: str) -> Version:
    row = tx.one("SELECT * FROM adapter WHERE sha256 = ?", [sha256])
    assert row is not None, sha256
    return _version(row)


def promote(tx: Tx, name: str, sha256: str | None, actor: str, reason: str) -> None:
    """Make the version (None is base) the champion of a name. The caller has checked that it may be."""
    before, _ = adapter_names.champion(tx, name)
    tx.insert("promotion", name=name, from_sha256=before, to_sha256=sha256, actor=actor, reason=reason, at_ms=tx.now_ms)
    adapter_names.set_champion(tx, name, sha256)


def put_into_service(tx: Tx, sha256: str) -> Row | None:
    """The last promotion of this version: actor, reason, at_ms; None where there was none."""
    return tx.one("SELECT actor, reason, at_ms FROM promotion WHERE to_sha256 = ? ORDER BY id DESC LIMIT 1", [sha256])


def undo(tx: Tx, name: str) -> tuple[str | None, str | None] | None:
    """Undo the newest promotion that was not undone: (before, after) as sha256; None where there is none.

    Skips versions that were unpublished since, or trained on another base model, down to base.
    """
    now, _ = adapter_names.champion(tx, name)
    undone, back = _way_back(tx, name)
    for promotion in undone:
        tx.run("UPDATE promotion SET undone_ms = ? WHERE id = ?", [tx.now_ms, promotion])
    if back == now:
        return None
    adapter_names.set_champion(tx, name, back)
    return now, back


def undo_label(tx: Tx, name: str) -> str:
    """The label that `undo` would bring back; "" where there is nothing to undo."""
    _, back = _way_back(tx, name)
    if back == adapter_names.champion(tx, name)[0]:
        return ""
    return by_sha(tx, back).label if back else adapter_names.BASE


def _way_back(tx: Tx, name: str) -> tuple[list[int], str | None]:
    """(ids of the promotions to undo, newest first; the champion after that, or the current one)."""
    now, _ = adapter_names.champion(tx, name)
    standing = "SELECT id, from_sha256 FROM promotion WHERE name = ? AND undone_ms IS NULL ORDER BY id DESC"
    undone = []
    for row in tx.all(standing, [name]):
        undone.append(int(row["id"]))
        back: str | None = row["from_sha256"]
        if back != now and (back is None or is_usable(tx, by_sha(tx, back))):
            return undone, back
    return undone, now


def keep_base(tx: Tx, fingerprint: str) -> None:
    """Record the base model that is loaded: adapters of another one cannot be put into service."""
    state.put(tx, "base_fingerprint", fingerprint)


def loaded_base(tx: Tx) -> str | None:
    """The fingerprint recorded last; None before the first start."""
    return state.get(tx, "base_fingerprint")


def is_of_other_base(tx: Tx, version: Version) -> bool:
    """Whether it was trained on another base model than the loaded one."""
    return loaded_base(tx) not in (None, version.base_fingerprint)


def is_usable(tx: Tx, version: Version) -> bool:
    return not version.unpublished and not is_of_other_base(tx, version)


def unpublish(tx: Tx, sha256: str, reason: str) -> list[str]:
    """Take a version out of use; names it was champion of go back to the one before. Returns those names."""
    sql = "UPDATE adapter SET unpublished_ms = ?, unpublished_reason = ? WHERE sha256 = ? AND unpublished_ms IS NULL"
    tx.run(sql, [tx.now_ms, reason, sha256])
    names = adapter_names.championed(tx, sha256)
    for name in names:
        if undo(tx, name) is None:  # it was not promoted
            adapter_names.set_champion(tx, name, None)
    return names


def _version(row: Row) -> Version:
    same = {key: row[key] for key in ("sha256", "name", "version", "base_fingerprint", "created_ms")}
    manifest, unpublished = json.loads(row["manifest"]), row["unpublished_reason"] or ""
    return Version(**same, manifest=manifest, dataset_sha256=row["dataset_sha256"] or "", unpublished=unpublished)


@lifecycle.erases(Stage.ADAPTERS)
def _erase(tx: Tx, erasure: Erasure) -> None:
    """Unpublish what was trained on erased data sets; the weights go with the next sweep, discarded before or not."""
    for dataset in erasure.datasets:
        for row in tx.all("SELECT * FROM adapter WHERE dataset_sha256 = ? AND unpublished_ms IS NULL", [dataset]):
            version = _version(row)
            unpublish(tx, version.sha256, ERASED)
            erasure.unpublished.append((version.label, adapter_names.champion(tx, version.name)[1]))
        tx.run("UPDATE adapter SET unpublished_reason = ? WHERE dataset_sha256 = ?", [ERASED, dataset])


@lifecycle.sweeps
def _sweep(tx: Tx, kept: Periods) -> Callable[[Home], None]:
    rows = tx.all("SELECT sha256, unpublished_reason FROM adapter")
    known = {row["sha256"] for row in rows}
    gone = {row["sha256"] for row in rows if row["unpublished_reason"] == ERASED}
    return lambda home: lifecycle.remove_files(home.adapters, gone=gone, known=known)
