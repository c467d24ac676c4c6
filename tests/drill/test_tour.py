"""The README's tour on the real model and the company's real questions: a quarter of an hour on two cores."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.tour import tour

pytestmark = pytest.mark.slow


@pytest.mark.drill
def test_the_tour_makes_answers_better_by_half_and_rolls_back_word_for_word(tmp_path: Path) -> None:
    result = tour(tmp_path)
    assert result["rise"] >= 0.5  # type: ignore[operator]
    assert result["rollback_brings_the_old_answers_back"]
