"""The columns of the table of arms, in order and in groups. Terminal, Markdown and page all read this one list.

A page shows the first group at first, and a reader switches on the others; a terminal shows as many as fit.
"""

from collections.abc import Callable
from dataclasses import dataclass

from lora_lite.lab.findings.findings import Cost, Finding, Findings
from lora_lite.lab.numerals import Interval, compact, loss, percent, ratio, seconds, size
from lora_lite.lab.report import cells
from lora_lite.lab.report.cells import Cell

WHOLE = "{:,.0f}".format
RESULT, STANDING, TRAINING = "Result", "Places and seeds", "Training"
REPLIES, TIME, FORGETTING = "Replies", "Time and memory", "Forgetting"
RANGE = "; below, its 95% interval"
TIMED = "as a multiple of the frozen base's, in the same process: median, and quartiles below"


@dataclass(frozen=True)
class Column:
    """A column, one cell an arm.

    Attributes:
        group: what a reader switches on and off together.
        label: its header on the page. short: its header where a column has one line; "": the same.
        tip: what it means.
        lower: the first click sorts by rising value. words: it holds words.
    """

    group: str
    label: str
    tip: str
    cell: Callable[[Finding], Cell]
    short: str = ""
    lower: bool = True
    words: bool = False

    @property
    def title(self) -> str:
        """Its header in one line."""
        return self.short or self.label


def columns(findings: Findings) -> list[Column]:
    """All columns after the first, which is the arm."""
    return [*outcome(findings), *standing(), *training(), *replies(), *time_and_memory(), *forgetting(findings)]


def outcome(findings: Findings) -> list[Column]:
    """What decides: how well the arms do, and how large they are."""
    scale = cells.widest(findings)
    right = f"share of test items answered correctly, mean over seeds{RANGE}"
    against = (
        "difference on the same items, in percentage points; below, the 95% interval that holds for all arms together, "
        "and p, adjusted likewise"
    )
    decided = (
        "better or worse if the interval leaves out zero; else a tie, with the points that this study would have seen"
    )

    def difference(arm: Finding) -> Cell:
        return cells.difference(arm, scale)

    reference = findings.baseline
    return [
        Column(RESULT, "accuracy", right, cells.accuracy, "accuracy [95%]", lower=False),
        Column(RESULT, f"difference to {reference}", against, difference, f"points against {reference}", lower=False),
        Column(RESULT, "verdict", decided, cells.verdict, words=True),
        plain(RESULT, "trained parameters", "trained values", lambda cost: cost.trainable, compact, "{:,}", "trained"),
        plain(RESULT, "file", "the stored adapter", lambda cost: cost.stored_bytes, size, "{:,.0f} bytes"),
    ]


def standing() -> list[Column]:
    """Where the arms stand among all, and on how many seeds."""
    asked = "seeds measured, of those that the study asks for"
    return [
        Column(STANDING, "place", "best to worst place that the data allow", cells.place),
        Column(STANDING, "seeds", asked, cells.seeds, lower=False),
    ]


def training() -> list[Column]:
    """How the arms were trained, and what failed."""
    tip = f"mean loss on validation items at the chosen rate, nats a token{RANGE}"
    failed = "runs that ended in an error; reasons below the table"

    def validation(arm: Finding) -> Cell:
        return cells.interval(arm.validation_loss, loss, arm, "no run at the chosen rate yet")

    return [
        Column(TRAINING, "validation loss", tip, validation, "val. loss"),
        Column(TRAINING, "learning rate", "the rate tried that has the lowest validation loss", cells.chosen, "rate"),
        Column(TRAINING, "failed runs", failed, cells.failures, "failed"),
    ]


def replies() -> list[Column]:
    """What the replies look like beside being right."""

    def share(value: float | None, arm: Finding) -> Cell:
        return cells.number(value, percent, arm, "not measured yet")

    anywhere, cut = "replies with the right answer anywhere", "replies that reached the longest length"
    return [
        Column(REPLIES, "answer anywhere", anywhere, lambda arm: share(arm.mentioned, arm), "anywhere", lower=False),
        Column(REPLIES, "cut off", cut, lambda arm: share(arm.cut_off, arm)),
    ]


def plain(
    group: str,
    label: str,
    tip: str,
    read: Callable[[Cost], float | None],
    show: Callable[[float], str],
    exact: str = "",
    short: str = "",
) -> Column:
    """A column of a figure of the costs."""
    return Column(group, label, tip, lambda arm: cells.of_cost(arm, read, show, exact), short)


def timed(label: str, what: str, read: Callable[[Cost], Interval | None]) -> Column:
    """A column of a time as a multiple of the base's."""

    def cell(arm: Finding) -> Cell:
        return cells.interval(read(arm.cost) if arm.cost else None, ratio, arm, cells.unmeasured(arm))

    return Column(TIME, f"{label}, × base", f"time of {what} {TIMED}", cell, label)


def time_and_memory() -> list[Column]:
    """What the arms cost: counted, and measured on the machine of the study."""
    added = "multiply-accumulates added to a token's forward pass; below, in percent of the base's"

    def memory(cost: Cost) -> float | None:
        return None if cost.peak_memory_mb is None else 1e6 * cost.peak_memory_mb

    def speed(arm: Finding) -> Cell:
        return cells.of_cost(arm, lambda cost: cost.tokens_per_second, WHOLE)

    return [
        Column(TIME, "added MACs a token", added, cells.macs, "MACs/token"),
        timed("forward", "a forward pass", lambda cost: cost.forward),
        timed("step", "a forward and backward pass", lambda cost: cost.step),
        Column(TIME, "tokens/s", "tokens a second in training", speed, lower=False),
        plain(TIME, "peak memory", "of a training step, in a fresh process", memory, size, "{:,.0f} bytes", "memory"),
        Column(TIME, "attach", "calibration + factorisation + build", cells.attach),
        plain(TIME, "load", "loading the file onto a base", lambda cost: cost.load_seconds, seconds),
    ]


def forgetting(findings: Findings) -> list[Column]:
    """A column a text or task that was not trained on."""
    names = dict.fromkeys(name for arm in findings.arms for name in arm.forgetting)

    def column(name: str) -> Column:
        tip = f"change of the loss on {name}, nats a token: above zero is forgetting{RANGE}"
        return Column(FORGETTING, name, tip, lambda arm: cells.forgot(arm, name), f"{name}, nats")

    return [column(name) for name in names]
