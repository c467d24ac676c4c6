"""The gate says yes to what is better about these questions, and no, each with its reason, to all else."""

from __future__ import annotations

import numpy as np
import pytest

from finetune.gate import Health, Scores, judge

TOKENS = [20 + n % 30 for n in range(80)]


def scores(seed: int, *, loss: float, lift: float, rows: int = 80, noise: float = 0.3) -> Scores:
    """Rows differ by a lot (shared by all models), models by `loss` and `lift` per token and some noise."""
    shared = np.random.default_rng(0).normal(0, 1, size=len(TOKENS))[:rows]
    chance = np.random.default_rng(seed)
    tokens = np.asarray(TOKENS[:rows])
    own = (3.0 + shared + loss + chance.normal(0, noise, rows)) * tokens
    return Scores(list(own), list(own + (lift + chance.normal(0, noise, rows)) * tokens))


def verdict(candidate: Scores, champion: Scores, rows: int = 80) -> str:
    return judge(candidate, champion, TOKENS[:rows], champion_label="base", seed=0).verdict


@pytest.mark.parametrize("seed", range(1, 6))
def test_better_about_these_questions_passes(seed: int) -> None:
    assert verdict(scores(seed, loss=-0.5, lift=0.5), scores(seed + 100, loss=0, lift=0.4)) == "passed"


@pytest.mark.parametrize("seed", range(1, 6))
def test_answers_that_belong_to_other_questions_do_not_pass_however_the_loss_falls(seed: int) -> None:
    assert verdict(scores(seed, loss=-1.5, lift=0.0), scores(seed + 100, loss=0, lift=0.0)) == "style_only"


@pytest.mark.parametrize("seed", range(1, 6))
def test_a_lift_that_was_there_before_must_not_be_lost(seed: int) -> None:
    assert verdict(scores(seed, loss=-0.5, lift=0.2), scores(seed + 100, loss=0, lift=0.6)) == "style_only"


@pytest.mark.parametrize("seed", range(1, 6))
@pytest.mark.parametrize("loss", [0.0, 0.3])
def test_as_good_as_before_or_worse_is_not_better(seed: int, loss: float) -> None:
    assert verdict(scores(seed, loss=loss, lift=0.5), scores(seed, loss=0, lift=0.5)) == "no_better"


def test_twenty_rows_are_too_few_however_good_they_look() -> None:
    good, bad = scores(1, loss=-2, lift=1, rows=20), scores(2, loss=0, lift=0, rows=20)
    assert verdict(good, bad, rows=20) == "too_few"


def test_pairing_sees_a_small_gain_behind_large_differences_between_rows() -> None:
    found = judge(
        scores(1, loss=-0.1, lift=0.5, noise=0.05), scores(2, loss=0, lift=0.5, noise=0.05), TOKENS,
        champion_label="acme@3", seed=0,
    )  # fmt: skip
    assert found.verdict == "passed"
    assert found.high < 0 < found.loss_champion - found.loss < 0.15
    assert found.champion == "acme@3"


def test_means_are_per_token_and_the_same_seed_says_the_same() -> None:
    candidate, champion = scores(1, loss=-0.5, lift=0.5), scores(2, loss=0, lift=0.4)
    found = judge(candidate, champion, TOKENS, champion_label="base", seed=3)
    assert found.loss == pytest.approx(sum(candidate.own) / sum(TOKENS))
    assert found.lift == pytest.approx((sum(candidate.other) - sum(candidate.own)) / sum(TOKENS))
    assert found.low < found.loss - found.loss_champion < found.high
    assert judge(candidate, champion, TOKENS, champion_label="base", seed=3) == found


def test_the_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    """200 sets drawn with no difference between the models: at most a few look better by chance."""
    wrong = 0
    for seed in range(200):
        chance = np.random.default_rng(seed)
        before = chance.normal(3, 1, 80) * TOKENS
        after = before + chance.normal(0, 0.5, 80) * TOKENS
        own, other = list(after), list(after + np.asarray(TOKENS))
        wrong += verdict(Scores(own, other), Scores(list(before), list(before + np.asarray(TOKENS)))) == "passed"
    assert wrong <= 12  # 2.5% are expected on this side; 12 of 200 would be a chance of one in a thousand


@pytest.mark.parametrize(
    ("health", "expected"),
    [
        (Health(0.05, 1, 0, 16), "passed"),
        (Health(0.0501, 0, 0, 16), "forgets"),
        (Health(float("nan"), 0, 0, 16), "forgets"),
        (Health(-0.3, 2, 0, 16), "unsound"),
        (Health(-0.3, 5, 4, 16), "passed"),
        (Health(), "passed"),
    ],
)
def test_what_the_base_could_do_must_not_be_lost(health: Health, expected: str) -> None:
    good, bad = scores(1, loss=-0.5, lift=0.5), scores(101, loss=0, lift=0.4)
    found = judge(good, bad, TOKENS, champion_label="base", seed=0, health=health)
    assert found.verdict == expected
    assert (found.asked, found.unsound) == (health.asked, health.unsound)
    worse = judge(bad, good, TOKENS, champion_label="base", seed=0, health=health)
    assert worse.verdict == "no_better"
