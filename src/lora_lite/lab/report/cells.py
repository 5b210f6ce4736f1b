"""What stands in the cells of the table of arms. A missing value is a dash, and the page says why it is missing."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import median

from lora_lite.lab import numerals
from lora_lite.lab.findings.findings import Cost, Finding, Findings
from lora_lite.lab.numerals import (
    DASH,
    Interval,
    compact,
    loss,
    p_value,
    percent,
    points,
    rate,
    seconds,
    short,
    signed,
    span,
)
from lora_lite.lab.report import sentences

ITEMS_ONLY = "items only"  # of an interval that says nothing of other seeds
UNCOMPARED = "not comparable yet: the arm or the baseline has fewer than two seeds"
WORST = 10_000  # more places than a study has arms


@dataclass(frozen=True)
class Cell:
    """What one arm has in one column.

    Attributes:
        text: the value, or the dash.
        sort: what to sort by; None puts the arm last, whichever way.
        note: smaller lines beneath.
        title: what a pointer shows; for a dash, why there is nothing.
        mark: a class of the style sheet.
        forest: for a difference, where its interval is drawn: low, mean and high, in percent of the drawing's width.
        aside: for a difference, its p-value in words; for a tie, the difference that it would have seen.
        line: the value where a cell has one line, as on a terminal; None: the text.
    """

    text: str = DASH
    sort: float | str | None = None
    note: str = ""
    title: str = ""
    mark: str = ""
    forest: tuple[float, float, float] | None = None
    aside: str = ""
    line: str | None = None

    @property
    def one_line(self) -> str:
        """The value in one line."""
        return self.text if self.line is None else self.line


def missing(why: str, arm: Finding) -> Cell:
    """A dash with its reason, and what the arm still lacks."""
    lacks = f"; still missing: {'; '.join(sentences.lacks(arm.missing))}" if arm.missing else ""
    return Cell(title=f"{why}{lacks}", mark="none")


def number(
    value: float | None, show: Callable[[float], str], arm: Finding, why: str, note: str = "", title: str = ""
) -> Cell:
    """A number, or a dash if there is none or it is not finite."""
    if value is None:
        return missing(why, arm)
    if not math.isfinite(value):
        return missing("not a finite number", arm)
    return Cell(show(value), float(value), note, title)


def interval(value: Interval | None, show: Callable[[float], str], arm: Finding, why: str, title: str = "") -> Cell:
    """A mean with its interval beneath."""
    ranges = value is not None and math.isfinite(value.low + value.high) and value.low < value.high
    note = span(value, show) if value is not None and ranges else ""
    return number(value.mean if value is not None else None, show, arm, why, note, title)


def in_brackets(cell: Cell, value: Interval | None, show: Callable[[float], str]) -> Cell:
    """A cell whose line has the interval too: "61.2% [52.1%, 69.6%]"."""
    if value is None or not cell.note:
        return cell
    return replace(cell, line=f"{cell.text} [{show(value.low)}, {show(value.high)}]")


def accuracy(arm: Finding) -> Cell:
    """Mean, interval, and each seed's own on pointing. Of one seed, the interval says that it covers items only."""
    each = ", ".join(f"seed {seed}: {percent(value)}" for seed, value in sorted(arm.by_seed.items()))
    cell = interval(arm.accuracy, percent, arm, "no accuracy measured yet", each)
    return items_only(in_brackets(cell, arm.accuracy, percent), len(arm.seeds) == 1)


def items_only(cell: Cell, so: bool) -> Cell:
    """A cell whose interval is marked as covering items only, if it is so."""
    return replace(cell, note=f"{cell.note}\n{ITEMS_ONLY}") if so and cell.note else cell


def widest(findings: Findings) -> float:
    """What the small pictures in the table reach to, on either side of zero.

    At most twice the median: a few arms far off would squeeze all the others into a point. Theirs end in an arrow.
    """
    ends = [max(abs(arm.against.low), abs(arm.against.high)) for arm in findings.arms if arm.against]
    ends = [end for end in ends if math.isfinite(end) and end > 0] or [1.0]
    return min(max(ends), 2 * median(ends))


def difference(arm: Finding, scale: float) -> Cell:
    """The difference to the baseline, and where its interval lies."""
    if arm.verdict == "baseline":
        return Cell("0", 0.0, title="the baseline itself")
    if arm.bare and arm.against is None:
        return missing("the base is not an arm", arm)
    cell = in_brackets(interval(arm.against, points, arm, UNCOMPARED), arm.against, points)
    if arm.against is None or not cell.note:
        return cell
    low, mean, high = (50 + 50 * end / scale for end in (arm.against.low, arm.against.mean, arm.against.high))
    p = p_value(arm.p) if arm.p is not None else ""
    alone = f"by itself, this comparison's interval is {span(arm.alone, points)}" if arm.alone is not None else ""
    cell = replace(cell, mark=arm.verdict or "tie", forest=(low, mean, high), aside=p, title=alone)
    return items_only(cell, not arm.verdict)


