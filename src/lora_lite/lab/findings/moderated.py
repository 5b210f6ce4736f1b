"""How far seeds of an arm lie apart, where two or three seeds an arm say little: arms learn from each other.

An arm's own variance s^2 of S seeds has S - 1 degrees of freedom d. Smyth ("Linear models and empirical Bayes methods",
2004) takes the arms' true variances as a sample of their own, 1 / sigma^2 ~ chi^2_d0 / (d0 s0^2), so that

    s^2 ~ s0^2 F(d, d0)        and, given s^2,        sigma^2 ~ (d0 s0^2 + d s^2) / chi^2_(d0 + d):

d0 = infinity is one variance pooled over all arms, d0 = 0 each arm's own. Smyth puts estimates of d0 and s0^2 in; of 5
or 17 arms they are so rough that d0 is often estimated infinite where spreads differ by a factor of 4. Here both are
unknown: they are drawn from their posterior on a grid, with odds of nineteen to one that there is one variance.
"""

import numpy as np
from scipy import special

PRIOR_FREEDOM = np.array([1.0, 2, 4, 8, 16, 32, 1e6])  # d0; the last stands for infinity
PRIOR_WEIGHT = np.array([1 / 120] * 6 + [19 / 20])  # for a single variance, whose power it then nearly has
SCALES = 61  # of the grid of log s0^2
MARGIN = 4.0  # how far that grid goes beyond the smallest and the largest log s^2


def log_density(variances: np.ndarray, freedom: np.ndarray, d0: np.ndarray, log_scale: np.ndarray) -> np.ndarray:
    """Sum over the arms (last axis) of log p(s^2 | d0, s0^2), up to a constant: the density of s0^2 F(d, d0)."""
    ratio = np.exp(np.log(variances) - log_scale)
    half, prior = freedom / 2, d0 / 2
    norm = half * np.log(freedom / d0) - special.betaln(half, prior)
    each = norm + half * np.log(ratio) - (half + prior) * np.log1p(freedom * ratio / d0)
    return np.asarray(each.sum(axis=-1))


def moderated(variances: np.ndarray, freedom: np.ndarray, d0: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Smyth's moderated variance (d0 s0^2 + d s^2) / (d0 + d)."""
    return (d0 * scale + freedom * variances) / (d0 + freedom)


def draw_variances(variances: np.ndarray, freedom: np.ndarray, draws: int, rng: np.random.Generator) -> np.ndarray:
    """Draws (draws, A) of the arms' true variances, given their own (A,), above 0, with degrees of freedom (A,)."""
    logs = np.log(variances)
    grid, step = np.linspace(logs.min() - MARGIN, logs.max() + MARGIN, SCALES, retstep=True)
    fit = log_density(variances, freedom, PRIOR_FREEDOM[:, None, None], grid[:, None])
    chances = np.exp(fit - fit.max()) * PRIOR_WEIGHT[:, None]
    chosen = rng.choice(chances.size, draws, p=(chances / chances.sum()).ravel())
    row, column = np.divmod(chosen, len(grid))
    d0 = PRIOR_FREEDOM[row][:, None]
    scale = np.exp(grid[column] + step * (rng.random(draws) - 0.5))[:, None]
    total = d0 + freedom
    return moderated(variances, freedom, d0, scale) * total / rng.chisquare(total)
