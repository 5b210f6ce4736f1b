"""Small pictures of one kind, singly as SVG and together on a PNG; those of learning curves and of learning rates."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeGuard

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from lora_lite.lab.findings.findings import Finding, Findings
from lora_lite.lab.numerals import loss, rate, short
from lora_lite.lab.report import sentences
from lora_lite.lab.report.page import drawing
from lora_lite.lab.report.page.drawing import BETTER, INK, MUTED, PAPER, SMALL, WORSE

SPREAD = 5.0  # a larger ratio of losses is drawn on a log scale
BINS = 100  # points of a curve
LETTER = 6.3  # pixels of a letter at most, on average
NAME = 26  # letters of an arm's name that a picture of costs has room for


@dataclass(frozen=True)
class Panel:
    """A small picture for the page. note: what to say beside the title, or ""."""

    title: str
    svg: str
    note: str = ""


@dataclass(frozen=True)
class Sketch:
    """A picture to be drawn, of so many pixels; margins: left, bottom, right, top."""

    title: str
    alt: str
    draw: Callable[[Axes], None]
    note: str = ""
    width: float = 184
    height: float = 122
    margins: tuple[float, float, float, float] = (32, 20, 8, 8)


def panels(sketches: Sequence[Sketch], name: str, columns: int) -> tuple[tuple[Panel, ...], bytes]:
    """The pictures one by one (their ids begin with `name`), and all of them on one PNG with so many columns."""
    drawn = []
    for index, sketch in enumerate(sketches):
        figure = drawing.canvas(sketch.width, sketch.height)
        left, bottom, right, top = sketch.margins
        sketch.draw(drawing.axes(figure, left, bottom, right, top))
        drawn.append(Panel(sketch.title, drawing.svg(figure, f"{name}-{index}", sketch.alt), sketch.note))
    return tuple(drawn), drawing.png(sheet(sketches, columns) if sketches else drawing.empty())


def sheet(sketches: Sequence[Sketch], columns: int) -> Figure:
    """All of them on one figure, each under its title."""
    columns = min(columns, len(sketches))
    rows = [sketches[at : at + columns] for at in range(0, len(sketches), columns)]
    heights = [max(sketch.height for sketch in row) + 22 for row in rows]
    width, height = columns * sketches[0].width + 8, sum(heights) + 8
    figure = drawing.canvas(width, height)
    for index, row in enumerate(rows):
        top = 4 + sum(heights[:index])
        for column, sketch in enumerate(row):
            x, (left, bottom, right, head) = 4 + column * sketch.width, sketch.margins
            below = height - top - 22 - sketch.height
            axes = drawing.axes(figure, x + left, below + bottom, width - x - sketch.width + right, top + 22 + head)
            sketch.draw(axes)
            title = shorten(sketch.title, int(sketch.width / LETTER))
            figure.text((x + 4) / width, 1 - (top + 6) / height, title, va="top", fontsize=11, fontweight="bold")
    return figure


def shorten(name: str, letters: int = NAME) -> str:
    """A name that fits, cut in its middle: what tells arms apart is at its ends."""
    return name if len(name) <= letters else f"{name[: letters // 2]}…{name[-(letters - letters // 2 - 1) :]}"


def curves(findings: Findings) -> list[Sketch]:
    """Training loss against steps: a thin line a seed, their mean, and the baseline's mean for comparison."""
    known = {arm.arm: finite_curves(arm) for arm in findings.arms}
    known = {arm: lines for arm, lines in known.items() if lines}
    values = np.concatenate([line for lines in known.values() for line in lines.values()]) if known else np.zeros(0)
    values = values[np.isfinite(values)]
    if not len(values):
        return []
    low, high = (float(end) for end in np.percentile(values, (0.5, 99.5)))
    reference = mean_curve(list(known[findings.baseline].values())) if findings.baseline in known else None

    def draw(axes: Axes, lines: dict[int, np.ndarray], own: bool) -> None:
        colour = INK if own else BETTER
        for line in lines.values():
            axes.plot(*binned(line), color=colour, linewidth=0.7, alpha=0.4)
        if reference is not None and not own:
            axes.plot(*reference, color=MUTED, linewidth=1, linestyle=(0, (3, 2)))
        axes.plot(*mean_curve(list(lines.values())), color=colour, linewidth=1.5)
        axes.set_xlim(0, max(len(line) for line in lines.values()))
        set_losses(axes, low, high)
        axes.xaxis.set_major_locator(MaxNLocator(3, integer=True))
        axes.tick_params(labelsize=SMALL)

    return [
        Sketch(
            arm,
            f"Training loss of {arm}, seeds {', '.join(map(str, lines))}, over {max(map(len, lines.values()))} steps: "
            f"from {loss(ends_of(lines)[0])} to {loss(ends_of(lines)[1])} nats a token.",
            lambda axes, lines=lines, arm=arm: draw(axes, lines, arm == findings.baseline),
        )
        for arm, lines in known.items()
    ]


