"""Tasks from the generators of reasoning-gym; their own verifiers read replies in a process of their own."""

import difflib
import itertools
import math
import textwrap
import warnings
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from typing import Any

with (
    warnings.catch_warnings()
):  # it and what it needs bring code that Python finds doubtful, which no user here can fix
    warnings.simplefilter("ignore", SyntaxWarning)
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

from lora_lite.lab.scoring.scoring import RIGHT, normal
from lora_lite.lab.tasks.row_tasks import TASKS
from lora_lite.lab.tasks.task import (
    INSTRUCTION,
    Example,
    Task,
    TaskError,
    build_prompt,
    derive_seed,
    require_no_instruction,
    split_by_content,
)
from lora_lite.lab.tasks.verifiers import VERIFIERS

BLOCK = 512  # items generated from one dataset object
EXAMPLES = "a file of yours (mine.jsonl), gsm8k, or a generator of reasoning-gym, such as gcd or word_sorting"
PROBED = 3  # examples whose verifier is asked about nonsense when a task is made
NONSENSE = ("", "I do not know", "nan", "inf", "-inf", "1e999", "None", "true", "[]", "{}", "()", "?", "(", "\x00")


def gym_task(
    name: str, instruction: str | None = None, template: str = "", drop: str = "", chat: bool = True, **params: Any
) -> Task:
    """A task from a reasoning-gym generator with its own verifier.

    instruction: None is `INSTRUCTION`, or nothing for plain prompts. template, drop: see `build_prompt`.
    chat: False gives plain prompts: the question, a line end, the answer; a chat template costs tokens.
    params: fields of the generator's config.
    Raises TaskError for what does not exist or is refused, and for a generator whose verifier takes nonsense for right.
    """
    require_no_instruction(instruction, chat)
    if not name:
        raise TaskError(f"no task given: {EXAMPLES}")
    if name not in DATASETS and "/" in name:
        raise TaskError(f"there is no file or folder {name!r}, and no task of that name")
    if name not in DATASETS:
        known = [*TASKS, *DATASETS]
        close = difflib.get_close_matches(name, known, n=3)
        hint = f"did you mean {', '.join(close)}?" if close else f"give {EXAMPLES}"
        raise TaskError(f"no task or reasoning-gym generator {name!r}; {hint}")
    first = _dataset(name, params, seed=0)[0]
    if not isinstance(first["answer"], str):
        raise TaskError(f"the generator {name!r} gives no answer text, so nothing can be learned from it")
    told = (INSTRUCTION if chat else "") if instruction is None else instruction

    def stream(seed: int) -> Iterator[Example]:
        for block in itertools.count():
            dataset = _dataset(name, params, derive_seed(name, seed, block))
            for index in range(BLOCK):
                entry = dataset[index]
                prompt = build_prompt(entry["question"], template, drop, chat)
                yield Example(prompt, entry["answer"].strip(), name, told, entry, chat)

    parameters = {key: value if isinstance(value, int | float | bool) else str(value) for key, value in params.items()}
    provenance = {"generator": name, "reasoning_gym": version("reasoning_gym"), "parameters": parameters}

    def verify(example: Example, answer: str) -> float:
        score = VERIFIERS.score(name, params, example.entry, answer)
        return 0.0 if score >= RIGHT and is_another_number(example.answer, answer) else score

    task = Task(name, split_by_content(stream), verify, provenance=provenance)
    require_judgement(task, list(itertools.islice(stream(0), PROBED)))
    return task


def _dataset(name: str, params: Mapping[str, Any], seed: int) -> Any:
    try:
        return reasoning_gym.create_dataset(name, seed=seed, size=BLOCK, **params)
    except (TypeError, ValueError, AssertionError) as error:
        fields = [f for f in DATASETS[name][1].__dataclass_fields__ if f not in ("seed", "size")]
        raise TaskError(f"{name!r} refuses {dict(params)}: {error}; its parameters are {', '.join(fields)}") from error


def is_another_number(answer: str, reply: str) -> bool:
    """Whether both are numbers, and more than 1% apart.

    A verifier's own tolerance is finer. But one that gives parts of the score for common first digits gives all of it
    to the reply 0 where the answer is 0.15625.
    """
    first, second = _number(answer), _number(reply)
    return first is not None and second is not None and not math.isclose(first, second, rel_tol=0.01, abs_tol=1e-4)


def _number(text: str) -> float | None:
    numerator, _, denominator = text.replace(",", "").partition("/")
    try:
        return float(numerator) / float(denominator or 1)
    except (ValueError, ZeroDivisionError):
        return None


def require_judgement(task: Task, examples: Sequence[Example]) -> None:
    """Raise TaskError if the task's verifier takes nonsense for right: what it says of a model would mean nothing.

    Nonsense is what answers no question, the question itself, and the answer to one question where it is right for
    several others that have answers of their own.
    """
    for example in examples:
        for reply in (*NONSENSE, example.prompt):
            if normal(reply) != normal(example.answer) and task.score(example, reply) >= RIGHT:
                raise TaskError(
                    f"the verifier of {task.name!r} takes the reply {textwrap.shorten(reply, 80)!r} for right, where "
                    f"the answer is {textwrap.shorten(example.answer, 80)!r}; choose another task"
                )
        others = [other for other in examples if normal(other.answer) != normal(example.answer)]
        if len(others) > 1 and all(task.score(other, example.answer) >= RIGHT for other in others):
            raise TaskError(
                f"the verifier of {task.name!r} takes one reply, {textwrap.shorten(example.answer, 80)!r}, for right "
                "whatever the question; choose another task"
            )
