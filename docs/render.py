"""Write the generated parts of README.md: `python docs/render.py`; with `--check`, fail if they are out of date.

A generated part stands between `<!-- begin NAME -->` and `<!-- end NAME -->`.
"""

import json
import re
import sys
from pathlib import Path

import lora_lite as ll
from lora_lite.cli import facts

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
DEMO = ROOT / "results" / "demo.json"


def methods() -> str:
    """The table of methods, from the registry."""
    lines = [
        "| method | paper | acts | needs data | starts at the base | settings |",
        "|---|---|---|---|---|---|",
    ]
    common = {field for field in ll.AdapterConfig().to_dict()} - {"r", "alpha", "target_names"}
    for name, cls in ll.variants().items():
        known = facts(cls)
        paper = f"[{cls.title}](https://arxiv.org/abs/{cls.arxiv})"
        start = "exactly" if known["identity_bound"] == 0 else f"to {known['identity_bound']:.0e}"
        settings = ", ".join(
            f"`{key}={value!r}`" for key, value in known["config"].items() if key not in common and value
        )
        data = "yes" if known["needs"] else "no"
        lines.append(
            f"| `{name}` | {paper} | {known['acts']} | {data} | {start} | {settings.replace('|', chr(92) + '|')} |"
        )
    return "\n".join(lines)


def demo() -> str:
    """What the committed run of the demo found."""
    found = json.loads(DEMO.read_text())
    seconds = found["seconds"]
    lines = [
        f"Task `{found['run']['task']}`, {found['items']} held-out items, method `{found['methods'][0]['variant']}`, "
        f"{found['trainable']:,} trained parameters, {found['dtype']}, {found['device']} ({found['threads']} threads), "
        f"torch {found['versions']['torch']}, seed {found['training']['seed']} (`make demo`):",
        "",
        "| | before | after |",
        "|---|---|---|",
        f"| accuracy | {found['accuracy_before']:.1%} | {found['accuracy_after']:.1%} |",
        f"| answer anywhere in the reply | {found['mention_rate_before']:.1%} | {found['mention_rate_after']:.1%} |",
        "",
        f"{sum(seconds.values()):.0f} s in all, {seconds['train']:.0f} s of it training at "
        f"{found['tokens_per_second']:.0f} tokens/s; peak memory {found['peak_memory_mb']:.0f} MB; "
        f"the adapter is a file of {found['adapter_bytes'] / 1e6:.1f} MB.",
    ]
    return "\n".join(lines)


def render(text: str) -> str:
    """The page with its generated parts made anew."""
    for name, make in (("methods", methods), ("demo", demo)):
        pattern = rf"(<!-- begin {name} -->\n).*?(<!-- end {name} -->)"
        part = make()
        text = re.sub(pattern, lambda found, part=part: f"{found[1]}{part}\n{found[2]}", text, flags=re.DOTALL)
    return text


def main() -> int:
    """Render, or check; the exit code."""
    before = README.read_text()
    after = render(before)
    if "--check" in sys.argv[1:]:
        if before != after:
            print("README.md is out of date: run python docs/render.py")
        return int(before != after)
    README.write_text(after)
    return 0


if __name__ == "__main__":
    sys.exit(main())
