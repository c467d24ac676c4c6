"""An adapter folder is believed only when it was read completely, and stays what its hash says."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from core.adapters import folders, registry
from core.channels import adapter_names, directory, terminal
from core.errors import AdapterUnusable
from core.storage.cipher import Cipher
from core.storage.database import Database, Tx
from core.storage.home import Home
from core.types import AdapterRef
from tests.support.database import write_now


def make(folder: Path, *, seed: int = 0) -> Path:
    """A folder as the trainer leaves it."""
    folder.mkdir(parents=True)
    values = np.random.default_rng(seed).normal(size=(4, 8)).astype(np.float32)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    save_file({name.format("A"): values, name.format("B"): values.T.copy()}, folder / folders.WEIGHTS)
    (folder / folders.CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8}))
    (folder / folders.MANIFEST).write_text(json.dumps({"base_fingerprint": "f" * 64, "data_sha256": "d" * 64}))
    (folder / folders.CARD).write_text("# a card\n")
    return folder


@pytest.fixture
def home(tmp_path: Path) -> Home:
    made = Home(tmp_path / "home")
    made.create()
    return made


def test_a_whole_folder_is_read_and_its_hash_depends_on_what_counts(tmp_path: Path) -> None:
    first, same, other = (make(tmp_path / name, seed=seed) for name, seed in (("a", 0), ("b", 0), ("c", 1)))
    found = folders.inspect(first)
    assert (found.base_fingerprint, found.dataset_sha256) == ("f" * 64, "d" * 64)
    (same / folders.CARD).write_text("# another card\n")
    assert folders.inspect(same).sha256 == found.sha256 != folders.inspect(other).sha256


def _cut(folder: Path) -> None:
    path = folder / folders.WEIGHTS
    path.write_bytes(path.read_bytes()[:-1])


def _huge_header(folder: Path) -> None:
    (folder / folders.WEIGHTS).write_bytes((2**60).to_bytes(8, "little") + b"{}")


def _link(folder: Path) -> None:
    path = folder / folders.WEIGHTS
    path.rename(folder.parent / "elsewhere")
    path.symlink_to(folder.parent / "elsewhere")


def _manifest(value: str) -> Callable[[Path], None]:
    return lambda folder: (folder / folders.MANIFEST).write_text(value) and None


DAMAGES: dict[str, Callable[[Path], object]] = {
    "cut": _cut,
    "huge header": _huge_header,
    "no tensors": lambda folder: save_file({}, folder / folders.WEIGHTS),
    "not safetensors": lambda folder: (folder / folders.WEIGHTS).write_bytes(b"PK\x03\x04 a pickle"),
    "empty": lambda folder: (folder / folders.WEIGHTS).write_bytes(b""),
    "link": _link,
    "another file": lambda folder: (folder / "run_me.py").write_text("import os"),
    "a folder": lambda folder: (folder / "inner").mkdir(),
    "no manifest": lambda folder: (folder / folders.MANIFEST).unlink(),
    "no config": lambda folder: (folder / folders.CONFIG).unlink(),
    "no weights": lambda folder: (folder / folders.WEIGHTS).unlink(),
    "manifest without base": _manifest("{}"),
    "manifest of another shape": _manifest("[]"),
    "manifest no JSON": _manifest("{"),
    "manifest nested": _manifest("[" * 100_000),
    "manifest no text": lambda folder: (folder / folders.MANIFEST).write_bytes(b"\xff\xfe{"),
    "not LoRA": lambda folder: (folder / folders.CONFIG).write_text('{"peft_type": "IA3"}'),
    "too large": lambda folder: (folder / folders.CARD).write_bytes(b"x" * (2**20 + 1)),
    "a pipe": lambda folder: ((folder / folders.CARD).unlink(), os.mkfifo(folder / folders.CARD)),
    "gone": shutil.rmtree,
}


def test_a_damaged_folder_is_refused_with_its_reason(tmp_path: Path) -> None:
    for number, (name, damage) in enumerate(DAMAGES.items()):
        folder = make(tmp_path / str(number) / "a")
        damage(folder)
        with pytest.raises(AdapterUnusable) as refused:
            folders.inspect(folder)
        assert refused.value.detail.startswith("a: "), name


# --- after it is published ---


@pytest.fixture
def placed(home: Home, tmp_path: Path) -> AdapterRef:
    candidate = folders.inspect(make(tmp_path / "out"))
    return AdapterRef(candidate.sha256, folders.place(home, candidate), "acme@1")


def test_placing_is_repeatable_at_every_point(home: Home, tmp_path: Path) -> None:
    candidate = folders.inspect(make(tmp_path / "out"))
    target = folders.place(home, candidate)
    assert not (tmp_path / "out").exists()
    assert folders.place(home, candidate) == target
    again = folders.inspect(make(tmp_path / "out"))  # a trainer that was run once more
    assert folders.place(home, again) == target
    folders.verify(AdapterRef(candidate.sha256, target))


@pytest.mark.parametrize(("name", "at"), [(folders.WEIGHTS, -1), (folders.CONFIG, 0), (folders.MANIFEST, 9)])
def test_one_changed_bit_is_seen_although_time_and_size_are_the_same(placed: AdapterRef, name: str, at: int) -> None:
    folders.verify(placed)
    path = placed.folder / name
    before = path.stat()
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(AdapterUnusable) as refused:
        folders.verify(placed)
    assert refused.value.fields["label"] == "acme@1"


def test_a_swapped_or_missing_folder_is_seen(placed: AdapterRef, tmp_path: Path) -> None:
    folders.verify(placed)
    placed.folder.rename(tmp_path / "aside")
    with pytest.raises(AdapterUnusable):
        folders.verify(placed)
    make(placed.folder, seed=1)
    with pytest.raises(AdapterUnusable):
        folders.verify(placed)
    shutil.rmtree(placed.folder)
    (tmp_path / "aside").rename(placed.folder)
    folders.verify(placed)


def test_an_unchanged_folder_is_read_once(placed: AdapterRef, monkeypatch: pytest.MonkeyPatch) -> None:
    folders.verify(placed)
    monkeypatch.setattr(folders, "_digest", lambda _: pytest.fail("read again"))
    folders.verify(placed)


# --- rows ---


@pytest.fixture
def database(home: Home) -> Iterator[Database]:
    with Database(home.database, Cipher(b"k" * 32)) as made:
        write_now(made, lambda tx: terminal.ensure_terminal(tx, "home"))
        yield made


def _versions(tx: Tx, count: int) -> list[str]:
    made = [f"{n:064x}" for n in range(1, count + 1)]
    for n, sha256 in enumerate(made, start=1):
        registry.publish(tx, folders.Candidate(sha256, Path(), "base", "", "{}"), "terminal", n)
    return made


def test_publishing_is_repeatable_and_answers_nobody_yet(database: Database) -> None:
    def work(tx: Tx) -> tuple[str | None, str]:
        _versions(tx, 1)
        _versions(tx, 1)
        return adapter_names.champion(tx, "terminal")

    assert write_now(database, work) == (None, "base")


@pytest.mark.parametrize("seed", range(3))
def test_rollback_is_an_undo_stack_that_skips_what_is_withdrawn(database: Database, seed: int) -> None:
    """Against a plain list: each promotion remembers what answered before it."""
    randomness = random.Random(seed)

    def work(tx: Tx) -> None:
        known: list[str | None] = [None, *_versions(tx, 5)]
        withdrawn: set[str] = set()
        stack: list[str | None] = []
        now: str | None = None

        def back() -> str | None:
            while stack:
                before = stack.pop()
                if before != now and before not in withdrawn:
                    return before
            return now if now not in withdrawn else None

        for _ in range(200):
            draw = randomness.random()
            if draw < 0.5:
                choice = randomness.choice(known)
                if choice != now and choice not in withdrawn:
                    registry.promote(tx, "terminal", choice, "me", "")
                    stack.append(now)
                    now = choice
            elif draw < 0.97:
                registry.undo(tx, "terminal")
                now = back()
            elif len(withdrawn) < 3:
                gone = randomness.choice(known[1:])
                assert gone is not None
                withdrawn.add(gone)
                registry.unpublish(tx, gone, "erased")
                if gone == now:
                    now = back()
            assert adapter_names.champion(tx, "terminal")[0] == now

    write_now(database, work)


def test_two_names_do_not_move_each_other(database: Database) -> None:
    def work(tx: Tx) -> tuple[str, str]:
        directory.create_channel(tx, "acme")
        first, second = _versions(tx, 2)
        registry.promote(tx, "terminal", first, "me", "")
        registry.promote(tx, "terminal", second, "me", "")
        registry.undo(tx, "acme")
        return adapter_names.champion(tx, "terminal")[1], adapter_names.champion(tx, "acme")[1]

    assert write_now(database, work) == ("terminal@2", "base")
