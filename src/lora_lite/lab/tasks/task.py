"""Tasks: seeded examples in splits that share no content, and a verifier that scores a completion.

A task is data: a source of examples and a scoring function. Anything that can say those two things is a task; the
generators of reasoning-gym (`gym`) and the rows of data sets and files (`row_tasks`) are the suppliers, and `catalogue`
finds tasks by name.

    task = load_task("family_relationships")
    train, test = task.examples("train", 480, seed=0), task.examples("test", 100, seed=0)
    task.score(test[0], "grandfather")        # in [0, 1], by the task's own verifier
"""

import hashlib
import itertools
import math
import random
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

from lora_lite.errors import LoraLiteError
from lora_lite.lab.scoring.patterns import PatternError, pattern
from lora_lite.lab.scoring.scoring import RIGHT, Finder, Scorer, SlowScoring, exact, mentions, normal
from lora_lite.lab.tasks.spread import spread

# Shares of the content space, in percent. Membership is a hash of the prompt, so it depends neither on the seed nor on
# how many examples are drawn: two runs, or two machines, can never train on each other's test items.
SPLITS = {"test": range(0, 20), "validation": range(20, 30), "train": range(30, 100)}
INSTRUCTION = "Reply with the answer only."
PATIENCE = 20_000  # draws in a row without a new example of the split after which a source counts as exhausted


class TaskError(LoraLiteError, ValueError):
    """A task cannot be made, or cannot give what is asked; the message says which, why, and how to fix it."""


class VerifierError(TaskError):
    """A verifier gave a reply no score; the message says why. Whoever scores many counts it, with 0, and goes on."""


@dataclass(frozen=True)
class Example:
    """One question with its answer.

    prompt: what the model is asked. answer: what training teaches, and one that the verifier accepts.
    task: name of the task that made it. instruction: how to answer, given as the system message.
    entry: whatever else the verifier needs.
    chat: whether the prompt goes into the model's chat template. False: the model sees it as it stands, without
    instruction, and the answer follows after a blank, or at once where the prompt ends in one.
    """

    prompt: str
    answer: str
    task: str
    instruction: str = INSTRUCTION
    entry: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)
    chat: bool = True


# (split, seed) -> examples of that split, with repetitions; None for a draw that fell into another split
Source = Callable[[str, int], Iterator[Example | None]]
Verifier = Callable[[Example, str], float]
Mention = Callable[[Example, str], bool]  # (example, completion) -> whether the answer is anywhere in it


def by_occurrence(find: Finder) -> Mention:
    """The rule that looks for an example's own answer in a completion."""
    return lambda example, completion: find(example.answer, completion)


IN_WORDS = by_occurrence(mentions)


