"""Tables for terminals: whole words at any width."""

import io

import pytest
from rich.console import Console

import page_studies
from lora_lite.lab.report import columns, tables


@pytest.mark.parametrize("width", [80, 120, 400])
def test_a_terminal_of_any_width_shows_whole_cells(width: int) -> None:
    findings = page_studies.whole({name: page_studies.ARMS[name] for name in ("lora", "dora", "ia3")})
    console = Console(width=width, file=io.StringIO())
    console.print(tables.terminal(findings, width))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    lines = text.splitlines()
    every = tables.grid(findings, columns.columns(findings))
    row = next(line for line in lines if " dora " in line)
    shown = [cell.strip() for cell in row.strip("│┃ ").split("│")]
    assert shown == next(line for line in every if line[0] == "dora")[: len(shown)] and len(shown) >= 3
    assert (len(shown) == len(every[0])) == (width == 400) == ("on the page too" not in text)
