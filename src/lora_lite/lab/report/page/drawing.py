"""Figures without pyplot, in one style whatever the user's own is; as PNG, and as SVG in the colours of its page."""

import html
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

# What a colour is for -> in light, in dark. The page's style sheet and every figure take it from here. Blue and orange
# are told apart by all kinds of eyes; shapes say the same once more.
PALETTE = {
    "paper": ("#ffffff", "#14171b"),
    "ink": ("#1c2127", "#e7e9ec"),
    "muted": ("#59626d", "#a3acb7"),
    "line": ("#dadfe5", "#343b44"),
    "better": ("#0a62a9", "#6cb6ff"),
    "worse": ("#b0430a", "#ff9f5f"),
    "tie": ("#6a737e", "#98a2ae"),
}
INK, MUTED, LINE, PAPER, BETTER, WORSE, TIE = (
    PALETTE[name][0] for name in ("ink", "muted", "line", "paper", "better", "worse", "tie")
)
SMALL = 9.5  # pixels of small text
REFERENCE = r"""(?:url\(|href=")#([\w-]+)"""  # from one element of an SVG to another
PNG_SCALE = 2.0  # pixels of a PNG for one of the page

STYLE: Any = {  # matplotlib's own type of these keys is private
    "figure.dpi": 72,  # a point is a pixel
    "savefig.dpi": 72,
    "font.size": 11,
    "text.color": INK,
    "text.parse_math": False,  # a dollar in a name is a dollar
    "axes.edgecolor": LINE,
    "axes.labelcolor": MUTED,
    "axes.labelsize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": LINE,
    "grid.linewidth": 0.7,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": 10,
    "ytick.labelsize": 10,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "svg.fonttype": "none",  # text stays text, in the page's font
}


@contextmanager
def style() -> Iterator[None]:
    """Within it, figures are made and written in the lab's style. The process's own settings are back afterwards."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        yield


def canvas(width: float, height: float) -> Figure:
    """An empty figure of so many pixels."""
    figure = Figure(figsize=(width / 72, height / 72))
    FigureCanvasAgg(figure)  # text can be measured
    return figure


def axes(figure: Figure, left: float, bottom: float, right: float, top: float) -> Axes:
    """Axes that leave so many pixels free at each side."""
    width, height = figure.get_size_inches() * 72
    return figure.add_axes(
        (left / width, bottom / height, (width - left - right) / width, (height - top - bottom) / height)
    )


def empty() -> Figure:
    """In place of a picture of nothing."""
    figure = canvas(640, 120)
    figure.text(0.5, 0.5, "Nothing of this is measured yet.", ha="center", va="center", color=MUTED)
    return figure


def png(figure: Figure) -> bytes:
    """The figure as a PNG file, in light colours. The same figure gives the same bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=72 * PNG_SCALE, facecolor=PAPER, metadata={"Software": None})
    return buffer.getvalue()


def svg(figure: Figure, name: str, alt: str, kind: str = "chart") -> str:
    """The figure as an SVG element for an HTML page. The same figure gives the same text.

    name: what its ids begin with, different for each figure of a page. alt: what it shows, in words. kind: its class.
    Colours of the palette become `var(--...)`, so that the page's light or dark applies.
    """
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>|<style.*?</style>", "", text[text.index("<svg") :], flags=re.S)
    text = text.replace("xlink:href", "href")
    for role, (light, _) in PALETTE.items():
        text = text.replace(light, f"var(--{role})")
    used = {own: f"{name}-{index}" for index, own in enumerate(dict.fromkeys(re.findall(REFERENCE, text)))}
    text = re.sub(r' id="([^"]*)"', lambda own: f' id="{used[own[1]]}"' if own[1] in used else "", text)
    text = re.sub(REFERENCE, lambda own: own[0].replace(own[1], used[own[1]]), text)
    width, height = (round(side * 72) for side in figure.get_size_inches())
    opening = f'<svg class="{kind}" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img"'
    return re.sub(r"<svg.*?>", lambda _: f'{opening} aria-label="{html.escape(alt)}">', text, count=1, flags=re.S)
