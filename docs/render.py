"""Write the generated parts of the pages: `python docs/render.py`; with `--check`, fail if they are out of date.

A generated part stands between `<!-- begin NAME -->` and `<!-- end NAME -->`; docs/fidelity.md is generated whole.
"""

import ast
import inspect
import itertools
import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import fidelity
import torch

import lora_lite as ll
from lora_lite.cli import facts
from lora_lite.interop.peft_types import type_of_method
from lora_lite.lab.findings.analysis import analyse
from lora_lite.lab.report import columns, sentences, tables

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "lora_lite"
PAGES = [
    ROOT / "README.md",
    *(ROOT / "docs" / f"{name}.md" for name in ("s-space", "lab", "methods", "architecture", "api", "interop")),
]
LINE = 88  # characters of a line in the tree, without its name
DOC_GROUPS = (columns.RESULT, columns.STANDING, columns.TRAINING, columns.TIME, columns.FORGETTING)
UNSHOWN = {"task", "fingerprints"}  # settings that the command says, or that nobody reads
WIDTH = 1024  # of the layer whose trained values the table of methods counts


def result(name: str) -> Any:
    """A committed result."""
    return json.loads((ROOT / "results" / f"{name}.json").read_text())


def methods_short() -> str:
    """The README's table of methods: what each does in a line."""
    lines = [
        f"| method | what is trained | needs data | values in a layer of {WIDTH:,} x {WIDTH:,} |",
        "|---|---|---|---|",
    ]
    for name, cls in ll.methods().items():
        data = "yes" if facts(cls)["needs"] else "no"
        lines.append(f"| [`{name}`](docs/fidelity.md#{name}) | {one_line(cls)} | {data} | {trained_values(cls):,} |")
    return "\n".join(lines)


def one_line(cls: type[ll.Adapter]) -> str:
    """The first sentence of the class's docstring, without what it says of c."""
    return re.split(r"[.;](?=\s|$)", inspect.getdoc(cls) or "", maxsplit=1)[0]


def trained_values(cls: type[ll.Adapter]) -> int:
    """Trained values of an adapter with default settings."""
    with torch.device("meta"):
        adapter = cls(cls.Config(), WIDTH, WIDTH)  # type: ignore[call-arg]
    return sum(value.numel() for value in adapter.parameters() if value.requires_grad)


def methods() -> str:
    """The table of methods with their settings, from the registry. "After": not the paper's own method."""
    lines = [
        "| method | paper | acts | needs data | merges | starts at the base | learning rate (range) | settings |",
        "|---|---|---|---|---|---|---|---|",
    ]
    common = {field for field in ll.AdapterConfig().to_dict()} - {"r", "alpha", "target_names"}
    entries = fidelity.entries()
    for name, cls in ll.methods().items():
        known = facts(cls)
        after = "after " if entries[name].get("after") else ""
        paper = f"{after}[{cls.facts.title}](https://arxiv.org/abs/{cls.facts.arxiv})"
        start = "exactly" if known["identity_bound"] == 0 else f"to {known['identity_bound']:.0e}"
        low, high = known["lr_range"]
        rate = f"{known['lr']:g} ({low:g} to {high:g})" if known["trained"] else "not trained"
        settings = ", ".join(
            f"`{key}={value!r}`" for key, value in known["config"].items() if key not in common and value
        )
        data, merges = ("yes" if known[key] else "no" for key in ("needs", "affine"))
        lines.append(
            f"| [`{name}`](fidelity.md#{name}) | {paper} | {known['acts']} | {data} | {merges} | {start} | {rate} | "
            f"{settings.replace('|', chr(92) + '|')} |"
        )
    return "\n".join(lines)


def lora_class() -> str:
    """The class LoRA, without its registration."""
    source = inspect.getsource(ll.methods()["lora"])
    return f"```py\n{source[source.index('class LoRA') :].rstrip()}\n```"


def summary(file: Path) -> str:
    """The first sentence of a module's docstring."""
    doc = ast.get_docstring(ast.parse(file.read_text())) or ""
    first = re.split(r"(?<=[.?])\s", " ".join(doc.split("\n\n")[0].split()), maxsplit=1)[0].rstrip(".")
    return first if len(first) <= LINE else re.split(r"[,:;](?=[^,:;]*$)", first[:LINE])[0]  # whole clauses that fit


