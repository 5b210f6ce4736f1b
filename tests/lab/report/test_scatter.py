"""Accuracy against a cost: points at their costs, the Pareto front, and labels that keep apart."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

import page_studies as studies
from lora_lite.lab.findings.findings import Findings
from lora_lite.lab.numerals import Interval
from lora_lite.lab.report.page import drawing, labels, scatter
from lora_lite.lab.report.page.front import Point, front_of, pareto, points_of

FEW = {arm: studies.ARMS[arm] for arm in ("lora", "ia3", "antipasto", "antipasto_asvd")}


@pytest.fixture(scope="module")
def few() -> Findings:
    return studies.whole(FEW)


@pytest.mark.parametrize(
    ("points", "front"),
    [
        ([], []),
        ([(1, 0.5)], [0]),
        ([(2, 0.6), (1, 0.5)], [1, 0]),
        ([(1, 0.5), (2, 0.5)], [0]),  # dearer, and no better
        ([(1, 0.5), (1, 0.6)], [1]),  # no cheaper, and worse
        ([(1, 0.5), (1, 0.5), (2, 0.4)], [0, 1]),  # equal in both: neither beats the other
        ([(0, 0.1), (1, 0.9), (5, 0.8), (9, 0.95)], [0, 1, 3]),
    ],
)
def test_pareto(points: list[tuple[float, float]], front: list[int]) -> None:
    assert pareto(points) == front


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=12))
def test_pareto_is_what_no_other_point_beats(points: list[tuple[int, int]]) -> None:
    unbeaten = {
        index
        for index, (cost, gain) in enumerate(points)
        if not any(c <= cost and g >= gain and (c, g) != (cost, gain) for c, g in points)
    }
    assert set(pareto(points)) == unbeaten


def point(arm: str, cost: float, low: float, high: float) -> Point:
    return Point(arm, "tie", cost, Interval((low + high) / 2, low, high))


def test_what_the_front_does_not_clear_is_named() -> None:
    cheap, near, far = point("cheap", 1, 0.5, 0.6), point("near", 2, 0.45, 0.55), point("far", 3, 0.1, 0.2)
    assert front_of([cheap, near, far]) == ([0], [1])


def test_the_front_is_dashed_between_arms_that_are_not_separated(few: Findings) -> None:
    with drawing.style():
        figure = scatter.draw_scatter(few, "parameters", points_of(few, "trainable"), scatter.WIDE)
    steps = [line.get_linestyle() for line in figure.axes[0].lines if line.get_label() == scatter.FRONT]
    # ia3 to antipasto_asvd is separated; antipasto_asvd to lora is not, and the line after lora joins nothing.
    assert steps == ["-", "--", "--"]


@pytest.mark.parametrize("count", [1, 6, 25])
def test_labels_keep_off_each_other_and_off_points(count: int) -> None:
    draw = np.random.default_rng(count)
    anchors = draw.uniform((60, 60), (240, 160), (count, 2))
    sizes = np.stack([draw.uniform(20, 110, count), np.full(count, 12.0)], -1)
    marks, bounds = np.hstack([anchors - 4, anchors + 4]), np.array([0.0, 0.0, 360.0, 420.0])
    boxes = labels.place(anchors, sizes, marks, np.full(count, labels.HARD), bounds)
    assert np.allclose(boxes[:, 2:] - boxes[:, :2], sizes)
    assert (boxes[:, :2] >= bounds[:2]).all() and (boxes[:, 2:] <= bounds[2:] + 1e-9).all()
    assert labels.covers(boxes, boxes).sum() == count  # each covers itself alone
    assert labels.covers(boxes, marks).sum() == 0


def test_a_label_wider_than_the_picture_starts_at_its_edge() -> None:
    bounds = np.array([0.0, 0.0, 50.0, 50.0])
    boxes = labels.place(np.array([[25.0, 25.0]]), np.array([[80.0, 10.0]]), np.zeros((0, 4)), np.zeros(0), bounds)
    assert boxes[0, 0] == 0


COSTS = {  # of a study: many alike, some free, some a hair apart
    "trainable": [2442240, 2442240, 49920, 848640, 53760, 155520, 61680, 49920, 124800, 2597760, 50130, 46080, 2442450],
    "macs_token": [2442240, 2442240, 63406080, 64204800, 4108800, 0, 63419520, 63406080, 75448320, 0, 0, 4884480],
}


def ends(line: Line2D) -> np.ndarray:
    """The points of a line, (n, 2)."""
    return np.asarray(line.get_xydata(), dtype=float)


def drawn_points(few: Findings, field: str, size: tuple[int, int]) -> tuple[Axes, list[Point], np.ndarray, np.ndarray]:
    """Axes, points, and in pixels where each mark (n,) and each bar (n,) is."""
    points = [point(str(index), cost, 0.3, 0.4 + 0.03 * index) for index, cost in enumerate(COSTS[field])]
    with drawing.style():
        axes = scatter.draw_scatter(few, field, points, size).axes[0]
    marks = [line for line in axes.lines if line.get_marker() == "o"]
    bars_of = [line for line in axes.lines if np.ptp(ends(line)[:, 1]) > 0 and line.get_alpha() == 0.75]
    assert len(marks) == len(bars_of) == len(points)
    pixels = [np.array([axes.transData.transform(ends(line)[0])[0] for line in lines]) for lines in (marks, bars_of)]
    return axes, points, pixels[0], pixels[1]


@pytest.mark.parametrize("size", [scatter.WIDE, scatter.NARROW])
@pytest.mark.parametrize("field", COSTS)
def test_every_point_stands_at_its_cost(few: Findings, field: str, size: tuple[int, int]) -> None:
    """Read off the axis, between the ticks at either side, each point's cost is its own to 1%; so is the order."""
    axes, points, marks, _ = drawn_points(few, field, size)
    costs = np.array([point.cost for point in points])
    ticks = np.array(axes.get_xticks())
    at = axes.transData.transform([(tick, 0.5) for tick in ticks])[:, 0]
    assert len(ticks) >= 3 and (ticks[0] == 0) == (min(costs) == 0)
    for cost, pixel in zip(costs, marks, strict=True):
        after = min(max(int(np.searchsorted(at, pixel)), 1), len(at) - 1)
        low, high = ticks[after - 1], ticks[after]
        share = (pixel - at[after - 1]) / (at[after] - at[after - 1])
        read = low * (high / low) ** share if low > 0 else high * share
        assert read == pytest.approx(cost, rel=0.01, abs=1e-6)
    order = np.argsort(costs, kind="stable")
    assert ((np.diff(marks[order]) > 0) == (np.diff(costs[order]) > 0)).all()


