"""The table of arms: its columns, in order."""

from collections.abc import Callable
from dataclasses import dataclass

from lora_lite.lab.findings import Cost, Finding, Findings, Interval
from lora_lite.lab.numerals import loss, percent, ratio, seconds, size
from lora_lite.lab.page import cells
from lora_lite.lab.page.cells import Cell

WHOLE = "{:,.0f}".format
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
    return [*outcome(findings), *tuning(), *costs(), *forgetting(findings), trouble()]


def outcome(findings: Findings) -> list[Column]:
    """How well the arms do."""
    scale = cells.widest(findings)

    def high(label: str, tip: str, cell: Callable[[Finding], Cell]) -> Column:
        return Column("Outcome", label, tip, cell, lower=False)

    def share(value: float | None, arm: Finding) -> Cell:
        return cells.number(value, percent, arm, "not measured yet")

    against = f"paired difference on the same items and seeds, in percentage points{RANGE}"
    decided = "better or worse if zero is surely out, the number of arms allowed for; else a tie"
    return [
        high("accuracy", f"share of test items answered right, mean over seeds{RANGE}", cells.accuracy),
        high(f"difference to {findings.baseline}", against, lambda arm: cells.difference(arm, scale)),
        Column("Outcome", "verdict", decided, cells.verdict, words=True),
        Column("Outcome", "place", "best to worst place that the data allow", cells.place),
        high("seeds", "seeds measured, of those that the study asks for", cells.seeds),
        high("answer anywhere", "replies with the right answer anywhere", lambda arm: share(arm.mentioned, arm)),
        Column("Outcome", "cut off", "replies that reached the longest length", lambda arm: share(arm.cut_off, arm)),
    ]


def tuning() -> list[Column]:
    """How they were trained."""
    tip = f"mean loss on validation items at the chosen rate, nats a token{RANGE}"
    why = "no run at the chosen rate yet"
    return [
        Column("Tuning", "validation loss", tip, lambda arm: cells.interval(arm.validation_loss, loss, arm, why)),
        Column("Tuning", "learning rate", "the rate of the grid with the lowest validation loss", cells.chosen),
    ]


def costs() -> list[Column]:
    """What they cost."""

    def plain(
        group: str,
        label: str,
        tip: str,
        read: Callable[[Cost], float | None],
        show: Callable[[float], str],
        exact: str = "",
    ) -> Column:
        return Column(group, label, tip, lambda arm: cells.of_cost(arm, read, show, exact))

    def timed(label: str, what: str, read: Callable[[Cost], Interval | None]) -> Column:
        return Column(
            "Compute",
            f"{label}, × base",
            f"time of {what} {TIMED}",
            lambda arm: cells.interval(read(arm.cost) if arm.cost else None, ratio, arm, cells.unmeasured(arm)),
        )

    def memory(cost: Cost) -> float | None:
        return None if cost.peak_memory_mb is None else 1e6 * cost.peak_memory_mb

    added = "multiply-accumulates added to a token's forward pass; below, in percent of the base's"
    time = "Memory and time"
    return [
        plain("Size", "trained parameters", "trained values", lambda cost: cost.trainable, WHOLE),
        plain("Size", "file", "the stored adapter", lambda cost: cost.stored_bytes, size, "{:,.0f} bytes"),
        Column("Compute", "added MACs a token", added, cells.macs),
        timed("forward", "a forward pass", lambda cost: cost.forward),
        timed("step", "a forward and backward pass", lambda cost: cost.step),
        plain("Compute", "tokens/s", "tokens a second in training", lambda cost: cost.tokens_per_second, WHOLE),
        plain(time, "peak memory", "of a training step, in a fresh process", memory, size, "{:,.0f} bytes"),
        Column(time, "attach", "calibration + factorisation + build", cells.attach),
        plain(time, "load", "loading the file onto a base", lambda cost: cost.load_seconds, seconds),
    ]


def forgetting(findings: Findings) -> list[Column]:
    """A column a text or task that was not trained on."""
    names = dict.fromkeys(name for arm in findings.arms for name in arm.forgetting)
    tip = f"change of the loss on {{}}, nats a token: above zero is forgetting{RANGE}"
    return [
        Column("Forgetting", name, tip.format(name), lambda arm, name=name: cells.forgot(arm, name)) for name in names
    ]


def trouble() -> Column:
    """What failed."""
    return Column("Trouble", "failed runs", "runs that ended in an error; reasons below the table", cells.failures)