def folders(within: Path) -> Iterator[Path]:
    """The packages below a folder, depth first."""
    for file in sorted(within.glob("*/__init__.py")):
        yield file.parent
        yield from folders(file.parent)


def tree() -> str:
    """Every folder of the package with its line, and the files of the core."""
    lines = ["```", f"src/lora_lite/{'':<14}{summary(SOURCE / '__init__.py')}"]
    for file in sorted(SOURCE.glob("*.py")):
        if file.name != "__init__.py":
            lines.append(f"  {file.name:<26}{summary(file)}")
    for folder in folders(SOURCE):
        indent = "  " * len(folder.relative_to(SOURCE).parts)
        lines.append(f"{f'{indent}{folder.name}/':<28}{summary(folder / '__init__.py')}")
        if folder.relative_to(SOURCE).parts[0] not in ("lab", "methods"):
            for file in sorted(folder.glob("*.py")):
                if file.name != "__init__.py":
                    lines.append(f"{f'{indent}  {file.name}':<28}{summary(file)}")
    return "\n".join([*lines, "```"])


def tree_short() -> str:
    """The folders of the package, a line each."""
    lines = ["```", "src/lora_lite/"]
    lines += [f"  {f'{file.parent.name}/':<16}{summary(file)}" for file in sorted(SOURCE.glob("*/__init__.py"))]
    return "\n".join([*lines, "```"])


def room(parts: Sequence[str]) -> str:
    """The folder or single file that a module belongs to; the lab's folders count one by one."""
    return "/".join(parts[:2]) if parts[0] == "lab" and len(parts) > 2 else parts[0]


def levels() -> str:
    """Rooms by level: each imports only from levels below its own. `lora_lite` is the list of public names.

    An error where imports go round in a circle.
    """
    below: dict[str, set[str]] = {}
    for file in SOURCE.rglob("*.py"):
        parts = file.relative_to(SOURCE).with_suffix("").parts
        name = "lora_lite" if parts == ("__init__",) else room(parts)
        text = file.read_text()
        imported = re.findall(r"^\s*from lora_lite(?: import |\.)([\w.]+)", text, flags=re.MULTILINE)
        whole = {"lora_lite"} if re.search(r"^\s*import lora_lite\b", text, flags=re.MULTILINE) else set()
        below.setdefault(name, set()).update(whole, (room(tuple(each.split("."))) for each in imported))

    def level(name: str, path: tuple[str, ...] = ()) -> int:
        if name in path:
            raise ValueError(f"imports go round in a circle: {' -> '.join((*path, name))}")
        return 1 + max((level(each, (*path, name)) for each in below.get(name, set()) - {name}), default=-1)

    lines = ["| level | imports only from the levels below |", "|---|---|"]
    for number, names in itertools.groupby(sorted((-level(name), name) for name in below), key=lambda each: each[0]):
        lines.append(f"| {-number} | {', '.join(f'`{name}`' for _, name in names)} |")
    return "\n".join(lines)


def api_configs() -> str:
    """The settings of every method, for the reference."""
    return "\n".join(f"::: {cls.Config.__module__}.{cls.Config.__name__}" for cls in ll.methods().values())


def peft_forms() -> str:
    """As what each method goes to peft and comes from it."""
    lines = ["| method | `export_peft` writes | `import_peft` makes it of |", "|---|---|---|"]
    for name, cls in ll.methods().items():
        kind = type_of_method(name)
        own = f"{kind.peft_type}, peft's own type; `rank=k`: the best part" if kind and kind.full_rank else None
        written = own or "LoRA, exact" if cls.facts.affine else "refused: no matrix equals it"
        read = f"peft's {kind.peft_type}" if kind else "-"
        lines.append(f"| `{name}` | {written} | {read} |")
    return "\n".join(lines)


