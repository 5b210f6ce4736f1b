"""The page docs/fidelity.md: each method's paper, our formula, the differences, the tests; from fidelity.toml."""

import importlib
import re
from pathlib import Path

import tomllib

import lora_lite as ll

HERE = Path(__file__).parent
HEAD = """# Fidelity

What each method is compared with, where it differs from its paper, and why. *Ours* is the formula at the head of the
method's file; the tests named are those of `tests/` that prove it, in fp64, on perturbed tensors.
Written by `python docs/render.py` from `docs/fidelity.toml` and the registry.
"""


def entries() -> dict[str, dict[str, list]]:
    """The hand-written part, by method."""
    return tomllib.loads((HERE / "fidelity.toml").read_text())


def formula(method: str) -> str:
    """The indented lines at the head of the method's file."""
    doc = importlib.import_module(ll.methods()[method].__module__).__doc__ or ""
    lines = [line for line in doc.splitlines() if line.startswith("    ")]
    return "\n".join(lines)


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
