"""The Slack bot survives SIGKILL at any point, by both ways of listening: promise 1 of the design."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def _drill(tmp_path: Path, *, events: int, kills: int, seed: int) -> dict[str, object]:
    report = tmp_path / "report.json"
    command = [sys.executable, "-m", "tests.drill.slack", "--json", str(report), "--events", str(events)]
    ran = subprocess.run(
        [*command, "--kills", str(kills), "--seed", str(seed)], check=False, capture_output=True, text=True, cwd=ROOT
    )
    assert report.exists(), ran.stderr[-3000:]
    result = json.loads(report.read_text())
    assert result["violations"] == [], ran.stderr[-3000:]
    assert result["kills"] == kills
    return dict(result)


def test_slack_survives_20_kills(tmp_path: Path) -> None:
    result = _drill(tmp_path, events=1_000, kills=20, seed=20261124)
    assert result["outcomes"]["replied"] > 600  # type: ignore[index]
    assert result["streams"] > 100  # type: ignore[operator]


@pytest.mark.drill
@pytest.mark.timeout(3600)
def test_slack_survives_200_kills(tmp_path: Path) -> None:
    result = _drill(tmp_path, events=10_000, kills=200, seed=1)
    assert result["outcomes"]["replied"] > 6_000  # type: ignore[index]