def finite_curves(arm: Finding) -> dict[int, np.ndarray]:
    """Seed -> losses, without those that have none; what is not finite leaves a gap."""
    lines = {seed: np.asarray(line, dtype=float) for seed, line in arm.curves.items()}
    lines = {seed: np.where(np.isfinite(line), line, np.nan) for seed, line in lines.items()}
    return {seed: line for seed, line in lines.items() if np.isfinite(line).any()}


def ends_of(lines: dict[int, np.ndarray]) -> tuple[float, float]:
    """First and last finite point of the drawn mean."""
    drawn = mean_curve(list(lines.values()))[1]
    finite = drawn[np.isfinite(drawn)]
    return (float(finite[0]), float(finite[-1])) if len(finite) else (math.nan, math.nan)


def binned(line: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most BINS points of a curve: means of neighbours, at the middles of their steps (counted from 1)."""
    parts = np.array_split(np.arange(len(line)), min(BINS, len(line)))
    return np.array([part.mean() + 1 for part in parts]), np.array([line[part].mean() for part in parts])


def mean_curve(lines: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The mean over seeds, smoothed over a twentieth of the steps to either side."""
    length = min(map(len, lines))
    line, half = np.mean([line[:length] for line in lines], axis=0), length // 20
    smooth = [line[max(0, at - half) : at + half + 1].mean() for at in range(length)]
    return binned(np.array(smooth))


def set_losses(axes: Axes, low: float, high: float) -> None:
    """The y axis of losses, the same in all pictures of a kind."""
    if low > 0 and high > SPREAD * low:
        axes.set_yscale("log")
        axes.set_ylim(low / 1.1, high * 1.1)
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=4))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        room = 0.08 * (high - low) or 0.1
        axes.set_ylim(low - room, high + room)
        axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))


def rates(findings: Findings) -> list[Sketch]:
    """Validation loss against the learning rate: the chosen rate filled, failed runs as crosses at the top."""
    arms = [arm for arm in findings.arms if arm.rates]
    losses = [value for arm in arms for value in arm.rates.values() if finite(value)]
    if not losses:
        return []
    low, high = min(losses), max(losses)
    return [
        Sketch(
            arm.arm,
            f"Validation loss of {arm.arm}: {spoken(arm)}.",
            lambda axes, arm=arm: draw_rates(axes, arm, low, high),
            sentences.edge(arm) if arm.edge else "" if arm.rate is not None else "not all run yet",
        )
        for arm in arms
    ]


def finite(value: float | None) -> TypeGuard[float]:
    """Whether a run gave a loss that can be drawn."""
    return value is not None and math.isfinite(value)


def spoken(arm: Finding) -> str:
    """The losses of an arm's rates, in words."""
    tried = sorted(arm.rates.items())
    words = [f"{rate(key)} {loss(value) if finite(value) else 'failed'}" for key, value in tried]
    return ", ".join(words) + (f"; chosen {rate(arm.rate)}" if arm.rate is not None else "")


def draw_rates(axes: Axes, arm: Finding, low: float, high: float) -> None:
    """One arm's grid."""
    set_losses(axes, low, high)
    tried = sorted(arm.rates.items())
    good = [(key, value) for key, value in tried if finite(value)]
    axes.set_xscale("log")
    axes.set_xlim(tried[0][0] / 1.5, tried[-1][0] * 1.5)
    axes.plot([key for key, _ in good], [value for _, value in good], color=MUTED, linewidth=1)
    colour = WORSE if arm.edge else BETTER
    for key, value in good:
        chosen = key == arm.rate
        style = {"markersize": 7 if chosen else 5, "markeredgecolor": colour if chosen else MUTED, "zorder": 3}
        axes.plot(key, value, "o", markerfacecolor=colour if chosen else PAPER, **style)
    for key, _ in [entry for entry in tried if entry not in good]:
        axes.plot(key, axes.get_ylim()[1], "X", color=WORSE, markersize=6, clip_on=False)
    shown = [key for key, _ in tried]
    if len(shown) > 3:
        shown = [shown[0], shown[len(shown) // 2], shown[-1]]
    axes.set_xticks(shown, [rate(key) for key in shown])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.tick_params(labelsize=SMALL)
