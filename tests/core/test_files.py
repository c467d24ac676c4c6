"""core/files: atomic writes, checksums, opening paths that people name."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from core import files


def test_write_replaces_the_whole_content_for_this_user_only(tmp_path: Path) -> None:
    path = tmp_path / "key"
    files.write(path, b"first, and longer")
    files.write(path, b"second")
    assert path.read_bytes() == b"second"
    assert path.stat().st_mode & 0o777 == 0o600
    assert files.sha256(path) == hashlib.sha256(b"second").hexdigest()
    assert os.listdir(tmp_path) == ["key"]


def test_a_failed_write_leaves_the_old_content_and_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "report"
    path.write_bytes(b"old")
    with pytest.raises(FileExistsError), files.replacing(path) as aside:  # noqa: PT012
        aside.write_bytes(b"half")
        tmp_path.mkdir()
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["report"]


def test_move_syncs_every_file_of_a_folder_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = tmp_path / "a.new", tmp_path / "a"
    (source / "inner").mkdir(parents=True)
    (source / "inner" / "file").write_bytes(b"x")
    synced: list[tuple[str, bool]] = []
    monkeypatch.setattr(files, "sync", lambda path: synced.append((path.name, target.exists())))
    files.move(source, target)
    assert (target / "inner" / "file").read_bytes() == b"x"
    assert synced == [("inner", False), ("file", False), ("a.new", False), (tmp_path.name, True)]


def test_open_plain_opens_regular_files_alone(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(b"x")
    with files.open_plain(path) as file:
        assert file.read() == b"x"
    os.mkfifo(tmp_path / "pipe")
    refused: list[tuple[Path, type[OSError]]] = [
        (tmp_path / "none", FileNotFoundError),
        (path / "below", FileNotFoundError),
        (tmp_path / ("n" * 5000), FileNotFoundError),
        (tmp_path / "nul\0", FileNotFoundError),
        (tmp_path, IsADirectoryError),
        (tmp_path / "pipe", files.NotPlainFile),
    ]
    for name, kind in refused:
        with pytest.raises(kind):
            files.open_plain(name)
