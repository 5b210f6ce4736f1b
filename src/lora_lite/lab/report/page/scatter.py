"""Accuracy against a cost: every arm at its own cost, with its interval, the Pareto front and the frozen base."""

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from lora_lite.lab.findings.findings import Findings
from lora_lite.lab.numerals import compact, percent, tidy
from lora_lite.lab.report.page import drawing, labels, marks
from lora_lite.lab.report.page.drawing import INK, MUTED, PAPER, TIE
from lora_lite.lab.report.page.front import Point, front_of, overlap
from lora_lite.lab.report.page.marks import MARK, MARKS

WIDE, NARROW = (1080, 540), (358, 580)  # pixels of a scatter, on a desk and on a telephone
FRONT = "_front"  # label of its lines
APART = 3.0  # pixels between bars that would hide each other
AWAY = 8.0  # pixels that a bar may stand off its point
LINEAR = 0.4  # decades that the linear part of an axis from zero takes


def draw_scatter(findings: Findings, label: str, points: list[Point], size: tuple[int, int]) -> Figure:
    """Points with intervals, front, base and labels. label: of the cost."""
    narrow = size[0] < 600
    figure = drawing.canvas(*size)
    verdicts = {point.verdict for point in points}
    rows = marks.legend_rows(verdicts, narrow)
    axes = drawing.axes(figure, left=38, bottom=56 if narrow else 42, right=14, top=30 + 18 * rows)
    items = f"accuracy on {findings.items:,} test items, with 95% interval"
    figure.text(4 / size[0], 1 - 6 / size[1], items, va="top", color=MUTED, fontsize=11.5)
    marks.draw_legend(figure, findings, verdicts, narrow, below=24)
    set_scales(axes, findings, points)
    axes.set_xlabel(label + (",\n" if narrow else ", ") + scale_of(axes), loc="right")
    pixels = axes.transData.transform([(point.cost, point.accuracy.mean) for point in points])
    bars = axes.transData.inverted().transform(np.stack([set_apart(pixels[:, 0]), pixels[:, 1]], -1))[:, 0].tolist()
    for point, bar in zip(points, bars, strict=True):
        (marker, colour), (low, mean, high) = MARKS[point.verdict], ends_of(point)
        look = {"color": colour, "linewidth": 1.1, "alpha": 0.75}
        axes.plot([bar, bar], [low, high], **look)
        axes.plot([point.cost, bar], [mean, mean], **look)
        axes.plot(point.cost, mean, marker, color=colour, markersize=MARK, markeredgecolor=PAPER, zorder=3)
    covered = draw_front(axes, points) + draw_base(axes, findings, points)
    draw_labels(axes, points, bars, covered, 10 if narrow else 12)
    axes.tick_params(labelsize=10 if narrow else 11.5)
    return figure


def ends_of(point: Point) -> tuple[float, float, float]:
    """Low end, mean and high end of an accuracy."""
    return point.accuracy.low, point.accuracy.mean, point.accuracy.high


def extent(points: Sequence[Point]) -> tuple[float, float]:
    """Lowest and highest end of an interval."""
    return min(point.accuracy.low for point in points), max(point.accuracy.high for point in points)


def base_fits(findings: Findings, points: Sequence[Point]) -> bool:
    """Whether the base's line can be shown without squeezing the arms into less than two thirds of the height."""
    if findings.base is None or findings.base.accuracy is None:
        return False
    (low, high), base = extent(points), findings.base.accuracy.mean
    return max(low - base, base - high) <= 0.5 * (high - low)


def set_scales(axes: Axes, findings: Findings, points: Sequence[Point]) -> None:
    """Limits and ticks: log costs where they allow it, accuracy in percent with room for labels."""
    low, high = extent(points)
    if findings.base and findings.base.accuracy and base_fits(findings, points):
        low, high = min(low, findings.base.accuracy.mean), max(high, findings.base.accuracy.mean)
    room = 0.06 * (high - low) or 0.05
    axes.set_ylim(low - room, high + room)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: percent(value, 0 if high - low > 0.05 else 1)))
    set_costs(axes, [point.cost for point in points])


def set_costs(axes: Axes, costs: Sequence[float]) -> None:
    """The axis of costs: a log scale; where some cost nothing, linear from 0 to a power of ten below all others."""
    positive = [cost for cost in costs if cost > 0]
    if not positive:
        axes.set_xlim(-1, 1)
        axes.xaxis.set_major_locator(FixedLocator([0]))
        return
    first = 10.0 ** math.floor(math.log10(min(positive)))
    if min(costs) > 0:
        axes.set_xscale("log")
    else:
        axes.set_xscale("symlog", linthresh=first, linscale=0.9 * LINEAR)
    scale = axes.xaxis.get_transform()
    low, high = scale.transform(np.array([min(costs), max(costs)], dtype=float))
    decade = 1.0 if min(costs) > 0 else first  # in the scale's own unit
    pad = 0.06 * max(decade, high - low)
    axes.set_xlim(*scale.inverted().transform(np.array([low - pad, high + pad])))
    left, right = axes.get_xlim()
    start = left if min(costs) > 0 else first
    powers = range(math.floor(math.log10(start)), math.ceil(math.log10(right)) + 1)
    shown = [tick for power in powers if start <= (tick := 10.0**power) <= right]
    if len(shown) < 3:
        shown = [tick for power in powers for sub in (1, 2, 5) if start <= (tick := sub * 10.0**power) <= right]
    axes.xaxis.set_major_locator(FixedLocator(shown if min(costs) > 0 else [0.0, *shown]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: tidy(compact(value))))


