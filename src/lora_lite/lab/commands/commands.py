"""The commands of the lab, each a function from arguments to an exit code."""

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import tyro

from lora_lite.files.atomic import expanded, write_atomically
from lora_lite.lab import terminal
from lora_lite.lab.commands import flags
from lora_lite.lab.commands.talk import invitation
from lora_lite.lab.costs.cost import cost_table, costs
from lora_lite.lab.findings.analysis import analyse
from lora_lite.lab.models.base import Base
from lora_lite.lab.probe.probe import probe
from lora_lite.lab.report import sentences, tables
from lora_lite.lab.report.page import write_page
from lora_lite.lab.shared_flags import EVERYWHERE, Shared, TrustRemoteCode, slug
from lora_lite.lab.studies.bench import run_study
from lora_lite.lab.studies.ledger import Ledger
from lora_lite.lab.studies.study import Study, load_study, study_names
from lora_lite.lab.tasks.gym import EXAMPLES as TASKS
from lora_lite.lab.training import examples as reports
from lora_lite.lab.training.run import finetune

STYLE = (tyro.conf.OmitArgPrefixes,)


def train(arguments: Sequence[str], shared: Shared) -> int:
    """Fine-tune, and measure before and after; or probe."""
    run, method, training = flags.parse(arguments)
    if run.probe:
        measured = probe(run, method, training)
        terminal.console().print(measured.table())
        shared.say(measured.summary())
        return 0 if measured.ok else 1
    result = finetune(run, method, training)
    reports.show(result)
    out = result.summary["run"]["out"]
    terminal.line(terminal.console(), f"all that was measured: {Path(out) / 'result.json'}")
    terminal.piece(f"talk to it: {invitation(out, run, shared)}\n")
    shared.say(result.summary)
    return 0


@dataclass(frozen=True)
class BenchFlags:
    """A comparison.

    Attributes:
        study: what to compare.
        out: folder of the results. None: runs/NAME. Finished runs in it are not done again.
        retry_failed: try failed runs again.
        tsv: write all runs as tab-separated values to this file as well.
        page: make the page; without it, `lora-lite report` does so later.
        report_to: trackers: "tensorboard", "wandb", "trackio"; through accelerate.
    """

    study: Study = field(default_factory=Study)
    out: Path | None = None
    retry_failed: bool = False
    tsv: Path | None = None
    page: bool = True
    report_to: tuple[str, ...] = ()


BENCH = (
    """Compare methods on a model and a task, with equal budgets, and say which differences are real.

    lora-lite bench --methods lora,dora,'antipasto_arrow[block=8,32]' --task gsm_symbolic --steps 100
    lora-lite bench --methods all --model Qwen/Qwen3-0.6B-Base --task metamath_gsm8k --quantization 4bit

An arm is a method with settings; a setting with several values gives an arm for each. Every arm gets the same number of
learning rates around its method's default, chosen on validation examples only, then --seeds seeds at the chosen one.
Stop it at any moment: the same command goes on. Several processes may share --out. Failed runs are recorded with their
reason, and the others go on. Exit code: 0 done, 1 failed, 2 flags not understood, 130 interrupted.
"""
    + EVERYWHERE
)
STUDY = (
    "Run a comparison that comes with the library. Its settings are the defaults of the flags of `lora-lite bench`. "
    + EVERYWHERE
)


def bench(arguments: Sequence[str], shared: Shared) -> int:
    """Compare."""
    asked = tyro.cli(BenchFlags, args=list(arguments), prog="lora-lite bench", description=BENCH, config=STYLE)
    if not any(word.split("=")[0] in ("--task", "--study.task") for word in arguments):
        argparse.ArgumentParser(prog="lora-lite bench").error(f"nothing says what to compare on: give --task {TASKS}")
    return compare(asked, shared.command("bench", arguments), shared)


def study(arguments: Sequence[str], shared: Shared) -> int:
    """Run a study of the library."""
    names = study_names()
    first = argparse.ArgumentParser(prog="lora-lite study", add_help=False)
    first.add_argument("name", choices=names, nargs="?", metavar=f"{{{','.join(names)}}}")
    first.add_argument("--smoke", action="store_true")
    known, rest = first.parse_known_args(list(arguments))
    if known.name is None:
        lines = "\n".join(f"  {name}: {load_study(name).about}" for name in names)
        usage = f"lora-lite study NAME [--smoke] [flags of lora-lite bench]\n\n{STUDY}\n--smoke: its small version."
        print(f"{usage}\n\n{lines}")
        return 0 if {"-h", "--help"} & set(rest) else 2
    default = BenchFlags(load_study(known.name, known.smoke))
    asked = tyro.cli(
        BenchFlags, args=rest, default=default, prog=f"lora-lite study {known.name}", description=STUDY, config=STYLE
    )
    return compare(asked, shared.command("study", arguments), shared)


