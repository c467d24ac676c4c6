"""The split is by hash, for good."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.data.split import rows_missing, share_of_test, split


def keys(n, salt=""):
    return [hashlib.sha256(f"{salt}{i}".encode()).hexdigest() for i in range(n)]


def test_the_tests_share_falls_from_30_to_10_percent() -> None:
    for rows, share in [(10, 0.3), (200, 0.3), (400, 0.2), (600, 0.1), (90000, 0.1)]:
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


@pytest.mark.slow
@given(st.integers(40, 700), st.integers(0, 700), st.integers(0, 10**9), st.randoms(use_true_random=False))
@settings(deadline=None)
def test_over_the_versions_of_a_set_a_row_moves_at_most_from_test_to_train(n, more, salt, chance):
    """However it grows, and in whatever order its rows come: what training or stopping saw never tests."""
    names = keys(n + more, salt)
    old, grown = names[:n], list(names)
    chance.shuffle(grown)
    before, after = split(old), split(grown)
    tested_after, validated_after = {grown[i] for i in after.test}, {grown[i] for i in after.validation}
    assert not {old[i] for i in (*before.train, *before.validation)} & tested_after
    assert not {old[i] for i in before.test} & validated_after
    assert not {old[i] for i in before.train} & validated_after


@given(st.integers(60, 400), st.integers(0, 400), st.integers(0, 10**9))
@settings(deadline=None)
def test_near_doubles_that_come_later_test_only_where_the_first_one_does(n, more, salt):
    names = keys(n, salt)
    doubles = [one[:32] + other[32:] for one, other in zip(names, keys(more, f"{salt}/"), strict=False)]
    before, grown = split(names), [*names, *doubles]
    assert not {names[i][:32] for i in before.train} & {grown[i][:32] for i in split(grown).test}


@given(st.integers(9, 2000), st.integers(0, 10**9))
@settings(deadline=None)
def test_a_part_is_as_large_as_chance_makes_its_share(n, salt):
    """The place of a hash is uniform: within five standard deviations of the share."""
    tested = len(split(keys(n, salt)).test)
    share = share_of_test(n)
    assert abs(tested - n * share) <= 5 * (n * share * (1 - share)) ** 0.5 + 3


def test_the_parts_of_a_real_size_are_about_their_shares():
    parts = split(keys(503))
    assert 55 <= len(parts.test) <= 95
    assert 15 <= len(parts.validation) <= 40


def test_with_the_missing_rows_the_test_is_large_enough() -> None:
    for rows in [10, 50, 99, 150]:
        n = rows + rows_missing(rows, tested=3, fewest=30)
        assert n * share_of_test(n) >= 30
        assert rows_missing(rows, tested=30, fewest=30) == 0
