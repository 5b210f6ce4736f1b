"""Write the generated parts of the pages: `python docs/render.py`; with `--check`, fail if they are out of date.

A generated part stands between `<!-- begin NAME -->` and `<!-- end NAME -->`; docs/fidelity.md is generated whole.
"""

import itertools
import json
import re
import sys
from pathlib import Path
from typing import Any

import fidelity

import lora_lite as ll
from lora_lite.cli import facts
from lora_lite.lab.findings.analysis import analyse
from lora_lite.lab.findings.findings import Findings
from lora_lite.lab.report import tables

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "docs" / "s-space.md", ROOT / "docs" / "lab.md"]


def result(name: str) -> Any:
    """A committed result."""
    return json.loads((ROOT / "results" / f"{name}.json").read_text())


def methods() -> str:
    """The table of methods, from the registry."""
    lines = [
        "| method | paper | acts | needs data | starts at the base | settings |",
        "|---|---|---|---|---|---|",
    ]
    common = {field for field in ll.AdapterConfig().to_dict()} - {"r", "alpha", "target_names"}
    for name, cls in ll.methods().items():
        known = facts(cls)
        paper = f"[{cls.facts.title}](https://arxiv.org/abs/{cls.facts.arxiv})"
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
    """What the committed runs of the demo found."""
    return "\n\n".join(one_demo(name) for name in ("demo", "demo-antipasto"))


