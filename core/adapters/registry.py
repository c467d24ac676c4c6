"""Adapter versions: folders named by their hash, and rows that say which version answers.

A folder is checked completely, renamed to `adapters/<sha256>` and then recorded in one transaction. A crash leaves
nothing, or a folder that the next attempt finds and uses.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cachetools import LRUCache

from core import files
from core.channels import adapter_names
from core.errors import AdapterUnusable
from core.model.weights import tensor_entries
from core.storage import lifecycle, state
from core.storage.database import Row, Tx
from core.storage.home import Home
from core.storage.lifecycle import Erasure, Periods, Stage
from core.types import AdapterRef

CONFIG, WEIGHTS, MANIFEST, CARD = "adapter_config.json", "adapter_model.safetensors", "manifest.json", "README.md"
_NEEDED = {CONFIG: 2**20, WEIGHTS: 16 * 2**30, MANIFEST: 2**20}
_ALLOWED = {**_NEEDED, CARD: 2**20}
_IDENTITY = tuple(sorted(_NEEDED))  # weights, configuration, origin; the card may be edited
_REMEMBERED = 256
ERASED = "erased"  # why a version was unpublished: its data set was erased


@dataclass(frozen=True, slots=True)
class Candidate:
    """A checked folder. `sha256` is its identity, `manifest` its JSON text."""

    sha256: str
    folder: Path
    base_fingerprint: str
    dataset_sha256: str
    manifest: str
    trained_tokens: int = 0  # by its manifest; 0 where nothing was trained


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


# --- folders: blocking ---


def inspect(folder: Path) -> Candidate:
    """Check a whole folder. Raises AdapterUnusable with the reason as its detail."""
    try:
        _check_files(folder)
        config = _json(folder / CONFIG)
        if config.get("peft_type") != "LORA":
            raise ValueError(f"peft_type={config.get('peft_type')!r} is not LORA")
        if not list(tensor_entries(folder / WEIGHTS)):
            raise ValueError(f"{WEIGHTS} holds no tensors")
        text = (folder / MANIFEST).read_text("utf-8")
        manifest = _json(folder / MANIFEST)
        base = manifest.get("base_fingerprint")
        if not isinstance(base, str) or not base:
            raise ValueError(f"{MANIFEST} does not say which base model it was made for (base_fingerprint)")
        trained = manifest.get("tokens", 0)
        if not isinstance(trained, int) or trained < 0:
            raise ValueError(f"{MANIFEST} says that tokens={trained!r} were trained")
        return Candidate(_digest(folder), folder, base, str(manifest.get("data_sha256", "")), text, trained)
    except (OSError, ValueError) as error:
        raise AdapterUnusable(detail=f"{folder.name}: {error}", label=folder.name) from error


def place(home: Home, candidate: Candidate) -> Path:
    """Move the folder to where it is served from. Repeatable: an existing folder is verified and kept."""
    target = home.adapters / candidate.sha256
    if target.exists():
        verify(AdapterRef(candidate.sha256, target))
        return target
    files.move(candidate.folder, target)
    return target


_verified: LRUCache[str, tuple[tuple[int, ...], ...]] = LRUCache(_REMEMBERED)
_verified_lock = threading.Lock()


def verify(ref: AdapterRef) -> None:
    """Check that the folder still has its hash. Unchanged files are not read again.

    Raises AdapterUnusable naming the version.
    """
    label = ref.label or ref.sha256[:12]
    try:
        seen = _stamps(ref.folder)
        with _verified_lock:
            known = _verified.get(str(ref.folder)) == seen
        if known:
            return
        if _digest(ref.folder) != ref.sha256:
            raise ValueError("its files have changed since it was published")
        if _stamps(ref.folder) != seen:
            raise ValueError("its files change while they are read")
    except (OSError, ValueError) as error:
        raise AdapterUnusable(detail=f"adapter {label}: {error}", label=label) from error
    with _verified_lock:
        _verified[str(ref.folder)] = seen


def _check_files(folder: Path) -> None:
    """Only plain files of known names and bounded sizes. Raises ValueError, OSError."""
    if folder.is_symlink() or not folder.is_dir():
        raise ValueError("it is not a folder")
    found = {entry.name: entry for entry in os.scandir(folder)}
    for name, entry in sorted(found.items()):
        if name not in _ALLOWED:
            raise ValueError(f"{name[:80]!r} does not belong to an adapter; there may be {', '.join(sorted(_ALLOWED))}")
        if not entry.is_file(follow_symlinks=False):
            raise ValueError(f"{name} is not a plain file")
        if entry.stat(follow_symlinks=False).st_size > _ALLOWED[name]:
            raise ValueError(f"{name} is larger than {_ALLOWED[name]} bytes")
    if missing := sorted(_NEEDED.keys() - found.keys()):
        raise ValueError(f"{', '.join(missing)} is missing")


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text("utf-8"))
    except RecursionError:
        raise ValueError(f"{path.name} is nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path.name} is not a table of keys and values")
    return value


def _digest(folder: Path) -> str:
    """SHA-256 over names and SHA-256 sums of the files in _IDENTITY."""
    digest = hashlib.sha256()
    for name in _IDENTITY:
        digest.update(f"{name} {files.sha256(folder / name)}\n".encode())
    return digest.hexdigest()


def _stamps(folder: Path) -> tuple[tuple[int, ...], ...]:
    """File stamps that change with every write: ctime cannot be set back."""
    stats = [(folder / name).stat() for name in _IDENTITY]
    return tuple((s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for s in stats)


# --- rows: run inside a transaction ---


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
        if back != now and (back is None or _serves(tx, by_sha(tx, back))):
            return undone, back
    return undone, now


def keep_base(tx: Tx, fingerprint: str) -> None:
    """Record the base model that is loaded: adapters of another one cannot be put into service."""
    state.put(tx, "base_fingerprint", fingerprint)


def loaded_base(tx: Tx) -> str | None:
    """The fingerprint recorded last; None before the first start."""
    return state.get(tx, "base_fingerprint")


def _serves(tx: Tx, version: Version) -> bool:
    return not version.unpublished and loaded_base(tx) in (None, version.base_fingerprint)


def unpublish(tx: Tx, sha256: str, reason: str) -> list[str]:
    """Take a version out of use; names it was champion of go back to the one before. Returns those names."""
    tx.run(
        "UPDATE adapter SET unpublished_ms = ?, unpublished_reason = ? WHERE sha256 = ? AND unpublished_ms IS NULL",
        [tx.now_ms, reason, sha256],
    )
    names = adapter_names.championed(tx, sha256)
    for name in names:
        if undo(tx, name) is None:  # it was not promoted
            adapter_names.set_champion(tx, name, None)
    return names


def _version(row: Row) -> Version:
    return Version(
        sha256=row["sha256"],
        name=row["name"],
        version=row["version"],
        base_fingerprint=row["base_fingerprint"],
        dataset_sha256=row["dataset_sha256"] or "",
        manifest=json.loads(row["manifest"]),
        created_ms=row["created_ms"],
        unpublished=row["unpublished_reason"] or "",
    )


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
