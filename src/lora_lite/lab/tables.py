"""Findings as tables: for a terminal and as Markdown. `CELLS` is the one list of columns."""

from collections.abc import Callable, Container

from rich.table import Table

from lora_lite.lab.arms import BASE
from lora_lite.lab.findings import Change, Finding, Findings, Interval

NOTHING = "-"


def percent(value: Interval | None, signed: bool = False) -> str:
    """ "61.2 [52.1, 69.6]", in percent (differences: in points, with signs)."""
    if value is None:
        return NOTHING
    sign = "+" if signed else ""
    return f"{100 * value.mean:{sign}.1f} [{100 * value.low:{sign}.1f}, {100 * value.high:{sign}.1f}]"


def short(number: float | None) -> str:
    """A count with a unit: 4,884,480 -> "4.88 M"."""
    if number is None:
        return NOTHING
    for size, unit in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(number) >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.0f}"


def rate(found: Finding) -> str:
    """The chosen rate, with a sign where it is the end of the grid: the best may lie beyond."""
    sign = {"lowest": " (lowest tried)", "highest": " (highest tried)"}.get(found.edge, "")
    return f"{found.rate:g}{sign}" if found.rate is not None else NOTHING


def place(found: Finding) -> str:
    """ "1-4": the places that the data allow."""
    if found.places is None:
        return NOTHING
    best, worst = found.places
    return str(best) if best == worst else f"{best}-{worst}"


def against(found: Finding) -> str:
    """The difference to the baseline, and what may be said of it."""
    if found.against is None:
        return found.verdict or NOTHING
    return f"{percent(found.against, signed=True)} {found.verdict}"


def change(value: Change | None) -> str:
    """How a loss moved, in nats a token."""
    return NOTHING if value is None else f"{value.after.mean - value.before:+.3f}"


def ratio(value: Interval | None) -> str:
    """ "1.16x"."""
    return NOTHING if value is None else f"{value.mean:.2f}x"


def _cost(read: Callable[..., str], name: str) -> Callable[[Finding], str]:
    return lambda found: NOTHING if found.cost is None else read(getattr(found.cost, name))


def _memory(value: float | None) -> str:
    return NOTHING if value is None else f"{value:,.0f}"


def _seconds(found: Finding) -> str:
    if found.cost is None or not found.cost.attach_seconds:
        return NOTHING
    return f"{sum(found.cost.attach_seconds.values()):.1f}"


def cells(findings: Findings) -> dict[str, Callable[[Finding], str]]:
    """Column title -> the cell of an arm."""
    elsewhere = dict.fromkeys(name for arm in findings.arms for name in arm.forgetting)
    return {
        "method": lambda found: found.arm,
        "accuracy, % [95%]": lambda found: percent(found.accuracy),
        f"against {findings.baseline}, points": against,
        "place": place,
        "seeds": lambda found: NOTHING if found.arm == BASE else f"{len(found.seeds)}/{found.wanted_seeds}",
        "val. loss": lambda found: NOTHING if found.validation_loss is None else f"{found.validation_loss.mean:.3f}",
        "rate": rate,
        "trained": _cost(short, "trainable"),
        "file, bytes": _cost(short, "stored_bytes"),
        "MACs/token": _cost(short, "macs_token"),
        "forward": _cost(ratio, "forward"),
        "step": _cost(ratio, "step"),
        "memory, MB": _cost(_memory, "peak_memory_mb"),
        "attach, s": _seconds,
        **{f"{name}, nats": lambda found, name=name: change(found.forgetting.get(name)) for name in elsewhere},
    }


def rows(findings: Findings) -> list[Finding]:
    """The base, if it is measured, and the arms."""
    return [*([findings.base] if findings.base else []), *findings.arms]


def terminal(findings: Findings) -> Table:
    """For a terminal."""
    columns = cells(findings)
    table = Table(title=headline(findings))
    for index, title in enumerate(columns):
        table.add_column(title, justify="left" if index == 0 else "right", no_wrap=index == 0)
    for found in rows(findings):
        table.add_row(*(cell(found) for cell in columns.values()))
    return table


def markdown(findings: Findings, titles: Container[str] | None = None) -> str:
    """As Markdown; titles: the columns to show (None: all). Columns that are empty throughout are left out."""
    columns = {title: cell for title, cell in cells(findings).items() if titles is None or title in titles}
    lines = [[cell(found) for cell in columns.values()] for found in rows(findings)]
    kept = [index for index in range(len(columns)) if any(line[index] != NOTHING for line in lines)]
    table = [[line[index] for index in kept] for line in [list(columns), ["---"] * len(columns), *lines]]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in table)


def headline(findings: Findings) -> str:
    """What was measured, in a line."""
    return (
        f"{findings.name}: {findings.model} ({findings.dtype}, quantization {findings.quantization}) on "
        f"{findings.task}, {findings.items} test items, {findings.steps} steps of {findings.batch_size}"
    )