@pytest.mark.parametrize("size", [scatter.WIDE, scatter.NARROW])
def test_bars_of_one_cost_stand_apart_and_near_their_points(few: Findings, size: tuple[int, int]) -> None:
    for field in COSTS:
        _, points, marks, whiskers = drawn_points(few, field, size)
        assert np.abs(whiskers - marks).max() <= scatter.AWAY + 1e-6
        for cost in {point.cost for point in points}:
            alike = np.sort([bar for point, bar in zip(points, whiskers, strict=True) if point.cost == cost])
            assert (np.diff(alike) > 1).all()


def test_the_front_runs_through_the_points(few: Findings) -> None:
    with drawing.style():
        axes = scatter.draw_scatter(few, "parameters", points := points_of(few, "trainable"), scatter.WIDE).axes[0]
    steps = [line for line in axes.lines if line.get_label() == scatter.FRONT]
    starts = [tuple(ends(line)[0].tolist()) for line in steps]
    assert starts == [(points[at].cost, points[at].accuracy.mean) for at in front_of(points)[0]]


def test_an_axis_of_costs_says_its_scale(few: Findings) -> None:
    labels_of = {field: drawn_points(few, field, scatter.WIDE)[0].get_xlabel() for field in COSTS}
    assert labels_of["trainable"] == "trainable, log scale"
    assert labels_of["macs_token"] == "macs_token, log scale above 1M, linear below"
