"""The door to the terminal: whatever is shown of files, models and users goes through here.

Nothing in a text acts: brackets are no markup, colons no emoji, and control sequences are shown as escapes.
"""

import sys
from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text
from tqdm.auto import tqdm

from lora_lite.printable import one_line, printable


def console(**options: Any) -> Console:
    """A console that takes text as it is."""
    return Console(markup=False, highlight=False, emoji=False, **options)


def line(where: Console, text: object = "") -> None:
    """Print a text that may have several lines."""
    where.print(Text(printable(text)))


def note(text: object) -> None:
    """A line about what is going on, above the bars of progress."""
    tqdm.write(printable(text))


def cell(text: object) -> Text:
    """A text for a cell, a title or a caption of a table."""
    return Text(printable(text))


def table(title: object = "", caption: object = "", show_header: bool = True) -> Table:
    """An empty table."""
    return Table(
        title=cell(title) if title else None, caption=cell(caption) if caption else None, show_header=show_header
    )


def column(grid: Table, title: object, right: bool = False, no_wrap: bool = False) -> None:
    """Add a column, with numbers on the right."""
    grid.add_column(cell(title), justify="right" if right else "left", no_wrap=no_wrap)


def row(grid: Table, cells: Iterable[object], style: str = "") -> None:
    """Add a row. Names are on one line."""
    grid.add_row(*(Text(one_line(each)) for each in cells), style=style)


def piece(text: object) -> None:
    """A part of a text that goes on, such as of a reply as it comes, on standard output."""
    print(printable(text), end="", flush=True)


def remark(text: object) -> None:
    """A line about the output, which does not belong to it: on standard error."""
    print(printable(text), file=sys.stderr, flush=True)
