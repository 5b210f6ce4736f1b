"""The site's hook: pages from outside of docs/, results beside them, and links that hold where the pages stand.

Pages are written for a reader of the repository, so a link leads from a file to a file. Here each is led to the page
that the file became; one to a source file becomes its name.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
PAGES = {  # file in the repository -> page
    "README.md": "index.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "CHANGELOG.md": "CHANGELOG.md",
    "benchmarks/README.md": "benchmarks.md",
}
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s#]*)(#[^)\s]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages, and the committed pages and pictures of studies."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text()))
    for file in sorted((ROOT / "results").rglob("*")):
        if file.suffix in {".png", ".html"}:
            name = file.relative_to(ROOT).as_posix()
            files.append(File.generated(config, name, content=file.read_bytes()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lead links to pages, and give generated parts the blank lines that this Markdown wants around them."""
    here = page.file.src_uri
    source = next((name for name, at in PAGES.items() if at == here), f"docs/{here}")
    text = re.sub(r"^<!-- (?:begin|end) \w+ -->$", "\n", markdown, flags=re.MULTILINE)
    return LINK.sub(lambda found: _link(found, source, here, files), text)


def _link(found: re.Match[str], source: str, here: str, files: Files) -> Any:
    picture, label, target, anchor = found[1], found[2], found[3], found[4] or ""
    if not target or "://" in target:
        return found[0]
    path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
    at = PAGES.get(path, path.removeprefix("docs/"))
    if files.get_file_from_path(at) is None:
        if not (ROOT / path).exists():
            return found[0]  # a broken link: strict building reports it
        return label if label.startswith("`") else f"{label} (`{path}`)"
    return f"{picture}[{label}]({posixpath.relpath(at, posixpath.dirname(here) or '.')}{anchor})"
