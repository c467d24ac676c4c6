"""The flow survives SIGKILL at any point: promise 1 of the design, invariants I1-I4 and I11."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


def _drill(tmp_path: Path, *, kills: int, torn: int, seed: int) -> dict[str, object]:
    report = tmp_path / "report.json"
    command = [sys.executable, "-m", "tests.drill.kills", "--json", str(report)]
    ran = subprocess.run(
        [*command, "--kills", str(kills), "--torn", str(torn), "--seed", str(seed)],
        check=False,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert report.exists(), ran.stderr[-3000:]
    result = json.loads(report.read_text())
    assert result["violations"] == [], ran.stderr[-3000:]
    return dict(result)


def test_60_kills_and_100_torn_wals_break_no_promise(tmp_path: Path) -> None:
    result = _drill(tmp_path, kills=60, torn=100, seed=20261123)
    assert result["kills"] >= 60  # type: ignore[operator]
    assert result["torn"] >= 100  # type: ignore[operator]
    assert result["outcomes"]["replied"] > 100  # type: ignore[index]


@pytest.mark.drill
def test_2000_kills_and_1000_torn_wals_break_no_promise(tmp_path: Path) -> None:
    result = _drill(tmp_path, kills=2000, torn=1000, seed=1)
    assert result["kills"] >= 2000  # type: ignore[operator]
    assert result["torn"] >= 1000  # type: ignore[operator]
