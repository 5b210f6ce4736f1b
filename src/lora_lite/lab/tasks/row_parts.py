"""The rows of one split as examples, with an account of those that were left out, and notes made from it."""

import textwrap
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from tqdm.auto import tqdm

from lora_lite.lab.scoring.scoring import RIGHT, Scorer, normal
from lora_lite.lab.tasks.row_files import row_format
from lora_lite.lab.tasks.row_forms import exchanges, text_of
from lora_lite.lab.tasks.task import SPLITS, Example, TaskError, content_key, fingerprint, require_no_instruction
from lora_lite.printable import one_line

LONG = 50_000  # rows from which on progress is shown

Key = tuple[bytes, bytes]  # content of the question and, in training, of the answer
Maker = Callable[[str, str], Example]  # (question, answer) -> example


@dataclass(frozen=True)
class Origin:
    """Where rows are from, how many there are, and how many of them have their question as the answer.

    unread: fields of theirs that the form they were recognised by does not read.
    """

    source: str
    split: str
    read: int
    echoes: int = 0
    unread: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.source if row_format(self.source) else f"{self.source} ({self.split})"


@dataclass
class Part:
    """The examples of one split by their content, where they are from, and how many rows were left out why.

    first: why -> the number of the first row (1, 2, ...) that was left out for its form, for whoever looks it up.
    In training a question may come with several answers, as most of MetaMathQA's do; elsewhere it counts once.
    """

    examples: dict[Key, Example]
    origin: Origin
    left_out: Counter[str]
    first: dict[str, int] = field(default_factory=dict)

    def add(self, example: Example, several: bool) -> None:
        """Add an example, or count it as left out if it was there. several: a question may have several answers."""
        key = (content_key(example.prompt), content_key(example.answer) if several else b"")
        if key in self.examples:
            self.left_out["came before"] += 1
        self.examples.setdefault(key, example)

    def leave_out(self, why: str, keys: list[Key]) -> None:
        """Take examples out, and count them."""
        for key in keys:
            del self.examples[key]
        self.left_out[why] += len(keys)

    def provenance(self) -> dict[str, Any]:
        """What is known of the rows, as plain data."""
        rows = list(self.examples.values())
        origin = {"from": self.origin.source, "split": self.origin.split, "read": self.origin.read}
        kept = {"rows": len(rows), "fingerprint": fingerprint(rows)}
        return {**origin, **kept, "left_out": {why: n for why, n in self.left_out.items() if n}}


def read_part(source: str, split: str, make: Maker, question: str = "", answer: str = "") -> Part:
    """The rows of a split as examples; those without question or answer and repeated ones left out and counted.

    question, answer: fields; without both, see `row_forms`. Raises TaskError if every answer is its own question.
    """
    rows, unread = exchanges(source, split, question, answer)
    part, echoes = Part({}, Origin(source, split, len(rows)), Counter()), 0
    for number, row in enumerate(tqdm(rows, desc=one_line(f"read {source}"), unit="row", disable=len(rows) < LONG), 1):
        asked, told = (text_of(value, source) for value in (row.question, row.answer))
        if not asked or not told:
            part.left_out[row.left_out or "without question or answer"] += 1
            if row.left_out:
                part.first.setdefault(row.left_out, number)
            continue
        echoes += normal(asked) == normal(told)
        example = make(asked, told)
        if row.system:
            require_no_instruction(row.system, example.chat)
            example = replace(example, instruction=row.system)
        part.add(example, several=split == "train")
    if echoes and echoes == len(rows) - part.left_out.total():
        fields, first = f"question={question or 'question'}, answer={answer or 'answer'}", str(rows[0].answer)
        raise TaskError(
            f"every answer in {source!r} is its own question ({fields}); the first is "
            f"{textwrap.shorten(first, 120)!r}; name the field that holds the answers"
        )
    part.origin = Origin(source, split, len(rows), echoes, tuple(unread))
    return part


def row_notes(parts: Mapping[str, Part], judge: Scorer) -> list[str]:
    """What a reader must know of the rows: how many were left out and why, and what is odd about the answers."""
    left_out: dict[Origin, Counter[str]] = {}
    first: dict[Origin, dict[str, int]] = {}
    for part in parts.values():
        left_out.setdefault(part.origin, Counter()).update(part.left_out)
        first.setdefault(part.origin, {}).update(part.first)
    lines = []
    for origin, counts in left_out.items():
        if total := counts.total():
            reasons = ", ".join(told(why, n, first[origin].get(why)) for why, n in counts.most_common() if n)
            lines.append(f"{total:,} of {origin.read:,} rows of {origin} left out: {reasons}")
        if origin.unread:
            lines.append(f"fields of {origin} that are not read: {', '.join(origin.unread)}")
        if origin.echoes:
            lines.append(f"{origin.echoes:,} of {origin.read:,} rows of {origin} have their question as the answer")
    for split in SPLITS:
        answers = [example.answer for example in parts[split].examples.values()]
        if len(answers) > 1 and all(judge(answers[0], answer) >= RIGHT for answer in answers):
            said = f"all {len(answers):,} {split} answers are the same, {textwrap.shorten(answers[0], 80)!r}"
            lines.append(f"{said} (from {parts[split].origin}): who always says that is right without reading")
    return lines


def told(why: str, count: int, first: int | None) -> str:
    """A reason for leaving rows out, with how many there were, and the number of the first where it is known."""
    return f"{why} ({count:,})" if first is None else f"{why} ({count:,}; the first is row {first:,})"
