"""Intervals and verdicts hold what they promise: by simulation with effects of seeds and items, and against scipy."""

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

import verdicts
from lora_lite.lab.findings import estimates
from lora_lite.lab.findings.estimates import Errors, Table
from lora_lite.lab.findings.moderated import PRIOR_FREEDOM, draw_variances, log_density, moderated
from lora_lite.lab.numerals import Interval


def within(figure: dict[str, float], low: float, high: float) -> bool:
    """Whether a figure in percent lies between, give or take two and a half of its Monte-Carlo errors."""
    return low - 2.5 * figure["error"] <= figure["percent"] <= high + 2.5 * figure["error"]


def arms(rng: np.random.Generator, *shares: float, seeds: int = 3, items: int = 120) -> dict[str, Table]:
    """Arms "0", "1", ... without an effect of seeds."""
    return {
        str(at): {seed: (rng.random(items) < share).astype(float) for seed in range(seeds)}
        for at, share in enumerate(shares)
    }


def null(condition: verdicts.Condition, studies: int = 25, seed: int = 0) -> dict[str, dict[str, float]]:
    return verdicts.measure(condition, functools.partial(verdicts.judged, draws=1500), seed, studies)


@pytest.mark.parametrize(("arms", "seeds", "spread"), [(17, 3, 8.4), (5, 2, 16.0), (5, 3, 0.0)])
def test_equal_arms_whose_seeds_differ_are_ties(arms: int, seeds: int, spread: float) -> None:
    found = null(verdicts.Condition(arms, seeds, 40, (spread,)))
    assert within(found["wrong verdict"], 0, 5) and within(found["pair separated"], 0, 5)
    assert within(found["alone covers"], 94, 100) and within(found["all joint cover"], 95, 100)


@pytest.mark.slow
@pytest.mark.parametrize("arms", [5, 17])
@pytest.mark.parametrize(("seeds", "spread", "base"), [(2, 8.4, 40), (3, 16.0, 60), (3, 8.4, 5), (10, 8.4, 40)])
def test_few_false_verdicts_at_any_spread(arms: int, seeds: int, spread: float, base: float) -> None:
    found = null(verdicts.Condition(arms, seeds, base, (spread,)), 80)
    assert within(found["wrong verdict"], 0, 5) and within(found["pair separated"], 0, 5)
    assert within(found["alone covers"], 94, 100)


def test_a_large_difference_is_found_as_often_as_by_the_pooled_form() -> None:
    """30 points among 16 comparisons: the plain pooled t-test, which ignores items, finds them 83 times of 100."""
    condition = verdicts.Condition(17, 3, 35, (8.4,), better=30)
    found, plain = null(condition, 120), verdicts.measure(condition, verdicts.pooled, 0, 120)
    assert within(found["found"], 83, 100) and found["found"]["percent"] >= plain["found"]["percent"] - 2.5
    assert within(found["wrong verdict"], 0, 5)


def promised(line: dict[str, Any]) -> bool:
    """Whether a line of the simulation is one for which the promise is made: arms whose seeds spread alike."""
    return len(line["spread"]) == 1 and not isinstance(line["base"], list)


def test_the_committed_simulation_keeps_the_promise() -> None:
    lines = json.loads((Path(__file__).parents[3] / "results" / "verdicts.json").read_text())["lines"]
    assert len(lines) == len(verdicts.CONDITIONS) and sum(map(promised, lines)) > 20
    for line in filter(promised, lines):
        found, plain = line["found"]["after"], line["found"]["pooled t, Dunnett"]
        assert found["studies"] >= 1000 and found["wrong verdict"]["error"] <= 0.8
        assert within(found["wrong verdict"], 0, 5) and within(found["alone covers"], 95, 100), line
        if line["better"]:
            assert found["found"]["percent"] >= max(83, plain["found"]["percent"]), line
    wrong = [line["found"]["after"]["wrong verdict"]["percent"] for line in filter(promised, lines)]
    assert np.mean(wrong) <= 5


def test_three_seeds_that_agree_by_chance_decide_nothing() -> None:
    """The seeds of one arm agree, those of the others lie 10 points apart: its error is not that of the items alone."""
    rng = np.random.default_rng(0)
    levels = {"0": (0.4, 0.55, 0.6), "1": (0.36, 0.36, 0.36), "2": (0.3, 0.5, 0.45), "3": (0.55, 0.35, 0.5)}
    tables = {
        name: {seed: np.sort(rng.permutation(128) < 128 * share).astype(float) for seed, share in enumerate(row)}
        for name, row in levels.items()
    }
    found = Errors(tables).against("0")["1"]
    assert not found.decided and found.joint.low < 0 < found.joint.high
    assert found.joint.low <= found.alone.low < found.joint.mean < found.alone.high <= found.joint.high


