"""The flow survives SIGKILL at any point: promise 1 of the design, invariants I1-I4 and I11."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.drill.lives import run_drill

pytestmark = pytest.mark.slow


def test_60_kills_and_100_torn_wals_break_no_promise(tmp_path: Path) -> None:
    result = run_drill("kills", tmp_path, kills=60, torn=100, seed=20261123)
    assert result["kills"] >= 60
    assert result["torn"] >= 100
    assert result["outcomes"]["replied"] > 100


@pytest.mark.drill
def test_2000_kills_and_1000_torn_wals_break_no_promise(tmp_path: Path) -> None:
    result = run_drill("kills", tmp_path, kills=2000, torn=1000, seed=1)
    assert result["kills"] >= 2000
    assert result["torn"] >= 1000
