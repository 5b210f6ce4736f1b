"""How sure is a number? Intervals over seeds and items, comparisons, ties, and what a study could have seen.

A study measures some seeds of each arm on the same I items, and both are samples: another seed would give another
number, another item too. All that is said of a study comes from one model of the errors of its arms:

- The scale is the accuracy itself: there seeds of arms at 7% and at 50% lie about equally far apart.
- Seeds: each arm's variance over its seeds, moderated by those of the other arms (`moderated`).
- Items: the arms' means of each item vary and vary together; their covariance, less what chance within a seed adds to
  it, is added. What makes an item hard for all arms cancels in differences.

`Errors` draws the arms' errors many times from this model. An interval of one difference is as wide as 95% of its
draws; a joint interval is wider by the factor that makes 95% of the draws lie within *all* of the family's intervals
(Dunnett 1955 against a baseline, Tukey 1949 for all pairs, where spreads agree). Adjusted p-values and verdicts read
off the same draws, so that interval, p and verdict agree. An arm's own interval is taken to asin(sqrt(accuracy)) and
back (Anscombe 1948), so that it ends within [0, 1] and reaches further towards the middle.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from lora_lite.lab.findings.moderated import draw_variances
from lora_lite.lab.numerals import Interval

LEVEL = 0.95
POWER = 0.8
DRAWS = 20_000
FULL = math.pi / 2  # z of an accuracy of 1

Table = Mapping[int, np.ndarray]  # seed -> 0/1 scores (I,)


@dataclass(frozen=True)
class Comparison:
    """A difference of two arms' accuracies.

    Attributes:
        joint: with the interval that holds together with those of the whole family, 95 times of 100.
        alone: with its own 95% interval.
        p: of the difference being 0, adjusted for the family: below 0.05 just where `joint` excludes 0.
        seen: the smallest true difference that would have been found (p < 0.05) in 80 of 100 such studies, of those
            that the second arm's accuracy leaves room for; None if none.
    """

    joint: Interval
    alone: Interval
    p: float
    seen: float | None

    @property
    def decided(self) -> bool:
        """Whether the difference is surely not 0."""
        return self.p < 1 - LEVEL


class Errors:
    """The joint errors of arms with at least two seeds each; the others of `tables` are left out.

    tables: arm -> seed -> scores (I,), the same items throughout. draws, seed: of the simulation, which gives the same
    numbers every time.
    """

    def __init__(self, tables: Mapping[str, Table], draws: int = DRAWS, seed: int = 0) -> None:
        self.tables = {name: stack(table) for name, table in tables.items() if len(table) >= 2}
        self.index = {name: at for at, name in enumerate(self.tables)}
        if not self.tables:
            return
        scores = list(self.tables.values())
        self.items = scores[0].shape[1]
        self.means = np.array([table.mean() for table in scores])
        self.draws = self._draw(scores, draws, np.random.default_rng(seed))

    def _draw(self, scores: Sequence[np.ndarray], draws: int, rng: np.random.Generator) -> np.ndarray:
        """Errors of the accuracies, (draws, A)."""
        items, counts = self.items, np.array([len(table) for table in scores])
        step = 1 / items**2  # a whole item's worth, squared: accuracies move in such steps
        spread = np.array([table.mean(axis=1).var(ddof=1) for table in scores]) + step / 12
        seeds = rng.normal(size=(draws, len(scores))) * np.sqrt(
            draw_variances(spread, counts - 1.0, draws, rng) / counts
        )
        covariance = item_covariance(scores) / items
        covariance += np.eye(len(scores)) * step / 2  # agreement of all items is no certainty: one may stand out
        values, vectors = np.linalg.eigh(covariance)
        root = vectors * np.sqrt(np.maximum(values, 0.0))
        freedom = max(items - 1, 1)
        wide = np.sqrt(freedom / rng.chisquare(freedom, size=(draws, 1)))
        return seeds + rng.normal(size=(draws, len(scores))) @ root.T * wide

    def accuracy(self, name: str) -> Interval:
        """An arm's mean accuracy; its interval is never narrower than Wilson's for the items alone."""
        at = self.index[name]
        reach = float(np.quantile(np.abs(self.draws[:, at]), LEVEL)) * slope(self.tables[name])
        low, high = wilson(self.means[at], self.items)
        ends = [share(angle(self.means[at]) + shift) for shift in (-reach, reach)]
        return Interval(float(self.means[at]), min(ends[0], low), max(ends[1], high))

    def compare(self, pairs: Sequence[tuple[str, str]]) -> dict[tuple[str, str], Comparison]:
        """Each pair's difference, first less second, as one family."""
        if not pairs:
            return {}
        one, other = (np.array([self.index[pair[side]] for pair in pairs]) for side in (0, 1))
        errors = self.draws[:, one] - self.draws[:, other]
        reach = np.quantile(np.abs(errors), LEVEL, axis=0)
        largest = np.sort(np.max(np.abs(errors) / reach, axis=1))
        count = len(largest)
        factor = float(largest[-math.floor((1 - LEVEL) * (count + 1))])  # beyond it, and only there, p < 0.05
        typical = np.quantile(np.abs(errors), 2 * POWER - 1, axis=0)  # errors are symmetric
        comparisons = {}
        for at, pair in enumerate(pairs):
            difference = float(self.means[one[at]] - self.means[other[at]])
            tail = count - int(np.searchsorted(largest, abs(difference) / reach[at]))
            comparisons[pair] = Comparison(
                joint=around(difference, factor * reach[at]),
                alone=around(difference, reach[at]),
                p=(1 + tail) / (1 + count),
                seen=detectable(float(self.means[other[at]]), float(factor * reach[at] + typical[at])),
            )
        return comparisons

    def against(self, reference: str) -> dict[str, Comparison]:
        """Every other arm compared with one, as a family; nothing if that has no two seeds."""
        others = [name for name in self.tables if name != reference] if reference in self.tables else []
        comparisons = self.compare([(name, reference) for name in others])
        return {name: comparison for (name, _), comparison in comparisons.items()}


