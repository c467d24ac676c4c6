"""What several tests stand on."""

from __future__ import annotations

import gc
import getpass
import io
import logging
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from core.model.demo import demo_folder
from core.observability import logs

gc.set_threshold(50_000)  # importing every test module makes millions of objects that stay; see also below
COMPILERS = ("g++", "clang++", "c++")  # that build the engine's operators once on a machine


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the longest files first, so that all workers end at about the same time."""
    items.sort(key=lambda item: not (item.path.parent.name == "drill" or item.path.stem.startswith("test_process")))


def pytest_collection_finish() -> None:
    """Modules are never freed: the collector need not walk over them in each test."""
    gc.freeze()


@pytest.fixture(autouse=True)
def slow_tests_say_so(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A test that starts a process or uses the demo model is marked slow, so that `make unit` leaves it out."""
    if any(request.node.get_closest_marker(name) for name in ("slow", "drill", "gpu")):
        return
    assert "demo_cache" not in request.fixturenames, "a test of the demo model is marked slow"
    start = subprocess.Popen.__init__

    def checked(self: Any, command: Any, *arguments: Any, **options: Any) -> None:
        program = command if isinstance(command, str) else str(command[0])
        assert program.endswith(COMPILERS), f"a test that starts a process ({program}) is marked slow"
        start(self, command, *arguments, **options)

    monkeypatch.setattr(subprocess.Popen, "__init__", checked)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", folder]).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """A folder in which nobody can write: root is held off by the mount alone."""
    folder = tmp_path / "read-only"
    folder.mkdir(mode=0o500)
    root = os.geteuid() == 0
    if root and subprocess.run(["mount", "-t", "tmpfs", "-o", "ro,size=1m", "none", folder]).returncode:
        pytest.skip("as root it takes a mount, which is not allowed here")
    yield folder
    if root:
        subprocess.run(["umount", folder], check=True)


@pytest.fixture
def written() -> Iterator[io.StringIO]:
    """What the one log has written; everything is as before afterwards."""
    root = logging.getLogger()
    before = (root.handlers[:], root.level, logging.getLogRecordFactory(), sys.excepthook, threading.excepthook)
    known = (set(logs._secrets), logs._known)
    stream = io.StringIO()
    logs.install("debug", stream)
    yield stream
    logging.captureWarnings(False)
    root.handlers[:], root.level = before[0], before[1]
    logging.setLogRecordFactory(before[2])
    sys.excepthook, threading.excepthook = before[3], before[4]
    logs._secrets.clear()
    logs._secrets.update(known[0])
    logs._known = known[1]


@pytest.fixture(scope="session")
def demo_cache() -> Path:
    """The converted demo model; made once per machine, since it takes seconds and half a gigabyte."""
    cache = Path(tempfile.gettempdir()) / f"distributary-tests-{getpass.getuser()}"
    demo_folder(cache)
    return cache
