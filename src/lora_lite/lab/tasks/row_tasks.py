"""Tasks from rows of questions and answers: GSM8K, MetaMathQA judged by GSM8K, and a file of your own.

Rows without question or answer, repeated rows (of held-out parts: repeated questions), and training rows that are
held-out questions too, or whose own answer gets no full score, are left out, counted in the task's provenance and told
in its notes. An error: a held-out answer that does not score, and answers that are all their own questions, which no
scorer would notice. Answers that are all the same are reported in the notes.
"""

import re
from collections import Counter
from collections.abc import Callable

from tqdm.auto import tqdm

from lora_lite.lab.scoring.scoring import RIGHT, Finder, Scorer, finder, mentions_number, numeric, scorer
from lora_lite.lab.tasks.row_parts import LONG, Part, read_part, row_notes, told
from lora_lite.lab.tasks.spread import spread
from lora_lite.lab.tasks.task import (
    SPLITS,
    Example,
    Task,
    TaskError,
    build_prompt,
    by_occurrence,
    by_reference,
    from_splits,
    require_no_instruction,
    require_sound_key,
    split_of,
)

GSM8K, GSM8K_FIELDS = "openai/gsm8k:main", ("question", "answer")
METAMATH = "meta-math/MetaMathQA"
MATH_TEMPLATE = "Question: {question} Think step by step.\nAnswer:"
METAMATH_NOTE = (
    "MetaMathQA's questions derive from GSM8K's training questions, of which the validation items are a part: "
    "validation numbers flatter, and only the test is unseen."
)
VALIDATION_ROWS = 500
_CALCULATOR = re.compile(r"<<.*?>>")  # GSM8K's "<<48/2=24>>", meant for a tool


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
    validation, test: files of their own; without one, that split is the rows whose content hash falls into its share,
    or one row of a file so small that none does.
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
    shares["train"].left_out, shares["train"].first = whole.left_out, whole.first
    by_content = {key: split_of(example.prompt) for (key, _), example in whole.examples.items()}
    own = {key: split if split in shares else "train" for key, split in by_content.items()}
    own = spread(own, tuple(shares))
    for (key, _), example in whole.examples.items():
        shares[own[key]].add(example, several=own[key] == "train")
    return assemble(str(path), {**parts, **shares}, judge, find, max_new_tokens=max_new_tokens)


TASKS: dict[str, Callable[..., Task]] = {
    "gsm8k": gsm8k_task,
    "metamath_gsm8k": metamath_gsm8k_task,
    "jsonl": jsonl_task,
}


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
        reasons = ", ".join(told(why, n, train.first.get(why)) for why, n in train.left_out.items() if n)
        raise TaskError(f"no training example of {task.name!r} is left; left out: {reasons or 'none, there was none'}")
