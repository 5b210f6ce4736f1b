"""Tasks: seeded examples in splits that share no content, and a verifier that scores a completion.

A task is data: a source of examples and a scoring function. Anything that can say those two things is a task; the
generators of reasoning-gym are one supplier, a list of rows from a file is another (`from_examples`).

    task = load_task("family_relationships")
    train, test = task.examples("train", 480, seed=0), task.examples("test", 100, seed=0)
    task.score(test[0], "grandfather")        # in [0, 1], by the task's own verifier
"""

import ast
import difflib
import hashlib
import itertools
import math
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import reasoning_gym
from reasoning_gym.factory import DATASETS

from lora_lite.errors import LoraLiteError

# Shares of the content space, in percent. Membership is a hash of the prompt, so it depends neither on the seed nor on
# how many examples are drawn: two runs, or two machines, can never train on each other's test items.
SPLITS = {"test": range(0, 20), "validation": range(20, 30), "train": range(30, 100)}
INSTRUCTION = "Reply with the answer only."
TEMPLATE = "{question}"
BLOCK = 512  # items generated from one dataset object
PATIENCE = 4000  # draws without a new example after which a source counts as exhausted


class TaskError(LoraLiteError, ValueError):
    """A task cannot be made, or cannot give what is asked; the message says which, why, and how to mend it."""


@dataclass(frozen=True)
class Example:
    """One question with its answer.

    prompt: what the model is asked. answer: what training teaches, and one that the verifier accepts.
    task: name of the task that made it. instruction: how to answer, given as the system message.
    entry: whatever else the verifier needs.
    """

    prompt: str
    answer: str
    task: str
    instruction: str = INSTRUCTION
    entry: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)


Source = Callable[[str, int], Iterator[Example]]  # (split, seed) -> examples of that split, with repetitions
Verifier = Callable[[Example, str], float]


@dataclass(frozen=True)
class Task:
    """A named source of examples with a verifier.

    source: (split, seed) -> an iterator of examples; splits must share no content (`split_by_content` sees to that).
    verify: (example, extracted answer) -> score in [0, 1].
    extract: completion -> the part that is the answer; by default everything, without surrounding blanks.
    max_new_tokens: what an answer may take; None lets the evaluation measure it on training answers.
    """

    name: str
    source: Source
    verify: Verifier
    extract: Callable[[str], str] = str.strip
    max_new_tokens: int | None = None

    def distinct(self, split: str, seed: int = 0) -> Iterator[Example]:
        """Examples of a split in seeded order, each content once. Ends when PATIENCE draws bring nothing new."""
        if split not in SPLITS:
            raise TaskError(f"unknown split {split!r}; it is one of {', '.join(SPLITS)}")
        seen: set[bytes] = set()
        misses = 0
        for example in self.source(split, seed):
            key = content_key(example.prompt)
            misses = misses + 1 if key in seen else 0
            if misses > PATIENCE:
                return
            if key not in seen:
                seen.add(key)
                yield example

    def examples(self, split: str, n: int, seed: int = 0) -> list[Example]:
        """The first n examples of `distinct`. Raises TaskError if there are fewer."""
        if n < 0:
            raise TaskError(f"cannot draw {n} examples of {self.name!r}; n is 0 or more")
        found = list(itertools.islice(self.distinct(split, seed), n))
        if len(found) < n:
            raise TaskError(
                f"the task {self.name!r} has only {len(found)} distinct {split} examples, {n} were asked for; "
                "ask for fewer, or widen the task's parameters"
            )
        return found

    def score(self, example: Example, completion: str) -> float:
        """The verifier's score of a completion, in [0, 1]; 1 is right, some verifiers give part of it."""
        score = float(self.verify(example, self.extract(completion)))
        if math.isnan(score):
            raise TaskError(f"the verifier of {example.task!r} gave NaN for the completion {completion!r}")
        return min(1.0, max(0.0, score))


# ---- contents and splits


def content_key(prompt: str) -> bytes:
    """A hash of the words of a prompt; case and blanks do not count."""
    return hashlib.sha256(" ".join(prompt.casefold().split()).encode()).digest()


def split_of(prompt: str) -> str:
    """The split a prompt belongs to, for good."""
    percent = int.from_bytes(content_key(prompt)[:8], "big") % 100
    return next(split for split, share in SPLITS.items() if percent in share)