def test_where_spreads_agree_it_is_the_pooled_form() -> None:
    """With d0 = infinity: Smyth's variance is the pooled one; against scipy's Dunnett and t-test with like spreads."""
    rng = np.random.default_rng(1)
    variances, freedom = np.full(12, 4.0), np.full(12, 9.0)
    assert moderated(variances, freedom, np.array(1e9), np.array(2.0)) == pytest.approx(2.0, rel=1e-6)
    assert moderated(variances, freedom, np.array(3.0), np.array(2.0)) == pytest.approx((3 * 2 + 9 * 4) / 12)
    drawn = draw_variances(variances, freedom, 4000, rng)
    assert 3.8 < np.median(drawn) < 4.2 and drawn.std() < 0.8  # alone, 9 degrees of freedom leave sd = 2.4
    items, spread = 4000, 0.1  # so many items that chance in them is small
    share = 0.5 + spread * np.tile([-1.0, 0.0, 1.0], (6, 1)) + np.array([[0.3], [0], [0.05], [0.1], [-0.1], [0]])
    tables = {
        str(at): {seed: (np.arange(items) < items * each).astype(float) for seed, each in enumerate(row)}
        for at, row in enumerate(share)
    }
    for table in tables.values():
        for scores in table.values():
            rng.shuffle(scores)
    found = Errors(tables).against("1")
    expected = stats.dunnett(*np.delete(share, 1, axis=0), control=share[1], random_state=0).pvalue
    assert [each.p for each in found.values()] == pytest.approx(expected, abs=0.03)


def test_the_density_of_variances_is_that_of_f() -> None:
    variances, freedom = np.array([0.5, 2.0, 3.0]), np.array([1.0, 2.0, 4.0])
    ours = [float(log_density(variances, freedom, np.array(d0), np.array(0.3))) for d0 in PRIOR_FREEDOM[:-1]]
    scale = np.exp(0.3)
    theirs = [stats.f.logpdf(variances / scale, freedom, d0).sum() - 3 * 0.3 for d0 in PRIOR_FREEDOM[:-1]]
    assert np.subtract(ours, theirs) == pytest.approx(np.full(len(ours), ours[0] - theirs[0]), abs=1e-9)


def test_an_arm_that_spreads_more_has_a_wider_interval() -> None:
    rng = np.random.default_rng(2)
    quiet = [(0.5, 0.51, 0.49, 0.5, 0.5)] * 7
    tables = {
        str(at): {seed: (rng.permutation(500) < 500 * share).astype(float) for seed, share in enumerate(row)}
        for at, row in enumerate([*quiet, (0.2, 0.8, 0.5, 0.3, 0.7)])
    }
    found = Errors(tables).against("0")
    widths = {name: each.alone.high - each.alone.low for name, each in found.items()}
    assert widths["7"] > 3 * widths["1"]


@pytest.mark.parametrize("share", [0.0, 0.02, 0.3, 0.97, 1.0])
def test_interval_p_and_verdict_agree_at_every_level(share: float) -> None:
    rng = np.random.default_rng(3)
    shares = np.clip(share + np.array([0, -0.3, -0.1, -0.02, 0.0, 0.03, 0.12, 0.3]), 0, 1)
    found = Errors(arms(rng, *shares)).against("0")
    for each in found.values():
        assert each.joint.excludes(0.0) == each.decided == (each.p < 0.05)
        assert each.joint.low <= each.alone.low <= each.joint.mean <= each.alone.high <= each.joint.high
        assert each.joint.low >= -1 and each.joint.high <= 1
        assert each.joint.mean == each.alone.mean
    assert any(each.decided for each in found.values())


def test_what_a_tie_would_have_seen_is_seen_80_times_of_100() -> None:
    promised = np.mean([
        Errors(verdicts.made(verdicts.Condition(5, 5, 40, (6.0,)), np.random.default_rng(seed)), 3000)
        .against("0")["1"].seen or 0.0
        for seed in range(10)
    ])  # fmt: skip
    found = null(verdicts.Condition(5, 5, 40, (6.0,), better=float(100 * promised)), 40)["found"]
    assert within(found, 75, 90)
    assert estimates.detectable(0.1, 0.3) == estimates.detectable(0.9, 0.3) == 0.3
    assert estimates.detectable(0.4, 0.7) is None


