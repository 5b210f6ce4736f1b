"""Pictures of a study: the Pareto front, labels that keep apart, and figures that leave the process as it was."""

import dataclasses
import io
import re

import matplotlib
import numpy as np
import page_studies as studies
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib._pylab_helpers import Gcf
from PIL import Image

from lora_lite.lab import numerals
from lora_lite.lab.findings import Findings, Interval
from lora_lite.lab.page import bars, drawing, labels, panels, plots
from lora_lite.lab.page.plots import Plots, front_of, pareto, plot

FEW = {arm: studies.ARMS[arm] for arm in ("lora", "ia3", "antipasto", "antipasto_asvd")}


@pytest.fixture(scope="module")
def few() -> Findings:
    return studies.whole(FEW)


@pytest.fixture(scope="module")
def drawn(few: Findings) -> Plots:
    return plot(few)


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


def point(arm: str, cost: float, low: float, high: float) -> plots.Point:
    return plots.Point(arm, "tie", cost, Interval((low + high) / 2, low, high))


def test_what_the_front_does_not_clear_is_named() -> None:
    cheap, near, far = point("cheap", 1, 0.5, 0.6), point("near", 2, 0.45, 0.55), point("far", 3, 0.1, 0.2)
    assert front_of([cheap, near, far]) == ([0], [1])


def test_the_caption_names_front_neighbours_and_what_is_left_out(few: Findings, drawn: Plots) -> None:
    caption = drawn.scatters[0].caption
    assert "(ia3, antipasto_asvd, lora)" in caption
    assert "Not separated from the front either: antipasto." in caption
    without = dataclasses.replace(few.arms[0], accuracy=None)
    points = plots.points_of(findings := dataclasses.replace(few, arms=(without, *few.arms[1:])), "accuracy-macs")
    left_out = plots.scatter(findings, "accuracy-macs", points, drawing.empty()).caption
    assert f"left out: {without.arm}." in left_out


def test_the_front_is_dashed_between_arms_that_are_not_separated(few: Findings) -> None:
    with drawing.style():
        figure = plots.draw_scatter(few, "accuracy-parameters", plots.points_of(few, "accuracy-parameters"), plots.WIDE)
    steps = [line.get_linestyle() for line in figure.axes[0].lines if line.get_label() == plots.FRONT]
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


@pytest.mark.parametrize("cost", [0.0, 5000.0])
def test_arms_of_one_cost_are_set_side_by_side(cost: float) -> None:
    points = [point(str(index), cost, 0.4, 0.6) for index in range(5)]
    study = studies.whole(FEW)
    with drawing.style():
        axes = drawing.axes(drawing.canvas(*plots.NARROW), 30, 30, 10, 10)
        plots.set_scales(axes, study, points)
        at = plots.side_by_side(axes, points)
    pixels = axes.transData.transform([(x, 0.5) for x in at])[:, 0]
    assert np.allclose(np.diff(pixels), plots.SIDE_BY_SIDE)


def test_a_picture_takes_its_colours_from_the_page_and_has_words(drawn: Plots) -> None:
    pictures = [picture.svg for kind in (drawn.curves, drawn.rates, drawn.costs) for picture in kind]
    pictures += [svg for scatter in drawn.scatters for svg in (scatter.wide, scatter.narrow)]
    assert len(pictures) == len(FEW) * 2 + len(bars.MEASURES) + 4
    ids: list[str] = []
    for svg in pictures:
        assert svg.startswith('<svg class="chart') and 'role="img" aria-label="' in svg
        assert "var(--ink)" in svg or "var(--muted)" in svg
        assert not re.findall(r"#[0-9a-f]{6}\b", svg), "a colour that dark mode cannot change"
        own = re.findall(r' id="([^"]+)"', svg)
        assert set(re.findall(drawing.REFERENCE, svg)) == set(own)
        ids += own
    assert len(ids) == len(set(ids))


def test_pictures_are_the_same_whatever_the_user_set_and_leave_it_so(few: Findings, drawn: Plots) -> None:
    with matplotlib.rc_context(
        {"lines.linewidth": 9, "font.size": 30, "svg.fonttype": "path", "axes.facecolor": "black"}
    ):
        before = dict(matplotlib.rcParams)
        again = plot(few)
        assert dict(matplotlib.rcParams) == before
    assert again == drawn
    assert not Gcf.get_all_fig_managers()  # nothing is left in pyplot's hands


def test_nothing_measured_is_said_in_every_file() -> None:
    empty = plot(studies.nothing())
    assert (empty.curves, empty.rates, empty.costs) == ((), (), ())
    assert {scatter.wide + scatter.narrow for scatter in empty.scatters} == {""}
    assert len(set(empty.files.values())) == 1
    for data in empty.files.values():
        assert Image.open(io.BytesIO(data)).size == (1280, 240)


def test_one_arm_costs_nothing(few: Findings) -> None:
    arm = few.arms[0]
    assert arm.cost is not None
    free = dataclasses.replace(arm, cost=dataclasses.replace(arm.cost, trainable=0, macs_token=0))
    alone = plot(dataclasses.replace(few, arms=(free,), base=None))
    assert all(scatter.wide for scatter in alone.scatters)
    assert "log scale" not in alone.scatters[0].wide
    assert len(alone.curves) == 1


def test_failed_and_endless_rates_are_crosses(few: Findings) -> None:
    arm = dataclasses.replace(few.arms[0], rates={1e-3: 0.5, 1e-2: None, 1e-1: float("inf")}, rate=1e-3, edge="lowest")
    (sketch,) = panels.rates(dataclasses.replace(few, arms=(arm,)))
    assert "0.01 failed, 0.1 failed; chosen 0.001" in sketch.alt and sketch.note == "edge of grid"
    axes = drawing.axes(drawing.canvas(200, 150), 30, 20, 5, 5)
    sketch.draw(axes)
    assert [line.get_marker() for line in axes.lines].count("X") == 2


def test_a_curve_is_thinned_without_losing_its_ends() -> None:
    steps, losses = panels.binned(np.linspace(3.0, 1.0, 5000))
    assert len(steps) == panels.BINS
    assert losses[0] == pytest.approx(3, abs=0.02) and losses[-1] == pytest.approx(1, abs=0.02)
    assert steps[0] < 50 and steps[-1] > 4950


@pytest.mark.parametrize(
    ("shown", "text"),
    [
        (numerals.percent(0.6234), "62.3%"),
        (numerals.points(-0.0214), "−2.1"),
        (numerals.points(0.0214), "+2.1"),
        (numerals.points(-0.00001), "0.0"),
        (numerals.signed(0.0123), "+0.012"),
        (numerals.compact(4_884_480), "4.88M"),
        (numerals.compact(999_950), "1.00M"),
        (numerals.compact(49_920), "49.9k"),
        (numerals.compact(910_000), "910k"),
        (numerals.compact(12), "12"),
        (numerals.size(19_700_000), "19.7 MB"),
        (numerals.size(512), "512 B"),
        (numerals.tidy("5.00M"), "5M"),
        (numerals.tidy("800 MB"), "800 MB"),
        (numerals.tidy("0 B"), "0"),
        (numerals.tidy("0.000 s"), "0"),
        (numerals.rate(5e-5), "5e−5"),
        (numerals.rate(0.002), "0.002"),
        (numerals.seconds(0.0344), "0.034 s"),
        (numerals.seconds(143.2), "143 s"),
        (numerals.span(Interval(0, -0.031, 0.012), numerals.points), "−3.1 to +1.2"),
    ],
)
def test_numbers(shown: str, text: str) -> None:
    assert shown == text
