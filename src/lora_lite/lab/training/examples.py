"""What a run prints for people: a table, and worked examples before and after."""

from collections.abc import Sequence

from rich.console import Console

from lora_lite.lab import terminal
from lora_lite.lab.training.evaluate import Evaluation, Record
from lora_lite.lab.training.result import DataRecord, Result

EXAMPLES = 3


def show(result: Result, console: Console | None = None) -> None:
    """Print the result."""
    console = console or terminal.console()
    summary = result.summary
    table = terminal.table(f"{summary['run']['task']}: {summary['items']} held-out items")
    for title in ("", "before", "after"):
        terminal.column(table, title)
    for label, before, after in (
        ("accuracy", result.before.accuracy, result.after.accuracy),
        ("mean score of the verifier", result.before.mean_score, result.after.mean_score),
        ("answer occurs anywhere", result.before.mention_rate, result.after.mention_rate),
    ):
        terminal.row(table, (label, f"{before:.1%}", f"{after:.1%}"))
    console.print(table)
    costs = terminal.table(show_header=False)
    terminal.row(costs, ("trained parameters", f"{summary['trainable']:,}"))
    terminal.row(costs, ("adapter file", f"{summary['adapter_bytes']:,} bytes ({summary['adapter']})"))
    terminal.row(
        costs, ("training", f"{summary['seconds']['train']:.0f} s, {summary['tokens_per_second']:,.0f} tokens/s")
    )
    terminal.row(costs, ("whole run", f"{sum(summary['seconds'].values()):.0f} s"))
    terminal.row(costs, ("peak memory", f"{summary['peak_memory_mb']:,.0f} MB"))
    terminal.row(
        costs, ("loaded on a fresh base", f"{summary['reloaded_answers_compared']} answers compared, all the same")
    )
    console.print(costs)
    for line in (*left_out(summary["data"]), *unscored(result.before, result.after)):
        terminal.line(console, line)
    for before, after in pick(result.before.records, result.after.records):
        console.rule()
        terminal.line(console, before.prompt.strip()[-400:])
        for label, text in (("expected", before.answer), ("before", before.completion), ("after", after.completion)):
            terminal.line(console, f"  {label:<9} {' '.join(text.split())[:200]}")


def left_out(data: DataRecord) -> list[str]:
    """What training did without, and the task's notes, a line each: of a run's `data`."""
    tokens = data["tokens"]
    return [
        f"trained on {tokens['kept']:,} of {data['examples']['train']:,} examples that were asked for; left out: "
        f"{tokens['too_long']:,} longer than {tokens['max_length']:,} tokens, "
        f"{tokens['empty']:,} without prompt or answer",
        *data["notes"],
    ]


def unscored(before: Evaluation, after: Evaluation) -> list[str]:
    """How many replies the verifier could give no score, with the first reason: a line, or none."""
    first = next((record.failure for record in (*before.records, *after.records) if record.failure), "")
    if not first:
        return []
    counts = f"{before.failures:,} before, {after.failures:,} after"
    return [f"replies without a score from the verifier, counted as wrong: {counts}; the first: {first}"]


def pick(before: Sequence[Record], after: Sequence[Record], n: int = EXAMPLES) -> list[tuple[Record, Record]]:
    """The first n items, but with a wrong answer among them if there is one: losses belong in the picture."""
    pairs = list(zip(before, after, strict=True))
    wrong = [pair for pair in pairs if not pair[1].correct]
    if wrong and all(later.correct for _, later in pairs[:n]):
        return [*pairs[: n - 1], wrong[0]]
    return pairs[:n]
