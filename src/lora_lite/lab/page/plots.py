"""Every picture of a study: SVG for the page, PNG files beside it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from lora_lite.lab.findings import Findings, Interval
from lora_lite.lab.numerals import compact, percent, tidy
from lora_lite.lab.page import bars, drawing, labels, panels
from lora_lite.lab.page.drawing import BETTER, INK, MUTED, PAPER, TIE, WORSE

WIDE, NARROW = (1080, 540), (358, 560)  # pixels of a scatter, on a desk and on a telephone
FRONT = "_front"  # label of its lines
MARK = 7.0  # pixels of a point
SIDE_BY_SIDE = 9.0  # pixels between points that would hide each other
MARKS = {  # verdict -> marker, colour, what it says of the baseline
    "baseline": ("D", INK, "{}, the baseline"),
    "better": ("^", BETTER, "better than {}"),
    "worse": ("v", WORSE, "worse than {}"),
    "tie": ("o", TIE, "not separated from {}"),
    "": ("X", MUTED, "not compared yet"),
}
AXES = {  # name of the file -> field of Cost, label
    "accuracy-parameters": ("trainable", "trained parameters"),
    "accuracy-macs": ("macs_token", "added multiply-accumulates a token"),
}


@dataclass(frozen=True)
class Point:
    """An arm in a scatter."""

    arm: str
    verdict: str
    cost: float
    accuracy: Interval


@dataclass(frozen=True)
class Scatter:
    """Accuracy against a cost: SVG for wide and for narrow windows (both empty if nothing is measured), and words."""

    file: str
    title: str
    wide: str
    narrow: str
    caption: str


@dataclass(frozen=True)
class Plots:
    """All pictures of a study. files: name of a PNG -> its bytes."""

    scatters: tuple[Scatter, ...]
    curves: tuple[panels.Panel, ...]
    rates: tuple[panels.Panel, ...]
    costs: tuple[panels.Panel, ...]
    files: dict[str, bytes]


def plot(findings: Findings) -> Plots:
    """Draw everything. What is not measured yet is said in its picture's place."""
    scatters, files = [], {}
    with drawing.style():
        for name in AXES:
            points = points_of(findings, name)
            wide = draw_scatter(findings, name, points, WIDE) if points else drawing.empty()
            files[f"{name}.png"] = drawing.png(wide)
            scatters.append(scatter(findings, name, points, wide))
        curves, files["learning-curves.png"] = panels.panels(panels.curves(findings), "curves", columns=6)
        rates, files["rates.png"] = panels.panels(panels.rates(findings), "rates", columns=6)
        costs, files["costs.png"] = panels.panels(bars.costs(findings), "costs", columns=3)
    return Plots(tuple(scatters), curves, rates, costs, files)


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Which (cost, gain) no other point beats: by no higher cost and no lower gain, one of them strictly so.

    Returns their indices by rising cost. It compares estimates: whether two points are separated is another question.
    """
    order = sorted(range(len(points)), key=lambda index: (points[index][0], -points[index][1]))
    front: list[int] = []
    for index in order:
        best = front[-1] if front else None
        if best is None or points[index][1] > points[best][1] or points[index] == points[best]:
            front.append(index)
    return front


def overlap(one: Interval, other: Interval) -> bool:
    """Whether two intervals share a value."""
    return one.low <= other.high and other.low <= one.high


def points_of(findings: Findings, name: str) -> list[Point]:
    """The arms with both an accuracy and this cost."""
    found = []
    for arm in findings.arms:
        cost = getattr(arm.cost, AXES[name][0], None)
        if arm.accuracy is not None and cost is not None and math.isfinite(arm.accuracy.mean):
            found.append(Point(arm.arm, arm.verdict, float(cost), arm.accuracy))
    return found


def front_of(points: Sequence[Point]) -> tuple[list[int], list[int]]:
    """Indices of the front, and of the points off it whose interval no point of the front at no higher cost clears."""
    front = pareto([(point.cost, point.accuracy.mean) for point in points])
    near = []
    for index, point in enumerate(points):
        rivals = [points[at].accuracy for at in front if points[at].cost <= point.cost]
        if index not in front and all(rival.low <= point.accuracy.high for rival in rivals):
            near.append(index)
    return front, near


def scatter(findings: Findings, name: str, points: list[Point], wide: Figure) -> Scatter:
    """The scatter for both kinds of windows, with a caption that claims no more than the intervals do."""
    title = f"Accuracy against {AXES[name][1]}"
    if not points:
        return Scatter(f"{name}.png", title, "", "", "No arm has both an accuracy and this cost yet.")
    front, near = front_of(points)
    named = ", ".join(points[index].arm for index in front)
    caption = (
        f"Bars are 95% intervals. The line is the Pareto front of the estimates ({named}): no other arm has both a "
        "higher estimate and a lower cost. It is dashed between arms whose intervals overlap: those are not separated, "
        "and their order may be chance."
    )
    if near:
        caption += f" Not separated from the front either: {', '.join(points[index].arm for index in near)}."
    if left_out := [arm.arm for arm in findings.arms if arm.arm not in {point.arm for point in points}]:
        caption += f" Not measured yet, and left out: {', '.join(left_out)}."
    caption += " Arms of nearly the same cost are set side by side."
    if findings.base and findings.base.accuracy and not base_fits(findings, points):
        caption += f" The frozen base, at {percent(findings.base.accuracy.mean)}, lies outside the picture."
    alt = f"{title}: {len(points)} arms; the numbers are in the table. On the Pareto front: {named}."
    figures = {"wide": wide, "narrow": draw_scatter(findings, name, points, NARROW)}
    drawn = {kind: drawing.svg(figure, f"{name}-{kind}", alt, f"chart {kind}") for kind, figure in figures.items()}
    return Scatter(f"{name}.png", title, drawn["wide"], drawn["narrow"], caption)


def draw_scatter(findings: Findings, name: str, points: list[Point], size: tuple[int, int]) -> Figure:
    """Points with intervals, front, base and labels."""
    narrow = size[0] < 600
    figure = drawing.canvas(*size)
    legend = [verdict for verdict in MARKS if any(point.verdict == verdict for point in points)]
    rows = math.ceil(len(legend) / (2 if narrow else 5))
    axes = drawing.axes(figure, left=38, bottom=42, right=8, top=30 + 18 * rows)
    items = f"accuracy on {findings.items:,} test items, with 95% interval"
    figure.text(4 / size[0], 1 - 6 / size[1], items, va="top", color=MUTED, fontsize=11.5)
    handles = [handle(findings, verdict) for verdict in legend]
    style = {
        "frameon": False,
        "borderaxespad": 0,
        "handletextpad": 0.2,
        "columnspacing": 1.4,
        "fontsize": 11 if narrow else 12,
    }
    place = {"loc": "upper left", "bbox_to_anchor": (2 / size[0], 1 - 24 / size[1])}
    figure.legend(handles=handles, ncols=2 if narrow else 5, **place, **style)
    set_scales(axes, findings, points)
    axes.set_xlabel(AXES[name][1] + (", log scale" if axes.get_xscale() == "log" else ""), loc="right")
    at = side_by_side(axes, points)
    for point, x in zip(points, at, strict=True):
        marker, colour, _ = MARKS[point.verdict]
        axes.plot([x, x], [point.accuracy.low, point.accuracy.high], color=colour, linewidth=1.1, alpha=0.75)
        axes.plot(x, point.accuracy.mean, marker, color=colour, markersize=MARK, markeredgecolor=PAPER, zorder=3)
    covered = draw_front(axes, points, at) + draw_base(axes, findings, points)
    draw_labels(axes, points, at, covered, 10 if narrow else 12)
    axes.tick_params(labelsize=10 if narrow else 11.5)
    return figure


def handle(findings: Findings, verdict: str) -> Line2D:
    """An entry of the legend."""
    marker, colour, words = MARKS[verdict]
    look = {"color": colour, "markersize": MARK, "markeredgecolor": PAPER, "linestyle": ""}
    return Line2D([], [], marker=marker, label=words.format(findings.baseline), **look)


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
    costs = [point.cost for point in points]
    if min(costs) > 0:
        axes.set_xscale("log")
        wide = max(costs) > 30 * min(costs)
        pad = max(1.15, (max(costs) / min(costs)) ** 0.08)
        axes.set_xlim(min(costs) / pad, max(costs) * pad)
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0,) if wide else (1.0, 2.0, 5.0)))
        axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        pad = 0.08 * max(costs) or 1.0
        axes.set_xlim(-pad, max(costs) + pad)
        axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: tidy(compact(value))))


def side_by_side(axes: Axes, points: Sequence[Point]) -> list[float]:
    """Where to draw the points: runs of neighbours that would hide each other are spread around their middle."""
    pixels = axes.transData.transform([(point.cost, point.accuracy.mean) for point in points])[:, 0]
    left, right = axes.get_window_extent().intervalx
    order = [int(index) for index in np.argsort(pixels, kind="stable")]
    breaks = [at + 1 for at, (one, other) in enumerate(pairwise(pixels[order])) if other - one >= SIDE_BY_SIDE]
    for run in np.split(np.array(order), breaks):
        half = SIDE_BY_SIDE * (len(run) - 1) / 2
        if half:
            middle = np.clip(pixels[run].mean(), left + half + MARK, right - half - MARK)
            pixels[run] = middle + np.linspace(-half, half, len(run))
    data = axes.transData.inverted().transform(np.stack([pixels, np.zeros_like(pixels)], -1))
    return [float(x) for x in data[:, 0]]


def draw_front(axes: Axes, points: Sequence[Point], at: Sequence[float]) -> list[tuple[float, float, float, float]]:
    """The front as steps. Returns what it covers, as boxes in pixels."""
    front, covered = front_of(points)[0], []
    ends = [*front[1:], None]
    for index, following in zip(front, ends, strict=True):
        y = points[index].accuracy.mean
        xs, ys, dashed = [at[index], axes.get_xlim()[1]], [y, y], True
        if following is not None:
            xs, ys = [at[index], at[following], at[following]], [y, y, points[following].accuracy.mean]
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


def draw_labels(axes: Axes, points: Sequence[Point], at: Sequence[float], covered: Sequence, size: float) -> None:
    """A name beside each point, with a leader where it is farther off."""
    anchors = axes.transData.transform([(x, point.accuracy.mean) for x, point in zip(at, points, strict=True)])
    texts = [axes.annotate(point.arm, (0, 0), xycoords="axes fraction", fontsize=size, zorder=4) for point in points]
    sizes = np.array([text.get_window_extent().size for text in texts]) + np.array([4, 2])
    marks = np.hstack([anchors - MARK / 2 - 1, anchors + MARK / 2 + 1])
    ends = [[(x, point.accuracy.low), (x, point.accuracy.high)] for x, point in zip(at, points, strict=True)]
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
