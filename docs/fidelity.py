"""The page docs/fidelity.md: each method's paper, our formula, the differences, the tests; from fidelity.toml."""

import importlib
import re
import textwrap
from pathlib import Path
from typing import Any

import tomllib

import lora_lite as ll

HERE = Path(__file__).parent
HEAD = """# Fidelity

What each method is compared with, where it differs from its paper, and why. *Ours* is the formula at the head of the
method's file; the tests named are those of `tests/` that prove it, in fp64, on perturbed tensors.
Written by `python docs/render.py` from `docs/fidelity.toml` and the registry.
"""


def entries() -> dict[str, dict[str, Any]]:
    """The hand-written part, by method."""
    return tomllib.loads((HERE / "fidelity.toml").read_text())


def formula(method: str) -> str:
    """The formula: the second paragraph at the head of the method's file."""
    doc = importlib.import_module(ll.methods()[method].__module__).__doc__ or ""
    return textwrap.indent(textwrap.dedent(doc.split("\n\n")[1].strip("\n")), "    ")


def reference(entry: dict[str, Any]) -> list[str]:
    """A line for the code that was read beside the paper, if there is a link to it."""
    if "code" not in entry:
        return []
    owner, repository, _, commit, path = entry["code"].removeprefix("https://github.com/").split("/", 4)
    return [f"Reference code: [{owner}/{repository}, {path} at {commit[:7]}]({entry['code']}).", ""]


def page() -> str:
    """The whole page."""
    parts = [HEAD]
    for method, cls in ll.methods().items():
        entry = entries()[method]
        doc = (importlib.import_module(cls.__module__).__doc__ or "").splitlines()[0]
        parts += [
            f"## {method}",
            "",
            f"{re.sub(r'arXiv:.*', '', doc).strip(' .,:')}: [{cls.facts.title}](https://arxiv.org/abs/{cls.facts.arxiv}).",
            "",
            f"Paper: {entry['paper']}",
            "",
            *reference(entry),
            f"Ours:\n\n{formula(method)}",
            "",
        ]
        if entry["differences"]:
            parts += ["| differs | verdict |", "|---|---|"]
            parts += [f"| {what} | deliberate: {why} |" for what, why in entry["differences"]]
        else:
            parts.append("Differences: none; the same.")
        parts += ["", "Proven by " + ", ".join(f"`{test}`" for test in entry["tests"]) + ".", ""]
    return "\n".join(parts)