def words() -> str:
    """The first test items of the study of all methods: what LoRA answers at c = 0 and at c = 1."""
    folder = ROOT / "results" / "methods"
    items = json.loads(next((folder / "data").glob("*.json")).read_text())
    runs = [json.loads(file.read_text()) for file in sorted((folder / "runs").glob("*.json"))]
    base = next(run for run in runs if run["config"]["kind"] == "base")
    lora = min((run for run in runs if is_lora(run)), key=lambda run: run["config"]["training"]["seed"])
    lines = ["| asked | before, c = 0 | after, c = 1 | right? |", "|---|---|---|---|"]
    for (question, _), before, after, score in itertools.islice(
        zip(items, base["completions"], lora["completions"], lora["scores"], strict=False), 3
    ):
        cells = [question, before, after]
        shown = " | ".join(tables.as_markdown(" ".join(cell.split())) for cell in cells)
        lines.append(f"| {shown} | {'yes' if score == 1 else 'no'} |")
    return "\n".join(lines)


def is_lora(run: dict[str, Any]) -> bool:
    """Whether a run measured LoRA with one of the seeds."""
    arms = run["config"].get("methods") or [{}]
    return run["config"]["kind"] == "seed" and [arm.get("method") for arm in arms] == ["lora"]


def demo() -> str:
    """What the committed runs of the demo found."""
    runs = []
    for name in ("demo", "demo-antipasto"):
        found = result(name)
        runs.append(
            f"`make demo METHOD={found['methods'][0]['method']}` trains {found['trainable']:,} values and goes from "
            f"{found['accuracy_before']:.1%} to {found['accuracy_after']:.1%} right in "
            f"{sum(found['seconds'].values()):.0f} s and {found['peak_memory_mb']:.0f} MB, with a file of "
            f"{found['adapter_bytes'] / 1e6:.1f} MB"
        )
    machine = f"{found['items']} held-out items, {found['dtype']}, {found['device']}, one seed"
    return f"Trained longer, {'; '.join(runs)} ({machine}, which says nothing about which is better)."


def spectra() -> str:
    """How much of a layer's output a few directions carry."""
    its = result("pictures")["spectra"]
    return (
        f"In `{its['layer']}` of SmolLM2-135M, {its['kept']} directions carry {its['svd']:.0%} of the energy of "
        f"the layer's outputs on the demo's task if chosen by singular value, {its['wanda']:.0%} if chosen by use, "
        f"and {its['corda']:.0%} if oriented by the data. (It is what they carry, not what is worth training: a "
        "direction that carries little may be the one to change.)"
    )


def gains() -> str:
    """What the demo's gains became."""
    its = result("pictures")["gains"]
    return (
        f"After `make demo METHOD=antipasto`, {its['moved']:.0%} of the {its['gains']:,} gains differ from 1 by "
        f"more than 0.05; they lie between {its['smallest']:.2f} and {its['largest']:.2f}."
    )


def sspace_costs() -> str:
    """The benchmark's lines."""
    bench = result("benchmark-sspace")
    versions = ", ".join(f"{name} {number}" for name, number in bench["versions"].items())
    lines = [
        f"`{bench['command']}`, {bench['device']}, {bench['cores']} cores, {versions}; median ratio of the rounds "
        "[quartiles]:",
        "",
        "| ratio | measured | wanted |",
        "|---|---|---|",
    ]
    for line in bench["lines"]:
        spread = f" [{line['low']:.3g}, {line['high']:.3g}]" if "low" in line else ""
        wanted = "" if line["ok"] is None else f"at most {line['at_most']:.3g}: {'kept' if line['ok'] else 'missed'}"
        lines.append(f"| {line['what']} | {line['value']:.3g}{spread} | {wanted} |")
    return "\n".join(lines)


def steering() -> str:
    """What turning the embedded model does."""
    bench = result("steering")
    lines = [
        f"On SmolLM2-135M, from {bench['pairs']} pairs of statements, six layers, tried on {bench['held_out']} other "
        "prompts: the mean log-probability of positive continuations less that of negative ones, and the loss on plain "
        "text, in nats:",
        "",
        "| c | preference, signed gate | loss | preference, absolute gate | loss |",
        "|---|---|---|---|---|",
    ]
    for signed, absolute in zip(bench["gates"]["signed"], bench["gates"]["absolute"], strict=True):
        cells = [f"{row['preference']:+.2f} | {row['loss']:.3f}" for row in (signed, absolute)]
        lines.append(f"| {signed['c']:+.0f} | {cells[0]} | {cells[1]} |")
    return "\n".join(lines)


