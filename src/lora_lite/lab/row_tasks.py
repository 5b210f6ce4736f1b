"""Tasks from rows of questions and answers: GSM8K, MetaMathQA judged by GSM8K, and a file of your own.

Rows without question or answer, repeated rows (of held-out parts: repeated questions), and training rows that are
held-out questions too, or whose own answer gets no full score, are left out, counted in the task's provenance and told
in its notes. An error: a held-out answer that does not score, and answers that are all their own questions, which no
scorer would notice. Answers that are all the same are told in the notes.
"""

import re
import textwrap
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from tqdm.auto import tqdm

from lora_lite.lab.row_files import row_format
from lora_lite.lab.row_forms import exchanges, text_of
from lora_lite.lab.scoring import RIGHT, Finder, Scorer, finder, mentions_number, normal, numeric, scorer
from lora_lite.lab.tasks import (
    SPLITS,
    Example,
    Task,
    TaskError,
    build_prompt,
    by_occurrence,
    by_reference,
    content_key,
    fingerprint,
    from_splits,
    require_no_instruction,
    require_sound_key,
    split_of,
)
from lora_lite.printable import one_line

GSM8K, GSM8K_FIELDS = "openai/gsm8k:main", ("question", "answer")
METAMATH = "meta-math/MetaMathQA"
MATH_TEMPLATE = "Question: {question} Think step by step.\nAnswer:"
METAMATH_NOTE = (
    "MetaMathQA's questions derive from GSM8K's training questions, of which the validation items are a part: "
    "validation numbers flatter, and only the test is unseen."
)
VALIDATION_ROWS = 500
LONG = 50_000  # rows from which on progress is shown
_CALCULATOR = re.compile(r"<<.*?>>")  # GSM8K's "<<48/2=24>>", meant for a tool

Key = tuple[bytes, bytes]  # content of the question and, in training, of the answer
Maker = Callable[[str, str], Example]  # (question, answer) -> example


@dataclass(frozen=True)
class Origin:
    """Where rows are from, how many there are, and how many of them have their question as the answer."""

    source: str
    split: str
    read: int
    echoes: int = 0

    def __str__(self) -> str:
        return self.source if row_format(self.source) else f"{self.source} ({self.split})"


@dataclass
class Part:
    """The examples of one split by their content, where they are from, and how many rows were left out why.

    In training a question may come with several answers, as most of MetaMathQA's do; elsewhere it counts once.
    """

    examples: dict[Key, Example]
    origin: Origin
    left_out: Counter[str]

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


def gsm8k_task(
    path: str = GSM8K,
    validation: int | None = None,
    keep_annotations: bool = False,
    max_new_tokens: int | None = None,
) -> Task:
    """GSM8K: training and validation from its training rows, test from its 1,319 test rows.

    path: a hub id, or a folder with train.jsonl and test.jsonl (fields question and answer).
    validation: how many training rows are held back; None is 500, or a tenth where there are few.
    keep_annotations: teach the calculator annotations ("<<48/2=24>>") too.
    max_new_tokens: what an answer may take; None measures it.
    """

    def make(question: str, answer: str) -> Example:
        kept = answer if keep_annotations else _CALCULATOR.sub("", answer)
        return Example(build_prompt(question, MATH_TEMPLATE), kept, "gsm8k", "", chat=False)

    train = read_part(path, "train", make, *GSM8K_FIELDS)
    parts = {
        "train": train,
        "validation": hold_back(train, validation),
        "test": read_part(path, "test", make, *GSM8K_FIELDS),
    }
    return assemble("gsm8k", parts, numeric, mentions_number, max_new_tokens=max_new_tokens)


def metamath_gsm8k_task(
    train: str = METAMATH,
    gsm8k: str = GSM8K,
    test: str = "",
    validation: int | None = None,
    max_new_tokens: int | None = None,
) -> Task:
    """Training on MetaMathQA, validation on a part of GSM8K's training rows, test on GSM8K's 1,319 test rows.

    train: a hub id, folder or file with the fields query and response.
    gsm8k: a hub id or folder with the splits train and test (fields question and answer).
    test: a source of test rows with these fields; "" is the test split of `gsm8k`.
    validation, max_new_tokens: see `gsm8k_task`.
    """
    name = "metamath_gsm8k"

    def make(question: str, answer: str) -> Example:
        return Example(build_prompt(question, MATH_TEMPLATE), answer, name, "", chat=False)

    parts = {
        "train": read_part(train, "train", make, "query", "response"),
        "validation": hold_back(read_part(gsm8k, "train", make, *GSM8K_FIELDS), validation),
        "test": read_part(test or gsm8k, "test", make, *GSM8K_FIELDS),
    }
    return assemble(name, parts, numeric, mentions_number, (METAMATH_NOTE,), max_new_tokens)


