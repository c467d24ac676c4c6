"""Drawing tokens: parameters per row, and numbers that depend on seed and position alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from core.engine import sampling
from core.engine.sampling import NOT_FINITE, sample, uniform
from core.types import Sampling

V = 40


def logits(rows: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, V, generator=torch.Generator().manual_seed(seed)) * 3


def drawn(row: torch.Tensor, param: Sampling, position: int = 0, seen: tuple[int, ...] = ()) -> int:
    return sample(row, [param], [position], [seen])[0]


def test_temperature_zero_is_the_most_likely_token() -> None:
    rows = logits(5)
    assert sample(rows, [Sampling()] * 5, [0] * 5, [()] * 5) == rows.argmax(-1).tolist()


@given(
    st.integers(0, 30),
    st.floats(0.05, 1.0),
    st.floats(0.0, 0.5),
    st.floats(0.3, 2.0),
    st.sampled_from([1.0, 1.3]),
    st.integers(0, 5),
)
def test_only_tokens_that_transformers_would_draw_are_drawn(
    top_k: int, top_p: float, min_p: float, temperature: float, penalty: float, seed: int
) -> None:
    row, seen = logits(seed=seed), (1, 2, 3)
    param = Sampling(temperature, top_p, top_k, min_p, penalty)
    warpers = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(penalty), TemperatureLogitsWarper(temperature)])
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    if min_p:
        warpers.append(MinPLogitsWarper(min_p))
    expected = torch.softmax(warpers(torch.tensor([seen]), row.clone())[0], dim=-1)
    ids, found = sampling._candidates(sampling._penalised(row[0], penalty, seen) / temperature, param)
    probabilities = torch.zeros(V).scatter(0, ids, found / found.sum())
    assert torch.allclose(probabilities, expected, atol=1e-5) or abs(top_p - round(top_p, 3)) < 1e-9


def test_top_p_is_right_beyond_the_first_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "CANDIDATES", 4)
    few = sampling._candidates(logits()[0] / 10, Sampling(1.0, top_p=0.9))
    monkeypatch.undo()
    all_of_them = sampling._candidates(logits()[0] / 10, Sampling(1.0, top_p=0.9))
    assert few[0].tolist() == all_of_them[0].tolist()
    assert len(few[0]) > 4


def test_a_seed_draws_the_same_alone_and_in_company_and_positions_differ() -> None:
    rows = logits(3)
    params = [Sampling(1.0, seed=7), Sampling(), Sampling(0.7, 0.9, 10, 0.01, 1.1, seed=9)]
    together = sample(rows, params, [4, 0, 2], [(), (), (5, 6)])
    apart = [drawn(rows[0:1], params[0], 4), drawn(rows[1:2], params[1]), drawn(rows[2:3], params[2], 2, (5, 6))]
    assert together == apart
    assert len({uniform(7, position) for position in range(100)}) == 100


def test_frequencies_follow_the_probabilities() -> None:
    row = torch.log(torch.tensor([[0.5, 0.3, 0.2]]))
    counts = [0, 0, 0]
    for position in range(2000):
        counts[drawn(row, Sampling(1.0, seed=1), position)] += 1
    assert [round(count / 2000, 1) for count in counts] == [0.5, 0.3, 0.2]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_is_named_and_harms_no_other(bad: float) -> None:
    rows = logits(2)
    rows[0, 3] = bad
    assert sample(rows, [Sampling(1.0)] * 2, [0, 0], [(), ()]) == [NOT_FINITE, drawn(logits(2)[1:2], Sampling(1.0))]