def study_of(name: str) -> str:
    """What a committed study found: the decision and the table, its question and settings, caveats, and machines."""
    findings = analyse(ROOT / "results" / name)
    setup = "; ".join(f"{label}: {value}" for label, value in sentences.setup(findings).items() if label not in UNSHOWN)
    about = tables.as_markdown(f"{sentences.headline(findings)}. {setup}.")
    lines = [tables.markdown(findings, DOC_GROUPS), "", *(f"- {note}" for note in sentences.caveats(findings)), ""]
    lines += [findings.about, "", f"`{findings.command}`", "", about, ""]
    if missing := sentences.missing(findings):
        lines += [f"**Not finished**: {'; '.join(missing)}.", ""]
    lines += [f"Failed: {failure}." for failure in sentences.failures(findings)]
    return "\n".join([*lines, *(f"- {sentences.machine(each)}" for each in findings.machines)])


def study_methods() -> str:
    """All methods on the embedded model."""
    return study_of("methods")


def study_gsm8k() -> str:
    """A few methods on GSM8K."""
    return study_of("gsm8k")


def verdicts() -> str:
    """How often verdicts on made-up studies are wrong, or find what is there."""
    table = result("verdicts")
    now, plain, before = "after", "pooled t, Dunnett", "before"
    head = "| arms | seeds | accuracy | seeds' SD, points | false better or worse | a place falsely lost | "
    head += "difference within its 95% interval | false verdicts of a plain pooled t-test | false verdicts before |"
    error, power = (
        [head, "|" + "---|" * 9],
        ["| arms | seeds | one arm of | found | by a plain pooled t-test | before |"],
    )
    power.append("|" + "---|" * 6)
    for line in table["lines"]:
        cells = line["found"]
        if line["better"]:
            row = [line["arms"], line["seeds"], f"{line['base']:g}% truly {line['better']:+g} points"]
            power.append(_row([*row, *(figure(cells[name].get("found")) for name in (now, plain, before))]))
        else:
            row = [line["arms"], line["seeds"], values(line["base"], "%"), values(line["spread"])]
            kinds = ("wrong verdict", "pair separated", "alone covers")
            ours = [figure(cells[now].get(kind)) for kind in kinds]
            error.append(_row([*row, *ours, *(figure(cells[name].get("wrong verdict")) for name in (plain, before))]))
    studies = {line["found"][now]["studies"] for line in table["lines"]}
    earlier = {line["found"][before]["studies"] for line in table["lines"]}
    about = (
        f"`{table['command']}`, {min(studies):,} to {max(studies):,} studies a line ({min(earlier)} to {max(earlier)} "
        f"for the former verdicts), {table['items']} items each; percent of studies, with the standard error:"
    )
    return "\n".join([about, "", *error, "", *power])


def _row(cells: list[object]) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def figure(share: dict[str, float] | None) -> str:
    """A figure of the simulation with its Monte-Carlo error."""
    return f"{share['percent']:.1f} ± {share['error']:.1f}" if share else "-"


def values(value: float | list[float], unit: str = "") -> str:
    """One value, or those of the arms in turn, repetitions counted."""
    listed = value if isinstance(value, list) else [value]
    groups = [(each, len(list(same))) for each, same in itertools.groupby(listed)]
    return ", ".join(f"{each:g}{unit}" + (f" ({count} arms)" if count > 1 else "") for each, count in groups)


PARTS = {
    part.__name__: part
    for part in (
        methods, methods_short, lora_class, tree, tree_short, levels, api_configs, words, demo, spectra, gains,
        sspace_costs, steering, verdicts, study_methods, study_gsm8k, peft_forms,
    )
}  # fmt: skip


def render(text: str) -> str:
    """The page with its generated parts made again."""
    for name, make in PARTS.items():
        pattern = rf"(<!-- begin {name} -->\n).*?(<!-- end {name} -->)"
        if re.search(pattern, text, flags=re.DOTALL):
            part = make()
            text = re.sub(pattern, lambda marks, part=part: f"{marks[1]}{part}\n{marks[2]}", text, flags=re.DOTALL)
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
