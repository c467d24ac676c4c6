"""Adapter folders, named by their hash: check, place, verify. All of it blocks.

A folder is checked completely, renamed to `adapters/<sha256>` and then recorded (core.adapters.registry). A crash
leaves nothing, or a folder that the next attempt finds and uses.
"""

import hashlib
import json
import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cachetools import LRUCache

from core import files
from core.errors import AdapterUnusable
from core.model.weights import tensor_entries
from core.storage.home import Home
from core.types import AdapterRef

CONFIG, WEIGHTS, MANIFEST, CARD = "adapter_config.json", "adapter_model.safetensors", "manifest.json", "README.md"
_NEEDED = {CONFIG: 2**20, WEIGHTS: 16 * 2**30, MANIFEST: 2**20}
_ALLOWED = {**_NEEDED, CARD: 2**20}
_IDENTITY = tuple(sorted(_NEEDED))  # weights, configuration, origin; the card may be edited
_REMEMBERED = 256


@dataclass(frozen=True, slots=True)
class Candidate:
    """A checked folder. `sha256` is its identity, `manifest` its JSON text."""

    sha256: str
    folder: Path
    base_fingerprint: str
    dataset_sha256: str
    manifest: str
    trained_tokens: int = 0  # by its manifest; 0 where nothing was trained


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