def scale_of(axes: Axes) -> str:
    """What scale the axis of costs has, in words."""
    if axes.get_xscale() != "symlog":
        return f"{axes.get_xscale()} scale"
    first = next(tick for tick in axes.get_xticks() if tick > 0)
    return f"log scale above {tidy(compact(first))}, linear below"


def set_apart(pixels: np.ndarray) -> np.ndarray:
    """Where to draw the bars of points at `pixels` (n,): those that would hide each other are spread around their
    middle, each at most AWAY from its point."""
    apart, order = pixels.copy(), np.argsort(pixels, kind="stable")
    breaks = np.flatnonzero(np.diff(pixels[order]) >= APART) + 1
    for run in np.split(order, breaks):
        half = min(APART * (len(run) - 1) / 2, AWAY)
        apart[run] = pixels[run].mean() + np.linspace(-half, half, len(run)) if half else pixels[run]
    return np.clip(apart, pixels - AWAY, pixels + AWAY)


def draw_front(axes: Axes, points: Sequence[Point]) -> list[tuple[float, float, float, float]]:
    """The front as steps. Returns what it covers, as boxes in pixels."""
    front, covered = front_of(points)[0], []
    ends = [*front[1:], None]
    for index, following in zip(front, ends, strict=True):
        x, y = points[index].cost, points[index].accuracy.mean
        xs, ys, dashed = [x, axes.get_xlim()[1]], [y, y], True
        if following is not None:
            other = points[following]
            xs, ys = [x, other.cost, other.cost], [y, y, other.accuracy.mean]
            dashed = overlap(points[index].accuracy, points[following].accuracy)
        look = {"linewidth": 1.2, "color": INK, "alpha": 0.7, "zorder": 2, "label": FRONT}
        axes.plot(xs, ys, linestyle=(0, (4, 3)) if dashed else "-", **look)
        pixels = axes.transData.transform(list(zip(xs, ys, strict=True)))
        for one, other in pairwise(pixels):
            left, bottom, right, top = *np.minimum(one, other), *np.maximum(one, other)
            covered.append((left - 1, bottom - 1, right + 1, top + 1))
    return covered


def draw_base(axes: Axes, findings: Findings, points: Sequence[Point]) -> list[tuple[float, float, float, float]]:
    """The frozen base as a line, where it fits. Returns what its label covers, as a box in pixels."""
    if findings.base is None or findings.base.accuracy is None or not base_fits(findings, points):
        return []
    mean = findings.base.accuracy.mean
    axes.axhline(mean, color=MUTED, linewidth=1, linestyle=(0, (1, 2)))
    style = {"xytext": (-2, 3), "textcoords": "offset points", "ha": "right", "color": MUTED, "fontsize": 10}
    words = axes.annotate(f"frozen base {percent(mean)}", (axes.get_xlim()[1], mean), **style)
    left, bottom, right, top = words.get_window_extent().extents
    return [(left, bottom, right, top)]


def draw_labels(axes: Axes, points: Sequence[Point], bars: Sequence[float], covered: Sequence, size: float) -> None:
    """A name beside each point, with a leader where it is farther off."""
    anchors = axes.transData.transform([(point.cost, point.accuracy.mean) for point in points])
    texts = [axes.annotate(point.arm, (0, 0), xycoords="axes fraction", fontsize=size, zorder=4) for point in points]
    sizes = np.array([text.get_window_extent().size for text in texts]) + np.array([4, 2])
    marks = np.hstack([anchors - MARK / 2 - 1, anchors + MARK / 2 + 1])
    ends = [[(x, point.accuracy.low), (x, point.accuracy.high)] for x, point in zip(bars, points, strict=True)]
    whiskers = axes.transData.transform(np.reshape(ends, (-1, 2))).reshape(-1, 4) + np.array([-2, -2, 2, 2])
    obstacles = np.vstack([marks, whiskers, np.reshape(covered, (-1, 4))])
    weights = np.array([labels.HARD] * len(marks) + [0.6] * (len(whiskers) + len(covered)))
    bounds = np.asarray(axes.get_window_extent().extents)
    boxes = labels.place(anchors, sizes, obstacles, weights, bounds + np.array([2, 2, -2, -2]))
    for text, box, anchor in zip(texts, boxes, anchors, strict=True):
        text.xy = tuple((box[:2] + np.array([2, 3]) - bounds[:2]) / (bounds[2:] - bounds[:2]))
        text.set_position(text.xy)
        end = labels.nearest(box[None], anchor)[0]
        if np.hypot(*(end - anchor)) > 2 * labels.GAP:
            line = axes.transData.inverted().transform([anchor, end])
            axes.plot(*line.T, color=TIE, linewidth=0.8, zorder=1.5)
