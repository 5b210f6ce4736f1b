"""The README.md of an adapter on the hub: what its file says of itself, and how to load it."""

import math
import re
from pathlib import Path

from lora_lite.files.description import describe
from lora_lite.methods import methods


def card(file: Path, address: str, more: str = "") -> str:
    """Markdown with the metadata that the hub reads.

    Args:
        file: the adapter's file. address: where it will be.
        more: Markdown that comes after what the file says.
    """
    found = describe(file)
    base = found["base"]["name"]
    used = dict.fromkeys(each["method"] for each in found["methods"])
    lines = ["---", "library_name: lora-lite"]
    lines += [f"base_model: {base}", "base_model_relation: adapter"] if _is_hub_id(base) else []
    lines += [
        f"tags: [lora-lite, {', '.join(used)}]",
        "---",
        "",
        f"# {'+'.join(used)} adapter of {base or 'a model'}",
        "",
    ]
    for name in used:
        facts = methods()[name].facts
        paper = f" ([arXiv:{facts.arxiv}](https://arxiv.org/abs/{facts.arxiv}))" if facts.arxiv else ""
        lines.append(f"- method: {name}, {facts.title}{paper}")
    ranks = sorted({each["config"]["r"] for each in found["methods"]})
    lines += [
        f"- r: {', '.join(map(str, ranks))}",
        f"- base: {base or 'no name'}, fingerprint {found['base']['fingerprint']}, which loading checks",
        f"- {found['trained_values']:,} trained values on {found['layers']:,} layers; {found['bytes'] / 1e6:.3g} MB",
        *(f"  - {count} x {group}" for group, count in found["targets"].items()),
    ]
    if found["train_also"]:
        sizes = ", ".join(f"{key} ({math.prod(dims):,})" for key, dims in found["train_also"].items())
        lines.append(f"- trained as well: {sizes}")
    loading = [
        "## Loading it",
        "",
        "```python",
        "import lora_lite as ll",
        "",
        f'll.load(model, "{address}")  # model: the base',
        "```",
        "",
        "For peft and vLLM, write it as a folder of theirs, once:",
        "",
        "```python",
        'print(ll.export_peft(model, "folder"))  # says what was written, and who takes it',
        "",
        "from peft import PeftModel",
        "",
        'PeftModel.from_pretrained(base_model, "folder")',
        "```",
        "",
        "```sh",
        f"vllm serve {base or 'BASE'} --enable-lora --max-lora-rank 64 --lora-modules adapter=folder",
        "```",
        "",
    ]
    return "\n".join([*lines, "", *([more.strip(), ""] if more else []), *loading])


def _is_hub_id(name: str) -> bool:
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name or "") is not None