@dataclass(frozen=True)
class Task:
    """A named source of examples with a verifier.

    source: (split, seed) -> an iterator of examples; splits must share no content (`split_by_content` sees to that).
    verify: (example, extracted answer) -> score in [0, 1]; it may raise VerifierError.
    extract: completion -> the part that is the answer; by default everything, without surrounding blanks.
    max_new_tokens: what an answer may take; None lets the evaluation measure it on training answers.
    provenance: where the examples come from, as plain data: of rows the source, their number, their fingerprint and
    what was left out; of a generator its package's version and its parameters.
    notes: what a reader must know beside every number of this task.
    mention: (example, completion) -> whether the answer is anywhere in it, whatever the format; `evaluate.record_of`
    counts what the verifier accepts too.
    """

    name: str
    source: Source
    verify: Verifier
    extract: Callable[[str], str] = str.strip
    max_new_tokens: int | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    mention: Mention = IN_WORDS

    def distinct(self, split: str, seed: int = 0) -> Iterator[Example]:
        """Examples of a split in seeded order, each question once; in training, each question with each of its answers.

        Ends when PATIENCE draws in a row bring nothing new, be they repeated or of another split.
        """
        if split not in SPLITS:
            raise TaskError(f"unknown split {split!r}; it is one of {', '.join(SPLITS)}")
        seen: set[bytes] = set()
        misses = 0
        for example in self.source(split, seed):
            if example is not None:
                key = content_key(f"{example.prompt}\n{example.answer}" if split == "train" else example.prompt)
                if key not in seen:
                    misses = 0
                    seen.add(key)
                    yield example
                    continue
            misses += 1
            if misses >= PATIENCE:
                return

    def examples(self, split: str, n: int, seed: int = 0) -> list[Example]:
        """The first n examples of `distinct`. Raises TaskError if there are fewer."""
        if n < 0:
            raise TaskError(f"cannot draw {n} examples of {self.name!r}; n is 0 or more")
        found = list(itertools.islice(self.distinct(split, seed), n))
        if len(found) < n:
            raise TaskError(
                f"the task {self.name!r} has only {len(found)} distinct {split} examples, {n} were asked for; "
                "ask for fewer, or make the task larger: wider parameters of a generator, more rows of a file "
                "(one of fewer than three different questions has none for every split)"
            )
        return found

    def up_to(self, split: str, n: int, seed: int = 0) -> tuple[list[Example], tuple[str, ...]]:
        """The first n examples of `distinct`, or all where there are fewer, and a note that says so.

        Raises TaskError if there is none.
        """
        found = list(itertools.islice(self.distinct(split, seed), n)) or self.examples(split, 1, seed)
        if len(found) >= n:
            return found, ()
        return found, (f"{self.name} has {len(found)} distinct {split} examples, {n} were asked for: all are used",)

    def parts(self, sizes: Mapping[str, int], seed: int = 0) -> tuple[dict[str, list[Example]], tuple[str, ...]]:
        """`up_to` for several splits: split -> its first examples, and the notes on those that have fewer.

        sizes: split -> how many are asked for; 0 gives none. Raises TaskError if a split has none at all.
        """
        found = {split: self.up_to(split, n, seed) if n else ([], ()) for split, n in sizes.items()}
        return {split: drawn for split, (drawn, _) in found.items()}, tuple(
            line for _, lines in found.values() for line in lines
        )

    def score(self, example: Example, completion: str) -> float:
        """The verifier's score of a completion, in [0, 1]; 1 is right, some verifiers give part of it.

        0 where the verifier fails, which `assess` distinguishes from a wrong answer.
        """
        return self.assess(example, completion)[0]

    def assess(self, example: Example, completion: str) -> tuple[float, str]:
        """The score of a completion, and why the verifier could give none: "" where it could."""
        try:
            score = float(self.verify(example, self.extract(completion)))
        except VerifierError as error:
            return 0.0, str(error)
        if math.isnan(score):
            raise TaskError(f"the verifier of {example.task!r} gave NaN for the completion {completion!r}")
        return min(1.0, max(0.0, score)), ""


# ---- contents and splits


def content_key(prompt: str) -> bytes:
    """A hash of the words of a prompt; case, blanks and the encoding of accents do not count: see `normal`."""
    return hashlib.sha256(normal(prompt).encode()).digest()


def split_of(prompt: str) -> str:
    """The split a prompt belongs to, for good."""
    percent = int.from_bytes(content_key(prompt)[:8], "big") % 100
    return next(split for split, share in SPLITS.items() if percent in share)


def derive_seed(*parts: object) -> int:
    """A 31-bit seed. Hashing keeps streams apart whose seeds are neighbours: generators often use seed + index."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "big") >> 1


def split_by_content(stream: Callable[[int], Iterator[Example]]) -> Source:
    """Turn one stream of examples (seed -> iterator) into a source whose splits share no content.

    The source gives None for every draw of another split, so that who draws can give up on an endless stream.
    """

    def source(split: str, seed: int) -> Iterator[Example | None]:
        return (example if split_of(example.prompt) == split else None for example in stream(seed))

    return source


def fingerprint(examples: Sequence[Example]) -> str:
    """A hash of the prompts and answers, in their order: 16 hex digits."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(repr((example.prompt, example.answer)).encode())
    return digest.hexdigest()[:16]


