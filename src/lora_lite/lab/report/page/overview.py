"""The picture at the head of the page: the accuracy of every arm with its interval, and the frozen base's."""

import math

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from lora_lite.lab.findings.findings import Finding, Findings
from lora_lite.lab.numerals import percent
from lora_lite.lab.report.page import drawing, marks
from lora_lite.lab.report.page.drawing import INK, MUTED, PAPER, SMALL
from lora_lite.lab.report.page.marks import LINE_HEIGHT, MARK, MARKS
from lora_lite.lab.report.page.panels import LETTER, shorten

NAME = 20  # letters of an arm's name
VALUE = 44  # pixels for the accuracy beside an arm
BELOW = 36  # pixels of the axis and its label
ROWS = 340  # pixels that all rows take together, as far as ROW lets them
ROW = (12.0, 22.0)  # pixels of a row: at least, at most


def rows(findings: Findings) -> list[Finding]:
    """What is drawn: the arms whose accuracy is measured, in the order of the table, below the frozen base."""
    measured = [arm for arm in findings.arms if arm.accuracy and math.isfinite(arm.accuracy.mean)]
    base = [findings.base] if findings.base and findings.base.accuracy else []
    return [*base, *measured] if measured else []


def draw(findings: Findings, width: int) -> Figure:
    """A row an arm, on a figure of so many pixels."""
    arms, narrow = rows(findings), width < 600
    row = min(max(ROWS / len(arms), ROW[0]), ROW[1])
    verdicts = {arm.verdict for arm in arms if not arm.bare}
    head = 6 + LINE_HEIGHT * marks.legend_rows(verdicts, narrow)
    figure = drawing.canvas(width, round(head + row * len(arms) + BELOW))
    left = 10 + LETTER * max(len(shorten(arm.arm, NAME)) for arm in arms)
    axes = drawing.axes(figure, left=left, bottom=BELOW, right=VALUE, top=head)
    marks.draw_legend(figure, findings, verdicts, narrow, below=2)
    size = min(row - 1, 10 if narrow else 12)
    for at, arm in enumerate(arms):
        draw_row(axes, at, arm, size)
    ends = [end for arm in arms if arm.accuracy for end in (arm.accuracy.low, arm.accuracy.high)]
    room = 0.03 * (max(ends) - min(ends)) or 0.02
    axes.set_xlim(max(min(ends) - room, -0.02), min(max(ends) + room, 1.02))
    axes.set_ylim(len(arms) - 0.4, -0.6)
    axes.set_yticks(range(len(arms)), ["frozen base" if arm.bare else shorten(arm.arm, NAME) for arm in arms])
    axes.tick_params(axis="y", labelsize=size, labelcolor=INK)
    axes.xaxis.set_major_locator(MaxNLocator(5 if narrow else 10, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: percent(value, 0)))
    axes.set_xlabel("accuracy, with 95% interval; grey: the frozen base's", fontsize=SMALL, loc="right", labelpad=1)
    axes.grid(visible=False, axis="y")
    axes.spines["left"].set_visible(False)
    return figure


def draw_row(axes: Axes, at: int, arm: Finding, size: float) -> None:
    """An arm's interval, its mean as a mark, and the number; of the base, a band and a line through all rows."""
    if arm.accuracy is None:
        return
    low, mean, high = arm.accuracy.low, arm.accuracy.mean, arm.accuracy.high
    marker, colour = ("s", MUTED) if arm.bare else MARKS[arm.verdict]
    if arm.bare:
        axes.axvspan(low, high, color=MUTED, alpha=0.13, linewidth=0, zorder=0)
        axes.axvline(mean, color=MUTED, linewidth=1, linestyle=(0, (1, 2)), zorder=1)
    axes.plot([low, high], [at, at], color=colour, linewidth=1.6, alpha=0.8)
    axes.plot(mean, at, marker, color=colour, markersize=MARK, markeredgecolor=PAPER, zorder=3)
    beside = {"xytext": (VALUE - 2, 0), "textcoords": "offset points", "ha": "right", "va": "center_baseline"}
    axes.annotate(percent(mean), (1.0, at), xycoords=axes.get_yaxis_transform(), fontsize=size, **beside)
