"""Intervals hold what they promise: found by simulation, and against scipy where it knows the case."""

import numpy as np
import pytest
from scipy import stats

from lora_lite.lab import estimates
from lora_lite.lab.findings import Interval

SEEDS, ITEMS = 3, 60


def simulate(rng: np.random.Generator, seed_sd: float, item_sd: float, rest_sd: float) -> np.ndarray:
    """Scores whose true mean is 0."""
    return (
        rng.normal(0, seed_sd, (SEEDS, 1)) + rng.normal(0, item_sd, (1, ITEMS)) + rng.normal(0, rest_sd, (SEEDS, ITEMS))
    )


@pytest.mark.parametrize(
    ("seed_sd", "item_sd"), [(0.0, 1.0), (0.1, 1.0), (0.3, 1.0), (1.0, 0.3), (0.05, 0.0)], ids=lambda sd: f"{sd:g}"
)
def test_the_crossed_interval_covers_the_truth_95_times_of_100(seed_sd: float, item_sd: float) -> None:
    rng = np.random.default_rng(0)
    trials = 600
    hits = sum(
        not estimates.crossed(simulate(rng, seed_sd, item_sd, 0.5)).interval.excludes(0.0) for _ in range(trials)
    )
    assert hits / trials > 0.95 - 2.5 * np.sqrt(0.95 * 0.05 / trials)  # 2.5 standard errors of this simulation


def test_ignoring_seeds_would_cover_far_less() -> None:
    rng = np.random.default_rng(1)
    tables = [simulate(rng, 0.5, 1.0, 0.5) for _ in range(300)]
    naive = [stats.t.interval(0.95, t.size - 1, t.mean(), stats.sem(t, axis=None)) for t in tables]
    assert np.mean([low <= 0 <= high for low, high in naive]) < 0.6
    assert np.mean([not estimates.crossed(t).interval.excludes(0.0) for t in tables]) > 0.92


def test_one_seed_gives_the_t_interval_over_items() -> None:
    scores = np.random.default_rng(2).normal(size=(1, 40))
    low, high = stats.t.interval(0.95, 39, scores.mean(), stats.sem(scores[0]))
    found = estimates.crossed(scores).interval
    assert (found.low, found.high) == pytest.approx((low, high), rel=1e-12)
    assert estimates.crossed(scores).p == pytest.approx(stats.ttest_1samp(scores[0], 0).pvalue, rel=1e-12)


def test_a_loss_has_the_t_interval_over_seeds_and_is_never_below_0() -> None:
    values = [1.0, 1.2, 0.7]
    low, high = stats.t.interval(0.95, 2, np.mean(values), stats.sem(values))
    found = estimates.loss(values)
    assert (found.low, found.high) == pytest.approx((low, high), rel=1e-12)
    assert estimates.loss([0.1, 9.0, 0.1]).low == 0.0
    assert estimates.loss([1.0]) == Interval(1.0, 0.0, np.inf)  # of one seed nobody knows how far another would be


def test_values_that_agree_are_no_certainty() -> None:
    assert estimates.of_items(np.ones((1, 1))).p == 1.0
    assert estimates.of_items(np.ones((1, 3))).p > 0.05
    assert estimates.of_items(np.ones((2, 3))).p > 0.05
    assert estimates.of_items(np.ones((3, 100))).p < 1e-6
    alike = estimates.paired(np.zeros((3, 100)))  # no item of 100 differs: as many as 2 may
    assert alike.mean == 0.0 and alike.high == -alike.low == pytest.approx(0.02, abs=0.001)


def test_accuracy_of_nothing_right_is_not_surely_nothing() -> None:
    found = estimates.accuracy(np.zeros((3, 50)))
    expected = stats.binomtest(0, 50).proportion_ci(method="wilson")
    assert (found.mean, found.low, found.high) == pytest.approx((0.0, expected.low, expected.high), abs=1e-12)
    full = estimates.accuracy(np.ones((3, 50)))
    assert full.high == 1.0 and full.low == pytest.approx(1 - found.high, rel=1e-12)


def test_paired_comparison_finds_what_unpaired_intervals_hide() -> None:
    rng = np.random.default_rng(3)
    hard = rng.random(80) < 0.5  # half of the items are out of reach for both
    one = np.stack([np.where(hard, 0.0, 1.0)] * 3)
    other = one.copy()
    other[:, np.flatnonzero(~hard)[:8]] = 0.0
    assert estimates.accuracy(one).low < estimates.accuracy(other).high
    difference = estimates.paired(one - other)
    assert difference.mean == pytest.approx(0.1) and difference.excludes(0.0)
    assert not estimates.paired(one - one).excludes(0.0)


def test_a_difference_of_one_lucky_seed_is_a_tie() -> None:
    differences = np.zeros((3, 100))
    differences[0] = np.random.default_rng(4).random(100) < 0.3
    assert not estimates.paired(differences).excludes(0.0)


def test_holm_against_the_worked_form() -> None:
    assert estimates.holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "c": 0.06, "b": 0.06})


def test_places_never_separate_ties() -> None:
    rng = np.random.default_rng(5)

    def arm(share: float) -> dict[int, np.ndarray]:
        return {seed: (rng.random(120) < share).astype(float) for seed in (1, 2, 3)}

    found = estimates.places({"strong": arm(0.9), "alike": arm(0.9), "weak": arm(0.2), "alone": {9: np.ones(120)}})
    assert found["strong"] == found["alike"] == (1, 3)  # "alone" shares no seed with them: it may be anywhere
    assert found["weak"] == (3, 4) and found["alone"] == (1, 4)


def test_places_need_two_seeds_in_common_and_count_arms_to_come() -> None:
    rng = np.random.default_rng(7)
    strong = {seed: (rng.random(100) < 0.9).astype(float) for seed in (1, 2, 3)}
    weak = {seed: (rng.random(100) < 0.1).astype(float) for seed in (1, 2, 3)}
    assert estimates.places({"strong": strong, "weak": weak, "to come": {}}) == {
        "strong": (1, 2), "weak": (2, 3), "to come": (1, 3),
    }  # fmt: skip
    one_seed = {"strong": {1: strong[1]}, "weak": weak}
    assert set(estimates.places(one_seed).values()) == {(1, 2)}


def test_twenty_equal_arms_are_all_ties() -> None:
    rng = np.random.default_rng(6)
    tables = {f"arm {n}": {s: (rng.random(100) < 0.5).astype(float) for s in (1, 2, 3)} for n in range(20)}
    assert set(estimates.places(tables).values()) == {(1, 20)}
