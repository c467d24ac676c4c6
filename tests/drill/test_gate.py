"""The gate's verdicts on the real model: yes to what is better, no to what only looks so. Two hours of one core."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.drill.gate import drill

pytestmark = pytest.mark.slow


@pytest.mark.drill
@pytest.mark.timeout(6 * 3600)
def test_the_gate_is_right_about_five_seeds_of_each(tmp_path: Path) -> None:
    result = drill(tmp_path, seeds=5, only=[])
    assert result["right"], [one for one in result["cases"] if not one["right"]]
