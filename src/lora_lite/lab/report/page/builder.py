"""From findings to `index.html` and the pictures beside it."""

import re
from itertools import groupby
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from lora_lite.files.atomic import expanded, write_atomically
from lora_lite.lab.findings.findings import Findings, shown
from lora_lite.lab.numerals import short
from lora_lite.lab.report import cells, sentences
from lora_lite.lab.report.columns import columns
from lora_lite.lab.report.page.drawing import PALETTE
from lora_lite.lab.report.page.plots import Plots, plot
from lora_lite.lab.scoring.scoring import RIGHT

HERE = Path(__file__).parent
ARXIV = re.compile(r"\d{4}\.\d{4,5}(v\d+)?|[a-z-]+(\.[A-Z]{2})?/\d{7}")


def write_page(findings: Findings, folder: Path) -> list[Path]:
    """Write the page of a study: `folder`/index.html, one file that needs no network, and its pictures as PNG files.

    Everything is made before anything is written, and each file is replaced atomically, the page last.
    Returns the files, the page first. Raises NotADirectoryError if `folder` is a file.
    """
    folder = expanded(folder)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file, and a page is several: give a folder, existing or new")
    findings = shown(findings)
    plots = plot(findings)
    page = render(findings, plots)
    for name, data in plots.files.items():
        write_atomically(folder / name, data)
    write_atomically(folder / "index.html", page.encode())
    return [folder / "index.html", *(folder / name for name in plots.files)]


def render(findings: Findings, plots: Plots) -> str:
    """The page as text."""
    # Autoescape: replies, names and reasons come from models, users and exceptions.
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["arxiv"] = lambda text: text if ARXIV.fullmatch(text) else ""
    environment.filters["safe_svg"] = Markup
    environment.filters["short"] = lambda value: short(value, 2)
    listed = columns(findings)
    groups = [(name, len(list(group))) for name, group in groupby(listed, key=lambda column: column.group)]
    return environment.get_template("page.html.j2").render(
        findings=findings,
        plots=plots,
        columns=listed,
        groups=groups,
        group_of={name: f"g{index}" for index, (name, _) in enumerate(groups)},
        gist=cells.gist,
        say=sentences,
        right=RIGHT,
        repliers=list(dict.fromkeys(reply.arm for item in findings.examples for reply in item.replies)),
        palette=PALETTE,
        style=Markup((HERE / "page.css").read_text(encoding="utf-8")),
        script=Markup((HERE / "page.js").read_text(encoding="utf-8")),
    )
