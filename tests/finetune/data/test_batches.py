"""Plans of batches: nothing lost, nothing twice, sizes kept, and the same plan from the same three values."""

from __future__ import annotations

from itertools import chain

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from core.model.chat_format import TrainingRow
from finetune.data.batches import collate, plan_epoch, split_step

LENGTHS = st.lists(st.integers(1, 400), max_size=200)


def plan(lengths, *, rows_per_step=8, micro_tokens=512, data="d", seed=0, epoch=0):
    return plan_epoch(
        lengths, rows_per_step=rows_per_step, micro_tokens=micro_tokens, data_sha256=data, seed=seed, epoch=epoch
    )


@given(LENGTHS, st.integers(1, 20), st.integers(1, 600), st.integers(0, 5))
def test_every_row_comes_exactly_once(lengths, rows_per_step, micro_tokens, epoch):
    steps = plan(lengths, rows_per_step=rows_per_step, micro_tokens=micro_tokens, epoch=epoch)
    rows = list(chain.from_iterable(chain.from_iterable(steps)))
    assert sorted(rows) == list(range(len(lengths)))
    assert len(steps) == len(plan(lengths, rows_per_step=rows_per_step, micro_tokens=micro_tokens, epoch=epoch + 1))


@given(LENGTHS, st.integers(1, 20), st.integers(1, 600))
def test_sizes_are_kept(lengths, rows_per_step, micro_tokens):
    for step in plan(lengths, rows_per_step=rows_per_step, micro_tokens=micro_tokens):
        assert 1 <= sum(map(len, step)) <= rows_per_step
        for micro in step:
            assert len(micro) == 1 or len(micro) * max(lengths[row] for row in micro) <= micro_tokens


@given(LENGTHS, st.integers(0, 2**40), st.integers(0, 9))
def test_the_same_values_give_the_same_plan(lengths, seed, epoch):
    assert plan(lengths, seed=seed, epoch=epoch) == plan(lengths, seed=seed, epoch=epoch)


def test_data_seed_and_epoch_each_change_the_order():
    lengths = [10] * 64
    plans = [plan(lengths), plan(lengths, data="e"), plan(lengths, seed=1), plan(lengths, epoch=1)]
    assert all(a != b for i, a in enumerate(plans) for b in plans[i + 1 :])


def test_like_lengths_go_together_so_that_little_is_padding():
    lengths = [20 + (37 * i) % 180 for i in range(400)]
    padded = sum(len(m) * max(lengths[r] for r in m) for step in plan(lengths) for m in step)
    assert sum(lengths) / padded > 0.95


def test_sizes_below_one_are_refused() -> None:
    for rows_per_step, micro_tokens in [(0, 10), (10, 0)]:
        with pytest.raises(ValueError, match="at least 1"):
            plan([1, 2], rows_per_step=rows_per_step, micro_tokens=micro_tokens)


def test_a_row_longer_than_a_micro_batch_stands_alone():
    assert split_step([0, 1, 2], [5, 100, 6], micro_tokens=20) == ((0, 2), (1,))


def test_padding_is_known_by_length_not_by_id():
    rows = [TrainingRow((0, 2, 0), (False, True, True)), TrainingRow((5,), (False,))]
    batch = collate(rows, torch.device("cpu"))
    assert batch.attention is not None
    assert batch.attention.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch.taught.tolist() == [[False, True, True], [False, False, False]]
    assert (batch.tokens, batch.supervised) == (4, 2)
    assert collate(rows[:1], torch.device("cpu")).attention is None