def compare(asked: BenchFlags, command: str, shared: Shared) -> int:
    """Run a study, and show what it found."""
    folder = expanded(asked.out) if asked.out else Path("runs") / (slug(asked.study.name) or "bench")
    ledger = run_study(asked.study, folder, command, asked.retry_failed, asked.report_to)
    if asked.tsv:
        write_tsv(ledger, asked.tsv)
    return show(folder, asked.page, shared)


def write_tsv(ledger: Ledger, path: Path) -> None:
    """All runs as tab-separated values."""
    write_atomically(path, ledger.tsv().encode(errors="backslashreplace"))


def show(folder: Path, page: bool, shared: Shared) -> int:
    """Print the table of a folder of results, and make its page; 1 if runs failed."""
    findings = analyse(folder)
    console = terminal.console()
    console.print(tables.terminal(findings, console.width))
    for line in sentences.beneath(findings):
        terminal.line(console, line)
    written = write_page(findings, folder) if page else []
    arms = {arm.arm: arm.accuracy.mean if arm.accuracy else None for arm in findings.arms}
    pages = [str(path) for path in written]
    for line in labelled("page", [path for path in pages if path.endswith(".html")]):
        terminal.line(console, line)
    shared.say({"study": findings.name, "accuracy": arms, "missing": len(findings.missing), "files": pages})
    return 1 if findings.failures else 0


def labelled(label: str, lines: Iterable[str]) -> list[str]:
    """Lines that say what they are about."""
    return [f"{label}: {line}" for line in lines]


@dataclass(frozen=True)
class ReportFlags:
    """A folder of results.

    Attributes:
        results: the folder that `lora-lite bench` or `lora-lite study` wrote.
        tsv: write all runs as tab-separated values to this file as well.
    """

    results: tyro.conf.Positional[Path]
    tsv: Path | None = None


def report(arguments: Sequence[str], shared: Shared) -> int:
    """Make the page of a folder of results: index.html, which needs no network, and pictures."""
    about = (
        "One self-contained page (index.html) and pictures (PNG) of a bench or study, in its folder, and its table. "
    )
    about += EVERYWHERE
    asked = tyro.cli(ReportFlags, args=list(arguments), prog="lora-lite report", description=about, config=STYLE)
    show(expanded(asked.results), True, shared)
    if asked.tsv:
        write_tsv(Ledger(expanded(asked.results)), asked.tsv)
    return 0


@dataclass(frozen=True)
class CostFlags:
    """What to cost.

    Attributes:
        methods: the arms, as for `lora-lite bench`.
        model: "smollm2" (embedded), a hub id or a local folder.
        quantization: of the base: "none", "4bit" or "8bit".
        dtype: of the base: "float32", "bfloat16" or "auto".
        shapes: only what shapes give: parameters, bytes and multiply-accumulates. It loads no weights.
        layers: indices of the layers to adapt. None: all.
        target_names: names or regexes of the layers to adapt, for methods that do not choose their own.
        target_roles: roles of the layers to adapt, for the same methods.
    """

    methods: tuple[str, ...] = ("all",)
    model: str = Study.model
    quantization: str = "none"
    dtype: str = "auto"
    trust_remote_code: TrustRemoteCode = False
    shapes: bool = False
    layers: tuple[int, ...] | None = None
    target_names: tuple[str, ...] = ()
    target_roles: tuple[str, ...] = Study.target_roles


COST = (
    """What methods cost on a model, without training.

    lora-lite cost --shapes --model meta-llama/Llama-3.1-70B    from shapes alone, in seconds
    lora-lite cost --methods lora,antipasto                     measured as well: time, memory, attaching, loading

"""
    + EVERYWHERE
)


def cost(arguments: Sequence[str], shared: Shared) -> int:
    """Count and measure what methods cost."""
    asked = tyro.cli(CostFlags, args=list(arguments), prog="lora-lite cost", description=COST, config=STYLE)
    targets = {key: getattr(asked, key) for key in ("methods", "layers", "target_names", "target_roles")}
    arms = {arm.name: list(arm.configs) for arm in Study(**targets).arms()}
    rows = costs(Base.of(asked), arms, not asked.shapes)
    terminal.console().print(cost_table(rows))
    shared.say(rows)
    return 0