def places(tables: Mapping[str, Table], errors: Errors | None = None) -> dict[str, tuple[int, int]]:
    """The best and the worst place of each arm that the data allow.

    tables: as for `Errors`; an arm with fewer than two seeds may take any place. All pairs are compared as one family;
    an arm's place is 1 + the number of those surely better, up to the number of arms - those surely worse.
    """
    errors = errors or Errors(tables)
    names = list(errors.tables)
    pairs = [(one, other) for index, one in enumerate(names) for other in names[index + 1 :]]
    better, worse = dict.fromkeys(tables, 0), dict.fromkeys(tables, 0)
    for (one, other), compared in errors.compare(pairs).items():
        if compared.decided:
            first, second = (one, other) if compared.joint.mean > 0 else (other, one)
            worse[first] += 1
            better[second] += 1
    return {name: (1 + better[name], len(tables) - worse[name]) for name in tables}


def stack(table: Table) -> np.ndarray:
    """The scores (S, I) by seed."""
    return np.stack([table[seed] for seed in sorted(table)]).astype(float)


def item_covariance(scores: Sequence[np.ndarray]) -> np.ndarray:
    """Covariance (A, A) of the arms' true accuracies over items: that of their means, less the chance within seeds."""
    if scores[0].shape[1] == 1:
        return np.zeros((len(scores), len(scores)))
    observed = np.atleast_2d(np.cov(np.stack([table.mean(axis=0) for table in scores])))
    chance = []
    for table in scores:
        rest = table - table.mean(axis=1, keepdims=True) - table.mean(axis=0) + table.mean()
        chance.append((rest**2).sum() / np.prod(np.subtract(table.shape, 1)) / len(table))
    values, vectors = np.linalg.eigh(observed - np.diag(chance))
    return vectors * np.maximum(values, 0.0) @ vectors.T  # chance makes some below 0; a variance cannot be


def angle(accuracy: float) -> float:
    """asin(sqrt(accuracy))."""
    return math.asin(math.sqrt(accuracy))


def slope(table: np.ndarray) -> float:
    """How far `angle` moves with the accuracy of scores (S, I), d angle / d accuracy, finite at 0 and 1."""
    inside = (table.sum() + 3 / 8) / (table.size + 3 / 4)
    return 0.5 / math.sqrt(inside * (1 - inside))


def share(z: float) -> float:
    """The accuracy at an angle, kept in [0, 1]."""
    return math.sin(min(max(float(z), 0.0), FULL)) ** 2


def around(difference: float, reach: float) -> Interval:
    """A difference of accuracies, give or take `reach`, kept in [-1, 1]."""
    return Interval(difference, max(-1.0, float(difference - reach)), min(1.0, float(difference + reach)))


def detectable(accuracy: float, distance: float) -> float | None:
    """`distance`, if an arm can lie so far above or below an accuracy; None if there is room for neither."""
    return distance if distance <= max(accuracy, 1 - accuracy) else None


def accuracy(correct: np.ndarray) -> Interval:
    """Mean of 0/1 scores (S, I) of a single arm; of one seed, the interval is Wilson's and covers items alone."""
    if len(correct) >= 2:
        return Errors({"": dict(enumerate(correct))}).accuracy("")
    return Interval(float(correct.mean()), *wilson(float(correct.mean()), correct.shape[1]))


def of_items(one: np.ndarray, other: np.ndarray) -> Interval:
    """Mean difference of two arms' scores (S, I), with an interval over items that says nothing of other seeds.

    The t interval, its error at least 1 / I, what one item that stands out would give; without end for one item.
    """
    differences = one.mean(axis=0) - other.mean(axis=0)
    items, mean = len(differences), float(differences.mean())
    if items == 1:
        return Interval(mean, -1.0, 1.0)
    error = max(float(stats.sem(differences)), 1 / items)
    reach = float(stats.t.ppf((1 + LEVEL) / 2, items - 1)) * error
    return Interval(mean, max(-1.0, mean - reach), min(1.0, mean + reach))


def wilson(share: float, n: int) -> tuple[float, float]:
    """Wilson's score interval for a share of n (Wilson 1927)."""
    z = float(stats.norm.ppf((1 + LEVEL) / 2))
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    reach = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, centre - reach), min(1.0, centre + reach)


def loss(values: Sequence[float]) -> Interval:
    """Mean of a loss over seeds, with the t interval, kept at 0 or above; without end for one seed."""
    mean = float(np.mean(values))
    if len(values) == 1:
        return Interval(mean, 0.0, math.inf)
    reach = float(stats.t.ppf((1 + LEVEL) / 2, len(values) - 1) * stats.sem(values))
    return Interval(mean, max(0.0, mean - reach), mean + reach)
