"""Sampling: parameters per row, and random numbers that depend on seed and position only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from core.engine.runtime import sampling
from core.engine.runtime.sampling import NOT_FINITE, sample, uniform
from core.types import Sampling

V = 40


def logits(rows: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, V, generator=torch.Generator().manual_seed(seed)) * 3


def drawn(row: torch.Tensor, param: Sampling, position: int = 0, seen: tuple[int, ...] = ()) -> int:
    return sample(row, [param], [position], [seen])[0]


def test_temperature_zero_is_the_most_likely_token() -> None:
    rows = logits(5)
    assert sample(rows, [Sampling()] * 5, [0] * 5, [()] * 5) == rows.argmax(-1).tolist()


def test_a_temperature_near_zero_is_zero() -> None:
    rows = logits(5) * 100
    seen = [(int(one),) for one in rows.argmax(-1)]
    for temperature in (1e-5, 1e-30, 1e-37, 1e-40, 5e-324):
        for others in ({}, {"top_p": 0.9}, {"top_k": 5}, {"min_p": 0.1}, {"repetition_penalty": 0.01}):
            cold, none = ([Sampling(one, **others)] * 5 for one in (temperature, 0.0))  # type: ignore[arg-type]
            assert sample(rows, cold, [3] * 5, seen) == sample(rows, none, [3] * 5, seen), (temperature, others)


def test_the_lowest_effective_temperature_gives_the_most_likely_token() -> None:
    rows = logits(5) * 100
    for others in ({}, {"top_p": 0.9}, {"top_k": 5}):
        assert sample(rows, [Sampling(1.1e-5, **others)] * 5, [3] * 5, [()] * 5) == rows.argmax(-1).tolist()


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
    probabilities = weights_of(row, param, seen)
    assert torch.allclose(probabilities, expected, atol=1e-5) or abs(top_p - round(top_p, 3)) < 1e-9


def weights_of(row: Tensor, param: Sampling, seen: tuple[int, ...]) -> Tensor:
    """(V,): how likely each id is drawn."""
    found: list[Tensor] = []
    index = sampling._inverse_cdf

    def spied(weights: Tensor, drawn: Tensor) -> Tensor:
        found.append(weights)
        return index(weights, drawn)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "_inverse_cdf", spied)
        drawn(row, param, seen=seen)
    (weights,) = found
    if param.top_k > 0 or param.top_p < 1:
        scores = row.clone()
        sampling._penalize(scores, torch.tensor([[param.repetition_penalty]]), [seen])
        ids = scores.argsort(descending=True)
        weights = torch.zeros_like(weights).scatter(1, ids[:, : weights.shape[1]], weights)
    return weights[0] / weights.sum()


PARAMS = st.builds(
    Sampling,
    st.sampled_from([0.0, 0.3, 1.0, 30.0]),
    st.sampled_from([0.2, 0.9, 1.0]),
    st.sampled_from([0, 1, 3, 30]),
    st.sampled_from([0.0, 0.1]),
    st.sampled_from([1.0, 1.3]),
    st.integers(0, 1000),
)


def one_by_one(row: Tensor, param: Sampling, position: int, seen: Sequence[int]) -> int:
    """The definition, for one row in float64."""
    row = row.double()
    for one in set(seen):
        row[one] = row[one] * param.repetition_penalty if row[one] < 0 else row[one] / param.repetition_penalty
    if param.temperature <= 0:
        return int(row.argmax())
    weights = torch.softmax(row / param.temperature, dim=0)
    ids = list(range(len(row)))
    if param.top_k > 0 or param.top_p < 1:
        ids = weights.argsort(descending=True).tolist()
        ids = ids[: param.top_k or None]
        weights = weights / weights[ids].sum() if param.top_k else weights
        ids = [one for i, one in enumerate(ids) if i == 0 or weights[ids[:i]].sum() < param.top_p]
    least = param.min_p * weights.max()
    ids = [one for one in ids if weights[one] >= least]
    left = uniform(param.seed, position) * float(weights[ids].sum())
    for one in ids:
        left -= float(weights[one])
        if left < 0:
            break
    return one


@given(st.lists(PARAMS, min_size=1, max_size=6), st.integers(0, 99), st.sampled_from([4, 1024]))
def test_rows_sampled_together_equal_rows_sampled_alone(params: list[Sampling], seed: int, candidates: int) -> None:
    """Whatever the rest of the batch, and whether or not the first candidates suffice."""
    rows, seen = logits(len(params), seed), [tuple(range(i, i + 5)) for i in range(len(params))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "CANDIDATES", candidates)
        together = sample(rows, params, range(len(params)), seen)
    assert together == [one_by_one(rows[i].clone(), one, i, seen[i]) for i, one in enumerate(params)]


class Waits(TorchDispatchMode):
    """Fails on operators that make the host wait for a GPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in (
            torch.ops.aten._local_scalar_dense.default,
            torch.ops.aten.nonzero.default,
            torch.ops.aten.masked_select.default,
        )
        return func(*args, **(kwargs or {}))


def test_sampling_synchronizes_only_for_the_ids() -> None:
    params = [Sampling(), Sampling(0.7), Sampling(0.7, 0.9, 10, 0.01, 1.1), Sampling(0.7, 0.9), Sampling(0, 1, 0, 0, 2)]
    with Waits():
        sample(logits(5), params, range(5), [(1, 2)] * 5)


def test_a_seed_samples_the_same_alone_and_in_a_batch() -> None:
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


def test_a_non_finite_row_is_reported_and_changes_no_other() -> None:
    for bad in (float("nan"), float("inf")):
        rows = logits(2)
        rows[0, 3] = bad
        assert sample(rows, [Sampling(1.0)] * 2, [0, 0], [(), ()]) == [NOT_FINITE, drawn(logits(2)[1:2], Sampling(1.0))]


@pytest.mark.parametrize("vocabulary", [512, 48, 257])  # by blocks of 256, of 16, by none
def test_the_most_likely_token_is_the_first_of_equal_ones(vocabulary: int) -> None:
    torch.manual_seed(vocabulary)
    for _ in range(100):
        rows = torch.randint(-3, 3, (4, vocabulary)).float()
        first = [row.tolist().index(float(row.max())) for row in rows]
        assert sample(rows, [Sampling()] * 4, [0] * 4, [()] * 4) == first
        for bad in (float("nan"), float("inf")):
            rows[1, int(torch.randint(vocabulary, ()))] = bad
            assert sample(rows, [Sampling()] * 4, [0] * 4, [()] * 4) == [first[0], NOT_FINITE, *first[2:]]
