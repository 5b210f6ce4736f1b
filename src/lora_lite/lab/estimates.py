"""How sure is a number? Intervals over seeds and items, paired comparisons, and ties.

A study measures S seeds of an arm on the same I items, so scores form an S x I table, whose rows and columns are both
random: another seed would give another row, another item another column. The mean's variance is that of the crossed
random-effects model (Searle, Casella and McCulloch, "Variance Components", 1992, chapter 5): with the mean squares of
seeds, items and the rest,

    Var(mean) = (MS_seeds + MS_items - MS_rest) / (S I),        degrees of freedom by Satterthwaite (1946).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from lora_lite.lab.findings import Interval

LEVEL = 0.95
RESAMPLES = 4000


@dataclass(frozen=True)
class Spread:
    """A mean with its standard error and the degrees of freedom of that."""

    mean: float
    error: float
    freedom: float

    @property
    def interval(self) -> Interval:
        """The 95% interval; of no width where nothing varies, and without end where nothing can be said (one value)."""
        if self.error == 0:
            return Interval(self.mean, self.mean, self.mean)
        reach = float(stats.t.ppf((1 + LEVEL) / 2, self.freedom)) * self.error if self.freedom > 0 else math.inf
        return Interval(self.mean, self.mean - reach, self.mean + reach)

    @property
    def p(self) -> float:
        """Two-sided p-value of the mean being 0."""
        if self.error == 0:
            return 1.0 if self.mean == 0 else 0.0
        return float(2 * stats.t.sf(abs(self.mean) / self.error, self.freedom)) if self.freedom > 0 else 1.0


def crossed(scores: np.ndarray) -> Spread:
    """Mean over a table of seeds x items (S, I), with an error that covers both.

    With one seed the error covers items alone; with one item, seeds alone; of a single value it is infinite.
    """
    seeds, items = scores.shape
    mean = float(scores.mean())
    if scores.size == 1:
        return Spread(mean, math.inf, 0)
    by_seed, by_item = scores.mean(axis=1), scores.mean(axis=0)
    rest = scores - by_seed[:, None] - by_item[None, :] + mean
    squares = {
        "seeds": (items * float(((by_seed - mean) ** 2).sum()), seeds - 1),
        "items": (seeds * float(((by_item - mean) ** 2).sum()), items - 1),
        "rest": (float((rest**2).sum()), (seeds - 1) * (items - 1)),
    }
    mean_squares = {key: total / freedom if freedom else 0.0 for key, (total, freedom) in squares.items()}
    combined = mean_squares["seeds"] + mean_squares["items"] - mean_squares["rest"]
    # The difference of mean squares can come out below either part by chance; a variance cannot.
    parts = {key: mean_squares[key] for key in ("seeds", "items")}
    if combined < max(parts.values()):
        largest = max(parts, key=parts.__getitem__)
        return Spread(mean, math.sqrt(parts[largest] / (seeds * items)), squares[largest][1])
    freedom = sum(mean_squares[key] ** 2 / df for key, (_, df) in squares.items() if df)
    freedom = combined**2 / freedom if freedom else 0.0
    return Spread(mean, math.sqrt(combined / (seeds * items)), freedom)


def of_items(differences: np.ndarray) -> Spread:
    """`crossed` for differences of 0/1 scores (S, I), with an error of at least 1 / I: what one item that stands out
    would give. Three items that agree are no certainty."""
    spread, items = crossed(differences), differences.shape[1]
    if spread.error >= 1 / items:
        return spread
    return Spread(spread.mean, 1 / items, spread.freedom or items - 1)


def accuracy(correct: np.ndarray) -> Interval:
    """Mean of 0/1 scores (S, I) with its interval, which is kept in [0, 1] and never narrower than Wilson's for the
    items alone: no item right of 100 does not mean that none ever will be."""
    spread = crossed(correct).interval
    low, high = wilson(spread.mean, correct.shape[1])
    return Interval(spread.mean, max(0.0, min(spread.low, low)), min(1.0, max(spread.high, high)))


def wilson(share: float, n: int) -> tuple[float, float]:
    """Wilson's score interval for a share of n (Wilson 1927)."""
    z = float(stats.norm.ppf((1 + LEVEL) / 2))
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    reach = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return centre - reach, centre + reach


def loss(values: Sequence[float]) -> Interval:
    """Mean of a loss over seeds, with the t interval, kept at 0 or above; without end for one seed."""
    found = crossed(np.asarray(values, dtype=float)[:, None]).interval
    return Interval(found.mean, max(0.0, found.low), found.high)


def paired(differences: np.ndarray, seed: int = 0) -> Interval:
    """The mean of paired differences (S, I) of two arms on the same seeds and items, with its interval.

    The wider, at each end, of two: the percentile bootstrap over items within seeds (each resample of the items serves
    all seeds, for the items are the same), which assumes no distribution but says nothing of other seeds; and that of
    `of_items`, which covers seeds.
    """
    rng = np.random.default_rng(seed)
    items = differences.shape[1]
    by_item = differences.mean(axis=0)
    means = by_item[rng.integers(items, size=(RESAMPLES, items))].mean(axis=1)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    both = of_items(differences).interval
    return Interval(both.mean, min(float(low), both.low), max(float(high), both.high))


def holm(ps: Mapping[str, float]) -> dict[str, float]:
    """p-values adjusted for their number (Holm 1979)."""
    adjusted: dict[str, float] = {}
    largest = 0.0
    for rank, key in enumerate(sorted(ps, key=ps.__getitem__)):
        largest = max(largest, min(1.0, (len(ps) - rank) * ps[key]))
        adjusted[key] = largest
    return adjusted


def places(tables: Mapping[str, Mapping[int, np.ndarray]]) -> dict[str, tuple[int, int]]:
    """The best and the worst place of each arm that the data allow.

    tables: arm -> seed -> scores (I,) on the same items; no seeds: not measured yet, so that it may take any place.
    Every pair that is `comparable` is compared on the seeds that both have, adjusted for the number of pairs; an arm's
    place is 1 + the number of those surely better, up to the number of arms - those surely worse.
    """
    names = list(tables)
    spreads = {
        (one, other): of_items(shared(tables[one], tables[other]))
        for index, one in enumerate(names)
        for other in names[index + 1 :]
        if comparable(tables[one], tables[other])
    }
    adjusted = holm({"\n".join(pair): spread.p for pair, spread in spreads.items()})
    better, worse = dict.fromkeys(names, 0), dict.fromkeys(names, 0)
    for (one, other), spread in spreads.items():
        if adjusted[f"{one}\n{other}"] < 1 - LEVEL:
            first, second = (one, other) if spread.mean > 0 else (other, one)
            worse[first] += 1
            better[second] += 1
    return {name: (1 + better[name], len(names) - worse[name]) for name in names}


def comparable(one: Mapping[int, np.ndarray], other: Mapping[int, np.ndarray]) -> bool:
    """Whether two arms have two seeds in common: of one seed's difference nobody knows how far another would be."""
    return len(one.keys() & other.keys()) >= 2


def shared(one: Mapping[int, np.ndarray], other: Mapping[int, np.ndarray]) -> np.ndarray:
    """Differences (S, I) of two arms on the seeds that both have."""
    return np.stack([one[seed] - other[seed] for seed in sorted(one.keys() & other.keys())])