def one_demo(name: str) -> str:
    """What one run found."""
    found = result(name)
    seconds = found["seconds"]
    lines = [
        f"Task `{found['run']['task']}`, {found['items']} held-out items, method `{found['methods'][0]['variant']}`, "
        f"{found['trainable']:,} trained parameters, {found['dtype']}, {found['device']} ({found['threads']} threads), "
        f"torch {found['versions']['torch']}, seed {found['training']['seed']} "
        f"(`make demo VARIANT={found['methods'][0]['variant']}`):",
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


def spectra() -> str:
    """How much of a layer's output a few directions carry."""
    found = result("pictures")["spectra"]
    return (
        f"In `{found['layer']}` of SmolLM2-135M, {found['kept']} directions carry {found['svd']:.0%} of the energy of "
        f"the layer's outputs on the demo's task if chosen by singular value, {found['wanda']:.0%} if chosen by use, "
        f"and {found['corda']:.0%} if oriented by the data. (It is what they carry, not what is worth training: a "
        "direction that carries little may be the one to change.)"
    )


def gains() -> str:
    """What the demo's gains became."""
    found = result("pictures")["gains"]
    return (
        f"After `make demo VARIANT=antipasto`, {found['moved']:.0%} of the {found['gains']:,} gains differ from 1 by "
        f"more than 0.05; they lie between {found['smallest']:.2f} and {found['largest']:.2f}."
    )


def sspace_costs() -> str:
    """The benchmark's lines."""
    found = result("benchmark-sspace")
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    lines = [
        f"`{found['command']}`, {found['device']}, {found['cores']} cores, {versions}; median ratio of the rounds "
        "[quartiles]:",
        "",
        "| ratio | measured | wanted |",
        "|---|---|---|",
    ]
    for line in found["lines"]:
        spread = f" [{line['low']:.3g}, {line['high']:.3g}]" if "low" in line else ""
        wanted = "" if line["ok"] is None else f"at most {line['at_most']:.3g}: {'kept' if line['ok'] else 'missed'}"
        lines.append(f"| {line['what']} | {line['value']:.3g}{spread} | {wanted} |")
    return "\n".join(lines)


def steering() -> str:
    """What turning the embedded model does."""
    found = result("steering")
    lines = [
        f"On SmolLM2-135M, from {found['pairs']} pairs of statements, six layers, tried on {found['held_out']} other "
        "prompts: the mean log-probability of positive continuations less that of negative ones, and the loss on plain "
        "text, in nats:",
        "",
        "| c | preference, signed gate | loss | preference, absolute gate | loss |",
        "|---|---|---|---|---|",
    ]
    for signed, absolute in zip(found["gates"]["signed"], found["gates"]["absolute"], strict=True):
        cells = [f"{row['preference']:+.2f} | {row['loss']:.3f}" for row in (signed, absolute)]
        lines.append(f"| {signed['c']:+.0f} | {cells[0]} | {cells[1]} |")
    return "\n".join(lines)


def study_of(name: str) -> str:
    """What a committed study found: its question, its table, what it lacks, and where it was measured."""
    found = analyse(ROOT / "results" / name)
    setup = "; ".join(f"{label}: {value}" for label, value in found.setup.items() if label != "data")
    lines = [found.about, "", f"`{found.command}`, {tables.headline(found)}. {setup}.", "", tables.markdown(found), ""]
    lines += [*found.notes, "", *lacks(found)]
    lines += [f"Failed: {words}." for words in found.failures]
    return "\n".join([*lines, "", *(f"- {machine}" for machine in found.machines)])


def lacks(found: Findings) -> list[str]:
    """What a study still lacks."""
    return [f"**Not whole yet**: {'; '.join(found.missing)}.", ""] if found.missing else []


def study_methods() -> str:
    """All methods on the embedded model."""
    return study_of("methods")


def study_gsm8k() -> str:
    """A few methods on GSM8K."""
    return study_of("gsm8k")


def study_methods_short() -> str:
    """The README's few columns of the study of all methods."""
    found = analyse(ROOT / "results" / "methods")
    picture = "![accuracy against trained parameters](results/methods/accuracy-parameters.png)"
    kept = ("method", "accuracy [95%]", f"points against {found.baseline}", "place", "seeds", "rate", "trained")
    lines = [
        tables.headline(found) + ":",
        "",
        tables.markdown(found, kept),
        "",
        *found.notes,
        "",
        *lacks(found),
        picture,
    ]
    return "\n".join(lines)


def verdicts() -> str:
    """How often verdicts on made-up studies are wrong, or find what is there."""
    found = result("verdicts")
    now, plain, before = "after", "pooled t, Dunnett", "before"
    head = "| arms | seeds | accuracy | seeds' SD, points | false better or worse | a place falsely lost | "
    head += "difference within its 95% interval | false verdicts of a plain pooled t-test | false verdicts before |"
    error, power = (
        [head, "|" + "---|" * 9],
        ["| arms | seeds | one arm of | found | by a plain pooled t-test | before |"],
    )
    power.append("|" + "---|" * 6)
    for line in found["lines"]:
        cells = line["found"]
        if line["better"]:
            row = [line["arms"], line["seeds"], f"{line['base']:g}% truly {line['better']:+g} points"]
            power.append(_row([*row, *(figure(cells[name].get("found")) for name in (now, plain, before))]))
        else:
            row = [line["arms"], line["seeds"], values(line["base"], "%"), values(line["spread"])]
            kinds = ("wrong verdict", "pair separated", "alone covers")
            ours = [figure(cells[now].get(kind)) for kind in kinds]
            error.append(_row([*row, *ours, *(figure(cells[name].get("wrong verdict")) for name in (plain, before))]))
    studies = {line["found"][now]["studies"] for line in found["lines"]}
    earlier = {line["found"][before]["studies"] for line in found["lines"]}
    about = (
        f"`{found['command']}`, {min(studies):,} to {max(studies):,} studies a line ({min(earlier)} to {max(earlier)} "
        f"for the former verdicts), {found['items']} items each; percent of studies, with the standard error:"
    )
    return "\n".join([about, "", *error, "", *power])


def _row(cells: list[object]) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def figure(found: dict[str, float] | None) -> str:
    """A figure of the simulation with its Monte-Carlo error."""
    return f"{found['percent']:.1f} ± {found['error']:.1f}" if found else "-"


def values(found: float | list[float], unit: str = "") -> str:
    """One value, or those of the arms in turn, repetitions counted."""
    listed = found if isinstance(found, list) else [found]
    groups = [(value, len(list(same))) for value, same in itertools.groupby(listed)]
    return ", ".join(f"{value:g}{unit}" + (f" ({count} arms)" if count > 1 else "") for value, count in groups)


PARTS = {
    part.__name__: part
    for part in (
        methods, demo, spectra, gains, sspace_costs, steering, verdicts,
        study_methods, study_methods_short, study_gsm8k,
    )
}  # fmt: skip


def render(text: str) -> str:
    """The page with its generated parts made anew."""
    for name, make in PARTS.items():
        pattern = rf"(<!-- begin {name} -->\n).*?(<!-- end {name} -->)"
        if re.search(pattern, text, flags=re.DOTALL):
            part = make()
            text = re.sub(pattern, lambda found, part=part: f"{found[1]}{part}\n{found[2]}", text, flags=re.DOTALL)
    return text


def main() -> int:
    """Render, or check; the exit code."""
    pages = {page: (page.read_text(), render(page.read_text())) for page in PAGES}
    where = ROOT / "docs" / "fidelity.md"
    pages[where] = (where.read_text() if where.exists() else "", fidelity.page())
    stale = [page for page, (before, after) in pages.items() if before != after]
    if "--check" in sys.argv[1:]:
        for page in stale:
            print(f"{page.name} is out of date: run python docs/render.py")
        return int(bool(stale))
    for page in stale:
        page.write_text(pages[page][1])
    return 0


if __name__ == "__main__":
    sys.exit(main())
