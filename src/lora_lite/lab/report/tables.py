"""Findings as tables of text: for a terminal and as Markdown. Their columns are those of the page: see `columns`."""

import itertools
import re
from collections.abc import Collection

from rich.console import Group

from lora_lite.lab import terminal as terminals
from lora_lite.lab.findings.findings import Finding, Findings
from lora_lite.lab.numerals import DASH
from lora_lite.lab.report import sentences
from lora_lite.lab.report.columns import Column, columns
from lora_lite.printable import one_line

CELL_FRAME = 3  # characters that a table draws beside each cell
LEAST_COLUMNS = 3  # shown on however narrow a terminal: arm, accuracy, difference
MARKUP = re.compile(r"[\\|`*]|\](?=[(\[])|(?<!\w)_|_(?!\w)|~(?=~)|!(?=\[)")  # what Markdown may take for its own


def line_of(arm: Finding, shown: Collection[Column]) -> list[str]:
    """An arm's row: its name, and each column's value in one line."""
    return [one_line(text) for text in (arm.arm, *(column.cell(arm).one_line for column in shown))]


def grid(findings: Findings, shown: Collection[Column]) -> list[list[str]]:
    """The header and the rows. Columns that are empty throughout are left out."""
    header = ["arm", *(column.title for column in shown)]
    lines = [line_of(arm, shown) for arm in findings.rows]
    kept = [at for at in range(len(header)) if any(line[at] != DASH for line in lines)]
    return [[line[at] for at in kept] for line in (header, *lines)]


def terminal(findings: Findings, width: int) -> Group:
    """For a terminal of so many characters a line: what was found, in a sentence, and the table.

    Columns that do not fit are left out, from the last; all are on the page.
    """
    header, *lines = grid(findings, columns(findings))
    wide = [max(map(len, column)) + CELL_FRAME for column in zip(header, *lines, strict=True)]
    fits = max(LEAST_COLUMNS, sum(total < width for total in itertools.accumulate(wide)))
    rest = header[fits:]
    table = terminals.table(sentences.headline(findings), f"on the page too: {', '.join(rest)}" if rest else "")
    for index, title in enumerate(header[:fits]):
        terminals.column(table, title, right=index > 0, no_wrap=index == 0)
    for line in lines:
        terminals.row(table, line[:fits])
    return Group(terminals.cell(sentences.decision(findings)), table)


def markdown(findings: Findings, groups: Collection[str] | None = None) -> str:
    """As Markdown: what was found, in a sentence, and the table. groups: of the columns to show (None: all)."""
    shown = [column for column in columns(findings) if groups is None or column.group in groups]
    header, *lines = grid(findings, shown)
    rows = "\n".join(f"| {' | '.join(map(as_markdown, line))} |" for line in (header, ["---"] * len(header), *lines))
    return f"{as_markdown(sentences.decision(findings))}\n\n{rows}"


def as_markdown(text: str) -> str:
    """A text in Markdown, on one line, that is shown as it is: nothing in it is markup or HTML."""
    plain = MARKUP.sub(lambda mark: "\\" + mark[0], one_line(text))
    return plain.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
