"""A fine-tune survives SIGKILL of its trainer and of the program that serves, at any point, with the same bits."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow


def _drill(tmp_path: Path, *, trainers: int, servers: int, seed: int) -> dict[str, dict[str, int]]:
    report = tmp_path / "report.json"
    command = [sys.executable, "-m", "tests.drill.finetune", "--json", str(report), "--seed", str(seed)]
    ran = subprocess.run(
        [*command, "--trainers", str(trainers), "--servers", str(servers)],
        check=False,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert report.exists(), ran.stderr[-3000:]
    result = json.loads(report.read_text())
    assert result["violations"] == [], ran.stderr[-3000:]
    return dict(result)


def test_5_kills_change_no_bit(tmp_path: Path) -> None:
    result = _drill(tmp_path, trainers=4, servers=1, seed=20261126)
    assert result["trainers"]["kills"] >= 4
    assert result["servers"]["kills"] >= 1


@pytest.mark.drill
def test_50_kills_change_no_bit(tmp_path: Path) -> None:
    result = _drill(tmp_path, trainers=40, servers=10, seed=1)
    assert result["trainers"]["kills"] >= 40
    assert result["servers"]["kills"] >= 10