def verdict(arm: Finding) -> Cell:
    """In a word, and whether the rate was chosen at the grid's edge."""
    if arm.bare or (not arm.verdict and arm.accuracy is None):
        return missing("the base is not an arm" if arm.bare else "no accuracy measured yet", arm)
    title = "; ".join(filter(None, ["" if arm.verdict else UNCOMPARED, sentences.edge_tip(arm)]))
    word, mark, sees = sentences.VERDICTS[arm.verdict], f"verdict {arm.verdict or 'open'}", could_see(arm)
    line = f"{word} ({sees})" if sees else word
    order = list(sentences.VERDICTS).index(arm.verdict)
    return Cell(word, order, sentences.edge(arm), title, mark, aside=sees, line=line)


def could_see(arm: Finding) -> str:
    """What difference a tie would have shown; "" of other verdicts."""
    return numerals.seen(arm.seen) if arm.verdict == "tie" else ""


def gist(arm: Finding) -> list[tuple[str, str]]:
    """What stands below an arm's name where the table's other columns are out of sight: (class, words)."""
    if arm.bare:
        return []
    standing = verdict(arm)
    words = [(standing.mark, standing.text if standing.mark != "none" else "not measured yet")]
    words += [("", f"place {place(arm).text}")] if arm.places is not None else []
    words += [("flag", f"{seeds(arm).text} seeds")] if len(arm.seeds) < arm.wanted_seeds else []
    return words + ([("flag", sentences.edge(arm))] if arm.edge else [])


def place(arm: Finding) -> Cell:
    """A range, unless the data settle it."""
    if arm.places is None:
        return missing("the base is not an arm" if arm.bare else "no accuracy to compare yet", arm)
    best, worst = arm.places
    return Cell(str(best) if best == worst else f"{best}–{worst}", best + worst / WORST)


def seeds(arm: Finding) -> Cell:
    """Measured of wanted."""
    if arm.bare:
        return missing("nothing is trained", arm)
    listed = f"seeds {', '.join(map(str, arm.seeds))}" if arm.seeds else "none yet"
    few = "flag" if len(arm.seeds) < arm.wanted_seeds else ""
    line = f"{len(arm.seeds)}/{arm.wanted_seeds}"
    return Cell(f"{len(arm.seeds)} of {arm.wanted_seeds}", float(len(arm.seeds)), title=listed, mark=few, line=line)


def chosen(arm: Finding) -> Cell:
    """The rate, flagged where the best may lie beyond the grid."""
    if arm.bare:
        return missing("nothing is trained", arm)
    edge = sentences.edge(arm)
    cell = number(arm.rate, rate, arm, "not all rates of the grid are tried yet", edge)
    if not edge:
        return cell
    return replace(cell, title=sentences.edge_tip(arm), mark="flag", line=f"{cell.text} ({edge})")


def of_cost(arm: Finding, read: Callable[[Cost], float | None], show: Callable[[float], str], exact: str = "") -> Cell:
    """A number of the arm's costs. exact: the format that shows it in full on pointing."""
    value = read(arm.cost) if arm.cost is not None else None
    title = exact.format(value) if exact and value is not None else ""
    return number(value, show, arm, unmeasured(arm), title=title)


def unmeasured(arm: Finding) -> str:
    """Why a cost is missing."""
    return "the base has no adapter" if arm.bare else "not measured yet"


def macs(arm: Finding) -> Cell:
    """Added work a token, and its share of the base's."""
    cost = arm.cost
    if cost is None or cost.macs_token is None:
        return missing(unmeasured(arm), arm)
    share = f"{percent(cost.macs_token / cost.base_macs_token, 2)} of the base" if cost.base_macs_token else ""
    once = f", and {cost.macs_step:,} once a pass" if cost.macs_step else ""
    return Cell(compact(cost.macs_token), float(cost.macs_token), share, f"{cost.macs_token:,} a token{once}")


def attach(arm: Finding) -> Cell:
    """Seconds to attach, with their parts."""
    parts = arm.cost.attach_seconds if arm.cost is not None else {}
    if not parts:
        return missing(unmeasured(arm), arm)
    title = ", ".join(f"{part} {seconds(value)}" for part, value in parts.items())
    note = " + ".join(short(value, 2) for value in parts.values())
    return number(sum(parts.values()), seconds, arm, "", note, title)


def forgot(arm: Finding, name: str) -> Cell:
    """After minus before; of the base, the loss itself."""
    change = arm.forgetting.get(name)
    if change is None:
        return missing(f"loss on {name} not measured yet", arm)
    if arm.bare:
        return Cell(f"loss {loss(change.before)}", change.before, title="what the arms' changes are counted from")
    low, mean, high = (end - change.before for end in (change.after.low, change.after.mean, change.after.high))
    title = f"from {loss(change.before)} to {loss(change.after.mean)}"
    return interval(Interval(mean, low, high), signed, arm, "", title)


def failures(arm: Finding) -> Cell:
    """How many."""
    count, why = len(arm.failures), "\n".join(map(sentences.failed, arm.failures))
    return Cell(str(count), float(count), title=why, mark="flag" if count else "", line=str(count or DASH))
