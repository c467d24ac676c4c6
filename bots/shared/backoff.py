"""Pauses between attempts to reach a platform."""

from collections.abc import Iterator
from itertools import chain, repeat

PAUSES_S = (1.0, 2.0, 5.0, 10.0, 15.0)


def pauses() -> Iterator[float]:
    """Seconds before each next attempt; the last one repeats without an end."""
    return chain(PAUSES_S, repeat(PAUSES_S[-1]))
