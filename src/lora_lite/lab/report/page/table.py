"""The table of arms: its columns, in order, in groups that a reader switches on and off."""

from collections.abc import Callable
from dataclasses import dataclass

from lora_lite.lab.findings.findings import Cost, Finding, Findings
from lora_lite.lab.numerals import Interval, loss, percent, ratio, seconds, size
from lora_lite.lab.report.page import cells
from lora_lite.lab.report.page.cells import Cell

WHOLE = "{:,.0f}".format
SHOWN = ("Result", "Cost")  # the groups that are on at first: they fit a window of 1280 pixels
RANGE = "; below, its 95% interval"
TIMED = "as a multiple of the frozen base's, in the same process: median, and quartiles below"


@dataclass(frozen=True)
class Column:
    """A column. tip: what it means. lower: the first click sorts by rising value. words: it holds words."""

    group: str
    label: str
    tip: str
    cell: Callable[[Finding], Cell]
    lower: bool = True
    words: bool = False


def columns(findings: Findings) -> list[Column]:
    """All columns after the first, which is the arm."""
    return [*outcome(findings), *costs(), *replies(), *training(), *time_and_memory(), *forgetting(findings)]


def outcome(findings: Findings) -> list[Column]:
    """How well the arms do."""
    scale = cells.widest(findings)

    against = (
        "difference on the same items, in percentage points; below, the 95% interval that holds for all arms together, "
        "and p, adjusted likewise"
    )
    decided = (
        "better or worse if the interval leaves out zero; else a tie, with the points that this study would have seen"
    )

    def result(
        label: str, tip: str, cell: Callable[[Finding], Cell], lower: bool = False, words: bool = False
    ) -> Column:
        return Column("Result", label, tip, cell, lower, words)

    return [
        result("accuracy", f"share of test items answered right, mean over seeds{RANGE}", cells.accuracy),
        result(f"difference to {findings.baseline}", against, lambda arm: cells.difference(arm, scale)),
        result("verdict", decided, cells.verdict, lower=True, words=True),
        result("place", "best to worst place that the data allow", cells.place, lower=True),
        result("seeds", "seeds measured, of those that the study asks for", cells.seeds),
    ]


def replies() -> list[Column]:
    """What the replies look like beside being right."""

    def share(value: float | None, arm: Finding) -> Cell:
        return cells.number(value, percent, arm, "not measured yet")

    anywhere, cut = "replies with the right answer anywhere", "replies that reached the longest length"
    return [
        Column("Replies", "answer anywhere", anywhere, lambda arm: share(arm.mentioned, arm), lower=False),
        Column("Replies", "cut off", cut, lambda arm: share(arm.cut_off, arm)),
    ]


def training() -> list[Column]:
    """How the arms were trained, and what failed."""
    tip = f"mean loss on validation items at the chosen rate, nats a token{RANGE}"
    why = "no run at the chosen rate yet"
    failed = "runs that ended in an error; reasons below the table"
    return [
        Column("Training", "validation loss", tip, lambda arm: cells.interval(arm.validation_loss, loss, arm, why)),
        Column("Training", "learning rate", "the rate of the grid with the lowest validation loss", cells.chosen),
        Column("Training", "failed runs", failed, cells.failures),
    ]


def plain(
    group: str,
    label: str,
    tip: str,
    read: Callable[[Cost], float | None],
    show: Callable[[float], str],
    exact: str = "",
) -> Column:
    """A column of a figure of the costs."""
    return Column(group, label, tip, lambda arm: cells.of_cost(arm, read, show, exact))


def costs() -> list[Column]:
    """What the arms cost on any machine."""
    added = "multiply-accumulates added to a token's forward pass; below, in percent of the base's"
    return [
        plain("Cost", "trained parameters", "trained values", lambda cost: cost.trainable, WHOLE),
        plain("Cost", "file", "the stored adapter", lambda cost: cost.stored_bytes, size, "{:,.0f} bytes"),
        Column("Cost", "added MACs a token", added, cells.macs),
    ]


def time_and_memory() -> list[Column]:
    """What the arms cost on the machine of the study."""
    group = "Time and memory"

    def timed(label: str, what: str, read: Callable[[Cost], Interval | None]) -> Column:
        return Column(
            group,
            f"{label}, × base",
            f"time of {what} {TIMED}",
            lambda arm: cells.interval(read(arm.cost) if arm.cost else None, ratio, arm, cells.unmeasured(arm)),
        )

    def memory(cost: Cost) -> float | None:
        return None if cost.peak_memory_mb is None else 1e6 * cost.peak_memory_mb

    speed = Column(
        group,
        "tokens/s",
        "tokens a second in training",
        lambda arm: cells.of_cost(arm, lambda cost: cost.tokens_per_second, WHOLE),
        lower=False,
    )
    return [
        timed("forward", "a forward pass", lambda cost: cost.forward),
        timed("step", "a forward and backward pass", lambda cost: cost.step),
        speed,
        plain(group, "peak memory", "of a training step, in a fresh process", memory, size, "{:,.0f} bytes"),
        Column(group, "attach", "calibration + factorisation + build", cells.attach),
        plain(group, "load", "loading the file onto a base", lambda cost: cost.load_seconds, seconds),
    ]


def forgetting(findings: Findings) -> list[Column]:
    """A column a text or task that was not trained on."""
    names = dict.fromkeys(name for arm in findings.arms for name in arm.forgetting)
    tip = f"change of the loss on {{}}, nats a token: above zero is forgetting{RANGE}"
    return [
        Column("Forgetting", name, tip.format(name), lambda arm, name=name: cells.forgot(arm, name)) for name in names
    ]