def derive_seed(*parts: object) -> int:
    """A 31-bit seed. Hashing keeps streams apart whose seeds are neighbours: generators often use seed + index."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "big") >> 1


def split_by_content(stream: Callable[[int], Iterator[Example]]) -> Source:
    """Turn one stream of examples (seed -> iterator) into a source whose splits share no content."""

    def source(split: str, seed: int) -> Iterator[Example]:
        return (example for example in stream(seed) if split_of(example.prompt) == split)

    return source


# ---- prompts, answers and scores: pure functions


def build_prompt(question: str, template: str = TEMPLATE, drop: str = "") -> str:
    """The question put into a template with the one field {question}.

    drop: regular expression of what to leave out first, such as a preamble that is the same for every question
    (tokens cost time); "." matches line ends too. Raises TaskError if it is no expression, or leaves nothing.
    """
    if "{question}" not in template:
        raise TaskError(f"the template {template!r} has no {{question}}")
    try:
        kept = re.sub(drop, "", question, flags=re.DOTALL).strip() if drop else question.strip()
    except re.error as error:
        raise TaskError(f"drop={drop!r} is not a regular expression: {error}") from error
    if not kept:
        raise TaskError(f"nothing is left of the question {question!r} with drop={drop!r}")
    return template.replace("{question}", kept)


def last_number(text: str) -> str:
    """The last number in a text, without thousands separators; "" if there is none. GSM8K's "#### 1,234" -> "1234"."""
    found = re.findall(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+", text)
    return found[-1].replace(",", "") if found else ""


def tagged_answer(text: str) -> str:
    """What stands in the last <answer>...</answer>; the whole text where there is none."""
    found = re.findall(r"<answer>(.*?)</answer>", text, flags=re.DOTALL)
    return (found[-1] if found else text).strip()


def exact_score(example: Example, answer: str) -> float:
    """1 if the answer is the expected one; case and blanks do not count."""
    return float(content_key(answer) == content_key(example.answer))


def numeric_score(example: Example, answer: str) -> float:
    """1 if the last numbers of both are equal (to 1e-6, relative); 0 where either has none."""
    given, expected = last_number(answer), last_number(example.answer)
    return float(bool(given and expected) and math.isclose(float(given), float(expected), rel_tol=1e-6, abs_tol=1e-9))


def mentions(example: Example, completion: str) -> bool:
    """Whether the answer occurs anywhere as whole words: what a reader who ignores the format would count."""
    answer = re.escape(example.answer.strip().casefold())
    return bool(answer) and re.search(rf"(?<!\w){answer}(?!\w)", completion.casefold()) is not None


# ---- suppliers


def from_examples(name: str, examples: Sequence[Example], verify: Verifier = exact_score, **options: Any) -> Task:
    """A task from a finite list (a file, a data set), split by content and shuffled by the seed.

    options: `extract` and `max_new_tokens` of Task.
    """

    def stream(seed: int) -> Iterator[Example]:
        order = list(range(len(examples)))
        random.Random(derive_seed(name, seed)).shuffle(order)
        return (examples[index] for index in order)

    return Task(name, split_by_content(stream), verify, **options)


def gym_task(
    name: str, instruction: str = INSTRUCTION, template: str = TEMPLATE, drop: str = "", **params: Any
) -> Task:
    """A task from a reasoning-gym generator with its own verifier.

    template, drop: see `build_prompt`. params: fields of the generator's config.
    """
    if name not in DATASETS:
        close = difflib.get_close_matches(name, DATASETS, n=3) or sorted(DATASETS)
        raise TaskError(f"no reasoning-gym generator {name!r}; did you mean {', '.join(close)}?")
    judge = _gym_dataset(name, params, seed=0)
    if not isinstance(judge[0]["answer"], str):
        raise TaskError(f"the generator {name!r} gives no answer text, so nothing can be learned from it")

    def stream(seed: int) -> Iterator[Example]:
        for block in itertools.count():
            dataset = _gym_dataset(name, params, derive_seed(name, seed, block))
            for index in range(BLOCK):
                entry = dataset[index]
                prompt = build_prompt(entry["question"], template, drop)
                yield Example(prompt, entry["answer"].strip(), name, instruction, entry)

    return Task(name, split_by_content(stream), partial(_gym_verify, judge))


def _gym_dataset(name: str, params: Mapping[str, Any], seed: int) -> Any:
    try:
        return reasoning_gym.create_dataset(name, seed=seed, size=BLOCK, **params)
    except (TypeError, ValueError, AssertionError) as error:
        fields = [f for f in DATASETS[name][1].__dataclass_fields__ if f not in ("seed", "size")]
        raise TaskError(f"{name!r} refuses {dict(params)}: {error}; its parameters are {', '.join(fields)}") from error


def _gym_verify(judge: Any, example: Example, answer: str) -> float:
    try:
        return judge.score_answer(answer, example.entry)
    except (ValueError, TypeError, KeyError):
        return 0.0  # several generators' verifiers parse what they are given without a guard; what fails is no answer


def mixture(tasks: Sequence[Task]) -> Task:
    """Several tasks in turn, equally many examples of each; every example is scored by its own task."""
    if len({task.name for task in tasks}) != len(tasks) or not tasks:
        raise TaskError(f"a mixture needs tasks of different names, got {[task.name for task in tasks]}")
    by_name = {task.name: task for task in tasks}

    def source(split: str, seed: int) -> Iterator[Example]:
        parts = [task.distinct(split, seed) for task in tasks]
        for batch in zip(*parts, strict=False):  # ends with the first part that is exhausted
            yield from batch

    def verify(example: Example, completion: str) -> float:
        return by_name[example.task].score(example, completion)

    budgets = [task.max_new_tokens for task in tasks]
    budget = None if None in budgets else max(b for b in budgets if b is not None)
    return Task("+".join(by_name), source, verify, extract=str, max_new_tokens=budget)


def load_task(spec: str) -> Task:
    """A task from a line of text: "name", "name:key=value,key=value" (arguments of `gym_task`), or several with "+".

    Values are Python literals, anything else is a string: "spell_backward:max_word_len=5+gcd".
    Raises TaskError for an unknown name (with near misses) or a parameter that the generator refuses.
    """
    tasks = [gym_task(name, **params) for name, params in map(parse_spec, spec.split("+"))]
    return tasks[0] if len(tasks) == 1 else mixture(tasks)


def parse_spec(spec: str) -> tuple[str, dict[str, Any]]:
    """Split "name:key=value,..." into the name and the parameters. Commas inside brackets do not separate."""
    name, _, rest = spec.strip().partition(":")
    params: dict[str, Any] = {}
    for part in filter(None, re.split(r",(?![^(\[]*[)\]])", rest)):
        key, equals, value = part.partition("=")
        if not equals or not key.strip():
            raise TaskError(f"{part!r} in the task {spec!r} is not key=value")
        try:
            params[key.strip()] = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError):
            params[key.strip()] = value.strip()
    return name.strip(), params