def jsonl_task(
    path: str,
    question: str = "",
    answer: str = "",
    score: str = "exact",
    pattern: str = "",
    validation: str = "",
    test: str = "",
    chat: bool = True,
    instruction: str = "",
    template: str = "",
    drop: str = "",
    max_new_tokens: int | None = None,
) -> Task:
    """Your own questions and answers, from a file (jsonl, json, csv, parquet), a folder or a hub id.

    question, answer: names of the fields; without them, those of a known form are taken (`row_forms.FORMS`).
    score: "exact", "numeric" or "regex" (with its pattern); see `scoring`.
    validation, test: files of their own; without one, that split is the rows whose content hash falls into its share.
    chat: False for plain prompts, without the model's chat template. instruction: the system message of a chat.
    template, drop: see `build_prompt`. max_new_tokens: what an answer may take; None measures it.
    """
    require_no_instruction(instruction, chat)
    judge, find = scorer(score, pattern), finder(score, pattern)

    def make(asked: str, told: str) -> Example:
        return Example(build_prompt(asked, template, drop, chat), told, str(path), instruction, chat=chat)

    whole = read_part(str(path), "train", make, question, answer)
    given = {"validation": validation, "test": test}
    parts = {split: read_part(file, split, make, question, answer) for split, file in given.items() if file}
    shares = {split: Part({}, whole.origin, Counter()) for split in SPLITS if split not in parts}
    shares["train"].left_out = whole.left_out
    for example in whole.examples.values():
        share = split_of(example.prompt)
        share = share if share in shares else "train"
        shares[share].add(example, several=share == "train")
    return assemble(str(path), {**parts, **shares}, judge, find, max_new_tokens=max_new_tokens)


TASKS: dict[str, Callable[..., Task]] = {
    "gsm8k": gsm8k_task,
    "metamath_gsm8k": metamath_gsm8k_task,
    "jsonl": jsonl_task,
}


def read_part(source: str, split: str, make: Maker, question: str = "", answer: str = "") -> Part:
    """The rows of a split as examples; those without question or answer and repeated ones left out and counted.

    question, answer: fields; without both, see `row_forms`. Raises TaskError if every answer is its own question.
    """
    rows = exchanges(source, split, question, answer)
    part, echoes = Part({}, Origin(source, split, len(rows)), Counter()), 0
    for row in tqdm(rows, desc=one_line(f"read {source}"), unit="row", disable=len(rows) < LONG):
        asked, told = (text_of(value, source) for value in (row.question, row.answer))
        if not asked or not told:
            part.left_out[row.left_out or "without question or answer"] += 1
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
    part.origin = Origin(source, split, len(rows), echoes)
    return part


def hold_back(train: Part, count: int | None) -> Part:
    """Take the `count` questions of the smallest content keys out of `train`: the same ones whatever their order."""
    questions = sorted({question for question, _ in train.examples})
    taken = max(1, min(VALIDATION_ROWS, len(questions) // 10)) if count is None else count
    if not 0 < taken < len(questions):
        raise TaskError(
            f"cannot hold back {taken} of the {len(questions)} rows of {train.origin.source!r} for validation"
        )
    held, chosen = Part({}, train.origin, Counter()), set(questions[:taken])
    for key in sorted(key for key in train.examples if key[0] in chosen):
        held.add(train.examples.pop(key), several=False)
    return held


def assemble(
    name: str,
    parts: dict[str, Part],
    judge: Scorer,
    find: Finder,
    notes: tuple[str, ...] = (),
    max_new_tokens: int | None = None,
) -> Task:
    """A task whose splits share no content and whose answers all score by `judge`; `find` looks for them in replies.

    Its notes are those given, and those of `row_notes`. Raises TaskError if a held-out answer does not score, or no
    training example is left.
    """
    held_out: set[bytes] = set()
    for split in ("test", "validation", "train"):
        part = parts[split]
        part.leave_out("also a held-out question", [key for key in part.examples if key[0] in held_out])
        held_out |= {question for question, _ in part.examples}
    lists = {split: list(part.examples.values()) for split, part in parts.items()}
    whole = from_splits(name, lists, by_reference(judge))
    for split in ("test", "validation"):
        require_sound_key(whole, lists[split])
    leave_out_unsound(whole, parts["train"])
    return from_splits(
        name,
        {**lists, "train": list(parts["train"].examples.values())},
        whole.verify,
        max_new_tokens=max_new_tokens,
        provenance={split: parts[split].provenance() for split in SPLITS},
        notes=(*notes, *row_notes(parts, judge)),
        mention=by_occurrence(find),
    )


def leave_out_unsound(task: Task, train: Part) -> None:
    """Take the training examples out whose own answer does not score. Raises TaskError if none is left."""
    bar = tqdm(train.examples.items(), desc="score training answers", unit="row", disable=len(train.examples) < LONG)
    unsound = [key for key, example in bar if task.score(example, example.answer) < RIGHT]
    if len(unsound) == len(train.examples):
        require_sound_key(task, list(train.examples.values()))
    train.leave_out("own answer does not score", unsound)
    if not train.examples:
        raise TaskError(f"no training example of {task.name!r} is left; left out: {dict(train.left_out)}")


def row_notes(parts: Mapping[str, Part], judge: Scorer) -> list[str]:
    """What a reader must know of the rows: how many were left out and why, and what is odd about the answers."""
    left_out: dict[Origin, Counter[str]] = {}
    for part in parts.values():
        left_out.setdefault(part.origin, Counter()).update(part.left_out)
    lines = []
    for origin, counts in left_out.items():
        if total := counts.total():
            reasons = ", ".join(f"{why} ({n:,})" for why, n in counts.most_common() if n)
            lines.append(f"{total:,} of {origin.read:,} rows of {origin} left out: {reasons}")
        if origin.echoes:
            lines.append(f"{origin.echoes:,} of {origin.read:,} rows of {origin} have their question as the answer")
    for split in SPLITS:
        answers = [example.answer for example in parts[split].examples.values()]
        if len(answers) > 1 and all(judge(answers[0], answer) >= RIGHT for answer in answers):
            said = f"all {len(answers):,} {split} answers are the same, {textwrap.shorten(answers[0], 80)!r}"
            lines.append(f"{said} (from {parts[split].origin}): who always says that is right without reading")
    return lines