def test_a_loss_has_the_t_interval_over_seeds_and_is_never_below_0() -> None:
    values = [1.0, 1.2, 0.7]
    low, high = stats.t.interval(0.95, 2, np.mean(values), stats.sem(values))
    found = estimates.loss(values)
    assert (found.low, found.high) == pytest.approx((low, high), rel=1e-12)
    assert estimates.loss([0.1, 9.0, 0.1]).low == 0.0
    assert estimates.loss([1.0]) == Interval(1.0, 0.0, np.inf)  # of one seed nobody knows how far another would be


def test_values_that_agree_are_no_certainty() -> None:
    def p(items: int, seeds: int = 2) -> float:
        ones, zeros = ({seed: np.full(items, value) for seed in range(seeds)} for value in (1.0, 0.0))
        return Errors({"one": ones, "other": zeros}).against("other")["one"].p

    assert p(1) > 0.05 and p(3) > 0.05
    assert p(6) < 0.05 and p(100, 3) < 0.001
    alike = estimates.of_items(np.zeros((1, 100)), np.zeros((1, 100)))  # no item of 100 differs: as many as 2 may
    assert alike.mean == 0.0 and alike.high == -alike.low == pytest.approx(0.02, abs=0.001)
    assert estimates.of_items(np.ones((1, 1)), np.zeros((1, 1))) == Interval(1.0, -1.0, 1.0)


def test_accuracy_of_nothing_right_is_not_surely_nothing() -> None:
    expected = stats.binomtest(0, 50).proportion_ci(method="wilson")
    for seeds in (1, 3):
        found = estimates.accuracy(np.zeros((seeds, 50)))
        assert (found.mean, found.low) == (0.0, 0.0) and found.high >= expected.high - 1e-12
        full = estimates.accuracy(np.ones((seeds, 50)))
        assert full.high == 1.0 and full.low == pytest.approx(1 - found.high, rel=1e-9)
    assert estimates.accuracy(np.zeros((1, 50))).high == pytest.approx(expected.high, abs=1e-12)


def test_items_that_are_hard_for_all_cancel_in_differences() -> None:
    rng = np.random.default_rng(3)
    hard = rng.random(80) < 0.5  # half of the items are out of reach for both
    one = {seed: np.where(hard, 0.0, 1.0) for seed in range(3)}
    other = {seed: scores.copy() for seed, scores in one.items()}
    for scores in other.values():
        scores[np.flatnonzero(~hard)[:10]] = 0.0
    errors = Errors({"one": one, "other": other})
    assert errors.accuracy("one").low < errors.accuracy("other").high
    difference = errors.against("other")["one"]
    assert difference.joint.mean == pytest.approx(0.125) and difference.decided


def test_a_difference_of_one_lucky_seed_is_a_tie() -> None:
    tables = {"one": {seed: np.zeros(100) for seed in range(3)}, "other": {seed: np.zeros(100) for seed in range(3)}}
    tables["one"][0][:30] = 1.0
    assert not Errors(tables).against("other")["one"].decided


def test_unequal_numbers_of_seeds_are_compared() -> None:
    found = Errors({**arms(np.random.default_rng(4), 0.5, 0.5, seeds=2), "2": arms(np.random.default_rng(5), 0.1)["0"]})
    assert [each.decided for each in found.against("0").values()] == [False, True]


def test_places_never_separate_ties() -> None:
    rng = np.random.default_rng(5)
    strong, alike, weak = arms(rng, 0.9, 0.9, 0.2).values()
    found = estimates.places({"strong": strong, "alike": alike, "weak": weak, "alone": {9: np.ones(120)}})
    assert found["strong"] == found["alike"] == (1, 3)  # "alone" has one seed: it may be anywhere
    assert found["weak"] == (3, 4) and found["alone"] == (1, 4)


def test_places_need_two_seeds_and_count_arms_to_come() -> None:
    strong, weak = arms(np.random.default_rng(7), 0.9, 0.1, items=100).values()
    assert estimates.places({"strong": strong, "weak": weak, "to come": {}}) == {
        "strong": (1, 2), "weak": (2, 3), "to come": (1, 3),
    }  # fmt: skip
    one_seed = {"strong": {1: strong[1]}, "weak": weak}
    assert set(estimates.places(one_seed).values()) == {(1, 2)}
    assert estimates.places({"to come": {}, "too": {}}) == {"to come": (1, 2), "too": (1, 2)}


def test_twenty_equal_arms_are_all_ties() -> None:
    assert set(estimates.places(arms(np.random.default_rng(6), *[0.5] * 20, items=100)).values()) == {(1, 20)}
