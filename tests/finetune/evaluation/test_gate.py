"""The gate says yes to what is better about these questions, and no, each with its reason, to all else."""

from __future__ import annotations

import numpy as np
import pytest

from finetune.evaluation.gate import WORST_ROWS, Health, Scores, forgotten, judge

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


def test_a_lift_that_is_sure_but_next_to_nothing_does_not_pass() -> None:
    """As measured: who learns from shuffled answers that the question does not matter has hardly any variance left."""
    candidate = scores(1, loss=-1.2, lift=0.0135, noise=0.01)
    champion = scores(101, loss=0, lift=0.011, noise=0.3)
    assert verdict(candidate, champion) == "style_only"
    assert verdict(scores(1, loss=-1.2, lift=0.06, noise=0.01), champion) == "passed"


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


@pytest.mark.slow
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


def test_what_the_base_could_do_must_not_be_lost() -> None:
    for health, expected in [
        (Health(0.02, 0.05, "code", 0.2, 1, 0, 16), "passed"),
        (Health(0.02, 0.0501, "code", 0.1, 0, 0, 16), "forgets"),
        (Health(-0.1, -0.05, "code", 0.201, 0, 0, 16), "forgets"),
        (Health(float("nan"), float("nan"), "", float("nan"), 0, 0, 16), "forgets"),
        (Health(-0.3, -0.2, "code", 0.0, 2, 0, 16), "unsound"),
        (Health(-0.3, -0.2, "code", 0.0, 5, 4, 16), "passed"),
        (Health(), "passed"),
    ]:
        good, bad = scores(1, loss=-0.5, lift=0.5), scores(101, loss=0, lift=0.4)
        found = judge(good, bad, TOKENS, champion_label="base", seed=0, health=health)
        assert found.verdict == expected
        assert (found.asked, found.unsound) == (health.asked, health.unsound)
        worse = judge(bad, good, TOKENS, champion_label="base", seed=0, health=health)
        assert worse.verdict == "no_better"


def test_one_skill_that_is_lost_shows_though_the_others_gain() -> None:
    skills = [name for name in ("facts", "code", "advice") for _ in range(8)]
    base = [30.0] * 24
    after = [27.0] * 8 + [36.0] * 8 + [27.0] * 8
    change, high, skill, worst = forgotten(after, base, [10] * 24, skills, seed=0)
    assert change == pytest.approx(0.0)
    assert high > 0.05
    assert (skill, worst) == ("code", pytest.approx(0.6))


def test_a_change_that_only_chance_hides_is_not_called_as_good_as_before() -> None:
    """The same mean on few and uneven answers as on many even ones: only the latter is sure to be within the bound."""
    even = forgotten([10.3] * 64, [10.0] * 64, [10] * 64, ["facts"] * 64, seed=0)
    uneven = forgotten([10.0, 12.4] * 4, [11.0, 10.8] * 4, [10] * 8, ["facts"] * 8, seed=0)
    assert even[0] == pytest.approx(uneven[0]) == pytest.approx(0.03)
    assert even[1] == pytest.approx(0.03)
    assert uneven[1] > 0.05


def test_the_worst_rows_are_those_that_the_champion_knows_better_worst_first() -> None:
    before = [2.0 * n for n in TOKENS]
    after = [(2.0 + change) * n for change, n in zip([(n % 40) / 10 - 2 for n in range(80)], TOKENS, strict=True)]
    found = judge(
        Scores(after, after), Scores(before, before), TOKENS, champion_label="base", seed=0,
        lines=list(range(1, 81)),
    )  # fmt: skip
    assert len(found.worst) == WORST_ROWS
    assert found.worst[0] == (40, 2.0, 3.9)
    assert [after - before for _, before, after in found.worst] == sorted(
        (after - before for _, before, after in found.worst), reverse=True
    )
    better = judge(Scores(before, before), Scores(after, after), TOKENS, champion_label="base", seed=0, lines=range(80))
    assert all(after > before for _, before, after in better.worst)
    assert judge(Scores(before, before), Scores(before, before), TOKENS, champion_label="base", seed=0).worst == ()
