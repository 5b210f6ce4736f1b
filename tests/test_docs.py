"""The code blocks of README and docs run, in the order in which a reader meets them; generated parts are up to date."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from helpers import tiny_llama

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)


def stand_in_for_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub id gives a tiny model and a tokenizer without words of its own: the pages are tested without a network."""

    def tokenizer(texts: list[str], **options: Any) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.tensor([[ord(letter) % 61 for letter in text] for text in texts])}

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda name: tiny_llama())
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda name: tokenizer)


@pytest.mark.parametrize("page", [page for page in PAGES if BLOCK.search(page.read_text())], ids=lambda page: page.name)
def test_the_python_blocks_of_a_page_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    stand_in_for_the_hub(monkeypatch)
    source = "\n\n".join(BLOCK.findall(page.read_text()))
    exec(compile(source, str(page), "exec"), {"__name__": page.stem})  # the page is the test


def test_what_is_generated_in_the_pages_is_up_to_date() -> None:
    result = subprocess.run([sys.executable, ROOT / "docs" / "render.py", "--check"], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}, which is not there"


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


def test_every_folder_of_the_package_stands_in_the_tree() -> None:
    tree = (ROOT / "docs" / "architecture.md").read_text()
    for file in (ROOT / "src" / "lora_lite").rglob("__init__.py"):
        assert re.search(rf"^ *(src/)?{file.parent.name}/ +\w|^ *{file.parent.name}/ +`", tree, flags=re.MULTILINE), (
            file
        )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_files_that_a_page_names_are_there(page: Path) -> None:
    if page.name in {"README.md", "CONTRIBUTING.md", "architecture.md", "laws.md"}:  # the others name files of users
        for path in re.findall(r"\btests/[\w/]+(?:\.py)?", page.read_text()):
            assert (ROOT / path).exists(), f"{page.name} names {path}, which is not there"


def test_where_something_new_belongs_is_there() -> None:
    table = (ROOT / "docs" / "architecture.md").read_text().split("## Where do I put")[1]
    for path in re.findall(r"`((?:\w+/)*\w+\.py|(?:\w+/)+)`", table):
        folders = (ROOT, ROOT / "src" / "lora_lite", *(ROOT / "src" / "lora_lite" / "lab").iterdir())
        assert any((folder / path).exists() for folder in (*folders, ROOT / "src/lora_lite/lab/report/page")), path


@pytest.mark.slow
def test_the_site_builds_strictly_and_holds_reference_and_results(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    api = (tmp_path / "api.html").read_text()
    for name in ("lora_lite.attach", "lora_lite.scale", "lora_lite.methods.lora.LoRAConfig"):
        assert f'id="{name}"' in api, name
    assert (tmp_path / "results" / "methods" / "index.html").exists()
    home = (tmp_path / "index.html").read_text()
    assert "laws.html" in home and "docs/laws" not in home and "<table>" in home
