"""The gate: is the candidate better than the champion, and is the gain about the questions? Statistics only, no model.

Rows are paired: candidate and champion score the same answers. Intervals come from a bootstrap over rows, because rows
differ more than models do (Miller 2024, arXiv 2411.00640). *Lift* is the loss of an answer under another row's question
minus its loss under its own: a model that learned only the style gains loss but no lift.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from core.jobs.protocol import FEWEST_TEST_ROWS, Judged, Verdict, Worse, forgets

WORST_ROWS = 10
LEAST_LIFT = 0.05  # nats per token; shuffled data sets gave 0.002 to 0.025
_MORE_UNSOUND = 1  # allowed by chance
_SAMPLES = 10_000
_AT_ONCE = 2**22  # indices drawn at a time, bounding memory
Sums = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Scores:
    """Summed loss of each test row's answer under its own question and under another row's."""

    own: Sequence[float]
    other: Sequence[float]


@dataclass(frozen=True, slots=True)
class Health:
    """Retention and soundness. `ability`: rise in loss (nats per token) on the base model's own greedy answers.

    The other fields are those of core.jobs.protocol.Judged."""

    ability: float | None = None
    ability_high: float = 0.0
    skill: str = ""
    skill_change: float = 0.0
    unsound: int = 0
    unsound_base: int = 0
    asked: int = 0

    @property
    def verdict(self) -> Verdict:
        if self.ability is not None and forgets(self.ability_high, self.skill_change):
            return "forgets"
        return "unsound" if self.unsound > self.unsound_base + _MORE_UNSOUND else "passed"


def judge(
    candidate: Scores,
    champion: Scores,
    tokens: Sequence[int],
    *,
    champion_label: str,
    seed: int,
    health: Health | None = None,
    lines: Sequence[int] = (),
) -> Judged:
    """Losses and lifts are nats per token. `tokens`: tokens in the loss per row; `lines`: line of each row."""
    health = health or Health()
    n = np.asarray(tokens, dtype=np.float64)
    own, own_before = np.asarray(candidate.own), np.asarray(champion.own)
    lift, lift_before = np.asarray(candidate.other) - own, np.asarray(champion.other) - own_before
    low, high = _interval(own - own_before, n, seed)
    lift_low, _ = _interval(lift, n, seed)
    _, gained_high = _interval(lift - lift_before, n, seed)
    return Judged(
        verdict=_verdict(len(n), high, lift_low, gained_high, health),
        rows=len(n),
        better=int((own < own_before).sum()),
        champion=champion_label,
        loss_champion=float(own_before.sum() / n.sum()),
        loss=float(own.sum() / n.sum()),
        low=low,
        high=high,
        lift_champion=float(lift_before.sum() / n.sum()),
        lift=float(lift.sum() / n.sum()),
        worst=_worst(own / n, own_before / n, lines),
        **asdict(health),
    )


def forgotten(
    candidate: Sequence[float], base: Sequence[float], tokens: Sequence[int], skills: Sequence[str], *, seed: int
) -> tuple[float, float, str, float]:
    """Rise in loss on the base model's own answers, nats per token: (mean, 97.5% upper bound, worst skill, its rise).

    The bootstrap resamples answers, since the tokens of one answer are not independent.
    """
    n, change = np.asarray(tokens, dtype=np.float64), np.asarray(candidate) - np.asarray(base)
    _, high = _interval(change, n, seed)
    names = np.asarray(skills)
    by_skill = {
        str(name): float(change[names == name].sum() / n[names == name].sum()) for name in dict.fromkeys(skills)
    }
    worst = max(by_skill, key=lambda name: by_skill[name])
    return float(change.sum() / n.sum()), high, worst, by_skill[worst]


def _worst(own: Sums, before: Sums, lines: Sequence[int]) -> tuple[Worse, ...]:
    """The rows with the largest rise in loss per token against the champion."""
    order = np.argsort(before - own, kind="stable")[:WORST_ROWS]
    return tuple((lines[at], round(before[at], 4), round(own[at], 4)) for at in order if lines and own[at] > before[at])


def _verdict(rows: int, high: float, lift_low: float, gained_high: float, health: Health) -> Verdict:
    if rows < FEWEST_TEST_ROWS:
        return "too_few"
    if high >= 0:
        return "no_better"
    return "style_only" if lift_low <= LEAST_LIFT or gained_high < 0 else health.verdict


def _interval(sums: Sums, tokens: Sums, seed: int) -> tuple[float, float]:
    """95% bootstrap interval of the mean per token."""
    chance = np.random.default_rng(seed)
    n = len(sums)
    drawn = []
    left = _SAMPLES
    while left:
        some = min(left, max(1, _AT_ONCE // n))
        rows = chance.integers(0, n, size=(some, n))
        drawn.append(sums[rows].sum(axis=1) / tokens[rows].sum(axis=1))
        left -= some
    low, high = np.quantile(np.concatenate(drawn), (0.025, 0.975))
    return float(low), float(high)
