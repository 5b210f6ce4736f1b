"""What arms cost, as pictures: a line an arm, all arms in one order."""

from collections.abc import Callable
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from lora_lite.lab.findings.findings import Cost, Findings
from lora_lite.lab.numerals import DASH, Interval, compact, ratio, seconds, size, tidy
from lora_lite.lab.report.page.drawing import INK, LINE, SMALL, TIE
from lora_lite.lab.report.page.panels import LETTER, Sketch, shorten

WIDTH = 358  # pixels: fits a telephone
ROW = 18  # pixels of an arm's line
VALUE = 62  # pixels for the number beside it
TICK = 48  # pixels for the number at a tick
PARTS = {"calibration": 0.95, "factorisation": 0.55, "build": 0.25}  # of attaching -> how dark

Value = float | int | Interval | dict[str, float]


@dataclass(frozen=True)
class Measure:
    """A cost to draw. value: a number, an interval, or parts that add up. base: the frozen base's value, for a line."""

    title: str
    value: Callable[[Cost], Value | None]
    show: Callable[[float], str]
    note: str = ""
    base: Callable[[Cost], float | None] = lambda cost: None


MEASURES = (
    Measure("Trained parameters", lambda cost: cost.trainable, compact),
    Measure("Size of the file", lambda cost: cost.stored_bytes, size),
    Measure("Added multiply-accumulates a token", lambda cost: cost.macs_token, compact),
    Measure("Forward pass, against the base's", lambda cost: cost.forward, ratio, "line: the base", lambda cost: 1.0),
    Measure("Training step, against the base's", lambda cost: cost.step, ratio, "line: the base", lambda cost: 1.0),
    Measure(
        "Peak memory of training",
        lambda cost: cost.peak_memory_mb,
        lambda value: size(1e6 * value),
        "line: the base",
        lambda cost: cost.base_peak_memory_mb,
    ),
    Measure("Seconds to attach", lambda cost: cost.attach_seconds or None, seconds),
)


def costs(findings: Findings) -> list[Sketch]:
    """A picture a cost that is known of any arm, a line an arm."""
    arms = [arm for arm in findings.arms if arm.cost is not None]
    margin = 10 + LETTER * max((len(shorten(arm.arm)) for arm in arms), default=0)
    sketches = []
    for measure in MEASURES:
        values = {arm.arm: measure.value(arm.cost) for arm in arms if arm.cost is not None}
        known = {arm: value for arm, value in values.items() if value is not None}
        if not known:
            continue
        base = next((value for arm in arms if arm.cost and (value := measure.base(arm.cost)) is not None), None)
        words = ", ".join(f"{arm} {measure.show(total(value))}" for arm, value in known.items())
        head = 22 if isinstance(next(iter(known.values())), dict) else 6
        sketches.append(
            Sketch(
                measure.title,
                f"{measure.title}: {words}.",
                lambda axes, measure=measure, values=values, base=base: draw_costs(
                    axes, values, measure.show, base, findings.baseline
                ),
                measure.note if base is not None else "log scale" if is_log(known) else "",
                width=WIDTH,
                height=ROW * len(values) + 22 + head,
                margins=(margin, 22, VALUE, head),
            )
        )
    return sketches


def total(value: Value) -> float:
    """One number for a cost."""
    return (
        sum(value.values()) if isinstance(value, dict) else value.mean if isinstance(value, Interval) else float(value)
    )


def is_log(known: dict[str, Value]) -> bool:
    """Whether single numbers spread so far that the small ones would not be seen."""
    numbers = [value for value in known.values() if not isinstance(value, (dict, Interval))]
    return bool(numbers) and min(numbers) > 0 and max(numbers) > 20 * min(numbers)


def draw_costs(
    axes: Axes, values: dict[str, Value | None], show: Callable[[float], str], base: float | None, baseline: str
) -> None:
    """A line an arm: a bar from zero, a point on a log scale, or a point with quartiles; and the number beside it."""
    known = {arm: value for arm, value in values.items() if value is not None}
    ends = [value.high if isinstance(value, Interval) else total(value) for value in known.values()]
    ends += [base] if base is not None else []
    axes.set_ylim(len(values) - 0.4, -0.6)
    if is_log(known):
        axes.set_xscale("log")
        room = (max(ends) / min(ends)) ** 0.06
        axes.set_xlim(min(ends) / room, max(ends) * room)
        axes.xaxis.set_major_locator(LogLocator(numticks=5))
        axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        lows = [value.low for value in known.values() if isinstance(value, Interval)]
        start = min([*lows, *ends]) if lows else 0.0
        axes.set_xlim(start - (0.06 * (max(ends) - start) if lows else 0), start + 1.06 * (max(ends) - start) or 1.0)
        axes.xaxis.set_major_locator(MaxNLocator(max(1, int(axes.get_window_extent().width / TICK))))
    if base is not None:
        axes.axvline(base, color=INK, linewidth=1, alpha=0.6)
    for y, (arm, value) in enumerate(values.items()):
        draw_cost(axes, y, value, INK if arm == baseline else TIE)
        words = DASH if value is None else show(total(value))
        beside = {"xytext": (VALUE - 4, 0), "textcoords": "offset points", "ha": "right", "va": "center_baseline"}
        axes.annotate(words, (1.0, y), xycoords=axes.get_yaxis_transform(), fontsize=SMALL, **beside)
    if any(isinstance(value, dict) for value in known.values()):
        look = {"loc": "lower left", "bbox_to_anchor": (0, 1), "ncols": 3, "frameon": False, "borderaxespad": 0}
        parts = [Patch(color=TIE, alpha=dark, label=part) for part, dark in PARTS.items()]
        axes.legend(handles=parts, handlelength=1, handletextpad=0.4, columnspacing=1, fontsize=SMALL, **look)
    axes.set_yticks(range(len(values)), [shorten(arm) for arm in values])
    axes.tick_params(axis="y", labelsize=SMALL, labelcolor=INK)
    axes.tick_params(axis="x", labelsize=SMALL)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: tidy(show(value))))
    axes.grid(visible=False, axis="y")
    axes.spines["left"].set_visible(False)


def draw_cost(axes: Axes, y: int, value: Value | None, colour: str) -> None:
    """One arm's line."""
    if isinstance(value, dict):
        left = 0.0
        for part, dark in PARTS.items():
            axes.barh(y, value.get(part, 0.0), 0.62, left, color=colour, alpha=dark)
            left += value.get(part, 0.0)
    elif isinstance(value, Interval):
        axes.plot([value.low, value.high], [y, y], color=colour, linewidth=1.4)
        axes.plot(value.mean, y, "o", color=colour, markersize=5.5)
    elif value is not None and axes.get_xscale() == "log":
        axes.plot([axes.get_xlim()[0], value], [y, y], color=LINE, linewidth=2.2)
        axes.plot(value, y, "o", color=colour, markersize=5.5)
    elif value is not None:
        axes.barh(y, value, 0.62, color=colour)
