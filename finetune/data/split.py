"""Splits rows into train, validation and test by the hash of their text.

A row's part depends on its hash and the number of rows, never on their order. The test set holds the smallest hashes
and its share only shrinks as a data set grows, so between versions of a data set a row moves at most from test to
train. Near duplicates share a hash prefix and so a part. With fewer than some 20 rows the minimum sizes decide.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count

SMALL, LARGE = 200, 600  # rows
SHARE_SMALL, SHARE_LARGE = 0.30, 0.10  # of the test
VALIDATION = 0.05
FEWEST = 3  # rows in test and in validation at least


@dataclass(frozen=True, slots=True)
class Split:
    """Row numbers."""

    train: tuple[int, ...]
    validation: tuple[int, ...]
    test: tuple[int, ...]


def share_of_test(rows: int) -> float:
    """30% below 200 rows, falling linearly to 10% at 600."""
    way = min(1.0, max(0.0, (rows - SMALL) / (LARGE - SMALL)))
    return SHARE_SMALL + way * (SHARE_LARGE - SHARE_SMALL)


def rows_missing(rows: int, tested: int, fewest: int) -> int:
    """About how many more rows the data set needs for `fewest` test rows."""
    if tested >= fewest:
        return 0
    enough = next(n for n in count(rows + 1) if n * share_of_test(n) >= fewest)
    return max(enough - rows, fewest - tested)


def split(keys: Sequence[str]) -> Split:
    """`keys` are distinct hexadecimal hashes. Raises ValueError for too few rows."""
    if len(keys) < 3 * FEWEST:
        raise ValueError(f"{len(keys)} rows cannot be split: at least {3 * FEWEST} are needed")
    place = [int(key[:16], 16) / 16**16 for key in keys]  # [0, 1)
    order = sorted(range(len(keys)), key=lambda row: keys[row])
    share = share_of_test(len(keys))
    n_test = max(FEWEST, sum(at < share for at in place))
    n_validation = max(FEWEST, sum(at >= 1 - VALIDATION for at in place))
    n_test = min(n_test, len(keys) - n_validation - FEWEST)
    return Split(
        train=tuple(sorted(order[n_test : len(order) - n_validation])),
        validation=tuple(sorted(order[len(order) - n_validation :])),
        test=tuple(sorted(order[:n_test])),
    )
