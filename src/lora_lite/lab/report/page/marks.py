"""How an arm is marked by its verdict, in every picture alike, and the legend that says so."""

import math
from collections.abc import Container

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from lora_lite.lab.findings.findings import Findings
from lora_lite.lab.report import sentences
from lora_lite.lab.report.page.drawing import BETTER, INK, MUTED, PAPER, TIE, WORSE

MARK = 7.0  # pixels of a point
LINE_HEIGHT = 18  # pixels of a line of the legend
MARKS = {  # verdict -> marker, colour
    "baseline": ("D", INK),
    "better": ("^", BETTER),
    "worse": ("v", WORSE),
    "tie": ("o", TIE),
    "": ("X", MUTED),
}


def legend_rows(verdicts: Container[str], narrow: bool) -> int:
    """How many lines the legend of these verdicts takes."""
    return math.ceil(sum(verdict in verdicts for verdict in MARKS) / columns(narrow))


def columns(narrow: bool) -> int:
    """How many entries of the legend stand side by side."""
    return 2 if narrow else len(MARKS)


def draw_legend(figure: Figure, findings: Findings, verdicts: Container[str], narrow: bool, below: float) -> None:
    """What each mark says, `below` so many pixels from the figure's upper edge."""
    width, height = figure.get_size_inches() * 72
    handles = [handle(findings, verdict) for verdict in MARKS if verdict in verdicts]
    place = {"loc": "upper left", "bbox_to_anchor": (2 / width, 1 - below / height)}
    look = {"frameon": False, "borderaxespad": 0, "handletextpad": 0.2, "columnspacing": 1.4}
    figure.legend(handles=handles, ncols=columns(narrow), fontsize=11 if narrow else 12, **place, **look)


def handle(findings: Findings, verdict: str) -> Line2D:
    """An entry of the legend."""
    marker, colour = MARKS[verdict]
    look = {"color": colour, "markersize": MARK, "markeredgecolor": PAPER, "linestyle": ""}
    return Line2D([], [], marker=marker, label=sentences.LEGEND[verdict].format(findings.baseline), **look)