def require_sound_key(task: Task, examples: Sequence[Example]) -> None:
    """Raise TaskError unless every example's own reference answer gets the full score.

    What that finds depends on the scorer: for numbers, answers without one; for an expression, answers that it does not
    match; for a generator, answers that its own verifier refuses. Exact comparison accepts every answer as its own
    reference, so it finds nothing there: `row_tasks` looks at the rows themselves.
    """
    wrong = [example for example in examples if task.score(example, example.answer) < RIGHT]
    if wrong:
        first = wrong[0]
        raise TaskError(
            f"the answer key of {task.name!r} is wrong: {len(wrong)} of {len(examples)} reference answers "
            f"({len(wrong) / len(examples):.1%}) do not get the full score from the task's own scorer; the first is "
            f"{textwrap.shorten(first.answer, 120)!r}, to the question {textwrap.shorten(first.prompt, 200)!r}; "
            "name the field that holds the answers, a scorer that fits them, or take such rows out"
        )


# ---- prompts


def build_prompt(question: str, template: str = "", drop: str = "", chat: bool = True) -> str:
    """The question put into a template with the one field {question}.

    template: "" is the question alone, and a line end after it for a plain prompt (chat=False).
    drop: regular expression of what to leave out first, such as a preamble that is the same for every question
    (tokens cost time); "." matches line ends too. Raises TaskError if it is no expression, takes too long, or leaves
    nothing.
    """
    template = template or ("{question}" if chat else "{question}\n")
    if "{question}" not in template:
        raise TaskError(f"the template {template!r} has no {{question}}")
    try:
        kept = pattern(drop, dotall=True).remove(question).strip() if drop else question.strip()
    except PatternError as error:
        raise TaskError(f"drop={drop!r} {error}") from error
    if not kept:
        raise TaskError(f"nothing is left of the question {question!r} with drop={drop!r}")
    return template.replace("{question}", kept)


def require_no_instruction(instruction: str | None, chat: bool) -> None:
    """Raise TaskError for an instruction beside a plain prompt, which would not carry it."""
    if instruction and not chat:
        raise TaskError(
            f"a plain prompt (chat=False) carries no instruction, got {instruction!r}; put it into the template"
        )


# ---- tasks from lists, from tasks, and from a line of text


def by_reference(scorer: Scorer) -> Verifier:
    """The verifier that scores an answer against the example's own; VerifierError where that takes too long."""

    def verify(example: Example, answer: str) -> float:
        try:
            return scorer(example.answer, answer)
        except SlowScoring as error:
            raise VerifierError(str(error)) from error

    return verify


EXACT = by_reference(exact)


def from_splits(name: str, parts: Mapping[str, Sequence[Example]], verify: Verifier = EXACT, **options: Any) -> Task:
    """A task from finite lists, one a split, that share no content; each is shuffled by the seed.

    name: of the task, or a path; its last part goes into the shuffling, so that a file has one order wherever it lies.
    options: further fields of Task.
    """

    def source(split: str, seed: int) -> Iterator[Example | None]:
        order = list(parts.get(split, ()))
        random.Random(derive_seed(PurePath(name).name, split, seed)).shuffle(order)
        return iter(order)

    return Task(name, source, verify, **options)


def from_examples(name: str, examples: Sequence[Example], verify: Verifier = EXACT, **options: Any) -> Task:
    """A task from one finite list, split by content; three questions or more give each some. options: see Task."""
    split = spread({content_key(example.prompt): split_of(example.prompt) for example in examples}, tuple(SPLITS))
    parts = {name: [example for example in examples if split[content_key(example.prompt)] == name] for name in SPLITS}
    return from_splits(name, parts, verify, **options)
