"""The split is by hash, for good."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.split import rows_missing, share_of_test, split


def keys(n, salt=""):
    return [hashlib.sha256(f"{salt}{i}".encode()).hexdigest() for i in range(n)]


@pytest.mark.parametrize(("rows", "share"), [(10, 0.3), (200, 0.3), (400, 0.2), (600, 0.1), (90000, 0.1)])
def test_the_tests_share_falls_from_30_to_10_percent(rows, share):
    assert share_of_test(rows) == pytest.approx(share)


@settings(deadline=None)
@given(st.integers(9, 700), st.text(max_size=4))
def test_parts_are_whole_and_none_is_empty(n, salt):
    parts = split(keys(n, salt))
    assert sorted((*parts.train, *parts.validation, *parts.test)) == list(range(n))
    assert min(map(len, (parts.train, parts.validation, parts.test))) >= 3


def test_a_rows_place_does_not_depend_on_the_order():
    names = keys(300)
    one, other = split(names), split(names[::-1])
    assert {names[i] for i in one.test} == {names[::-1][i] for i in other.test}


@given(st.integers(60, 400), st.integers(0, 300))
@settings(deadline=None)
def test_no_row_that_was_trained_on_tests_when_the_set_grows(n, more):
    names = keys(n + more)
    before, after = split(names[:n]), split(names)
    assert not {names[i] for i in before.train} & {names[i] for i in after.test}


def test_the_parts_of_a_real_size_are_about_their_shares():
    parts = split(keys(503))
    assert 55 <= len(parts.test) <= 95
    assert 15 <= len(parts.validation) <= 40


@pytest.mark.parametrize("rows", [10, 50, 99, 150])
def test_with_the_missing_rows_the_test_is_large_enough(rows):
    n = rows + rows_missing(rows, tested=3, fewest=30)
    assert n * share_of_test(n) >= 30
    assert rows_missing(rows, tested=30, fewest=30) == 0
