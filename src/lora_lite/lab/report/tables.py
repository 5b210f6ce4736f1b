"""Findings as tables: for a terminal and as Markdown. `cells` lists their columns, `page/table.py` the page's."""

import itertools
import re
from collections.abc import Callable, Container

from rich.table import Table

from lora_lite.lab import numerals
from lora_lite.lab import terminal as terminals
from lora_lite.lab.findings.findings import Change, Cost, Finding, Findings
from lora_lite.lab.numerals import Interval
from lora_lite.lab.studies.arms import BASE
from lora_lite.printable import one_line

NOTHING = "-"
CELL_FRAME = 3  # characters that a table draws beside each cell
LEAST_COLUMNS = 3  # shown on however narrow a terminal: method, accuracy, difference
MARKUP = re.compile(r"[\\|`*]|\](?=[(\[])|(?<!\w)_|_(?!\w)|~(?=~)|!(?=\[)")  # what Markdown may take for its own
Cell = Callable[[Finding], str]


def percent(value: Interval | None) -> str:
    """ "61.2% [52.1%, 69.6%]"."""
    return NOTHING if value is None else f"{numerals.percent(value.mean)} [{_ends(value, numerals.percent)}]"


def _ends(value: Interval, show: Callable[[float], str]) -> str:
    return f"{show(value.low)}, {show(value.high)}"


def against(found: Finding) -> str:
    """The difference to the baseline in points, and what may be said of it."""
    if found.against is None:
        return found.verdict or NOTHING
    ends = _ends(found.against, numerals.points)
    word = f"tie ({numerals.seen(found.seen)})" if found.verdict == "tie" else found.verdict
    return f"{numerals.points(found.against.mean)} [{ends}] {word}".strip()


def place(found: Finding) -> str:
    """ "1-4": the places that the data allow."""
    return NOTHING if found.places is None else "-".join(map(str, dict.fromkeys(found.places)))


def rate(found: Finding) -> str:
    """The chosen rate, with a word where it is the end of the grid: the best may lie beyond."""
    if found.rate is None:
        return NOTHING
    return numerals.rate(found.rate) + (f" ({found.edge} tried)" if found.edge else "")


def change(value: Change | None) -> str:
    """How a loss moved, in nats a token."""
    return NOTHING if value is None else numerals.signed(value.after.mean - value.before)


def of_cost(read: Callable[[Cost], float | None], show: Callable[[float], str]) -> Cell:
    """The cell of a figure of the costs."""

    def cell(found: Finding) -> str:
        value = None if found.cost is None else read(found.cost)
        return NOTHING if value is None else show(value)

    return cell


def mean(value: Interval | None) -> float | None:
    """The mean of what may be missing."""
    return None if value is None else value.mean


def attaching(cost: Cost) -> float | None:
    """Seconds of all phases."""
    return sum(cost.attach_seconds.values()) if cost.attach_seconds else None


def cells(findings: Findings) -> dict[str, Cell]:
    """Column title -> the cell of an arm."""
    elsewhere = dict.fromkeys(name for arm in findings.arms for name in arm.forgetting)
    return {
        "method": lambda found: found.arm,
        "accuracy [95%]": lambda found: percent(found.accuracy),
        f"points against {findings.baseline}": against,
        "place": place,
        "seeds": lambda found: NOTHING if found.arm == BASE else f"{len(found.seeds)}/{found.wanted_seeds}",
        "val. loss": lambda found: NOTHING if (loss := mean(found.validation_loss)) is None else numerals.loss(loss),
        "rate": rate,
        "trained": of_cost(lambda cost: cost.trainable, numerals.compact),
        "file": of_cost(lambda cost: cost.stored_bytes, numerals.size),
        "MACs/token": of_cost(lambda cost: cost.macs_token, numerals.compact),
        "forward": of_cost(lambda cost: mean(cost.forward), numerals.ratio),
        "step": of_cost(lambda cost: mean(cost.step), numerals.ratio),
        "memory, MB": of_cost(lambda cost: cost.peak_memory_mb, "{:,.0f}".format),
        "attach": of_cost(attaching, numerals.seconds),
        **{f"{name}, nats": lambda found, name=name: change(found.forgetting.get(name)) for name in elsewhere},
    }


def rows(findings: Findings) -> list[Finding]:
    """The base, if it is measured, and the arms."""
    return [*([findings.base] if findings.base else []), *findings.arms]


def terminal(findings: Findings, width: int) -> Table:
    """For a terminal of so many characters a line. Columns that do not fit are left out, from the last; all are on the
    page."""
    columns = cells(findings)
    lines = [[one_line(cell(found)) for cell in columns.values()] for found in rows(findings)]
    wide = [max(map(len, column)) + CELL_FRAME for column in zip(list(columns), *lines, strict=True)]
    fits = max(LEAST_COLUMNS, sum(total < width for total in itertools.accumulate(wide)))
    rest = list(columns)[fits:]
    table = terminals.table(headline(findings), f"on the page too: {', '.join(rest)}" if rest else "")
    for index, title in enumerate(list(columns)[:fits]):
        terminals.column(table, title, right=index > 0, no_wrap=index == 0)
    for line in lines:
        terminals.row(table, line[:fits])
    return table


def markdown(findings: Findings, titles: Container[str] | None = None) -> str:
    """As Markdown; titles: the columns to show (None: all). Columns that are empty throughout are left out."""
    columns = {title: cell for title, cell in cells(findings).items() if titles is None or title in titles}
    lines = [[cell(found) for cell in columns.values()] for found in rows(findings)]
    kept = [index for index in range(len(columns)) if any(line[index] != NOTHING for line in lines)]
    table = [[line[index] for index in kept] for line in [list(columns), ["---"] * len(columns), *lines]]
    return "\n".join(f"| {' | '.join(map(as_markdown, line))} |" for line in table)


def as_markdown(text: str) -> str:
    """A text for a cell of a Markdown table, which is shown as it is: nothing in it is markup or HTML."""
    plain = re.sub(
        r"[\\|`*]|\](?=[(\[])|(?<!\w)_|_(?!\w)|~(?=~)|!(?=\[)", lambda found: "\\" + found[0], one_line(text)
    )
    return plain.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def headline(findings: Findings) -> str:
    """What was measured, in a line."""
    return (
        f"{findings.name}: {findings.model} ({findings.dtype}, quantization {findings.quantization}) on "
        f"{findings.task}, {findings.items} test items, {findings.steps} steps of {findings.batch_size}"
    )
