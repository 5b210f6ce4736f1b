"""Tasks from the generators of reasoning-gym, each with its own verifier."""

import difflib
import itertools
from collections.abc import Iterator, Mapping
from functools import partial
from importlib.metadata import version
from typing import Any

import reasoning_gym
from reasoning_gym.factory import DATASETS

from lora_lite.lab.row_tasks import TASKS
from lora_lite.lab.tasks import (
    INSTRUCTION,
    Example,
    Task,
    TaskError,
    build_prompt,
    derive_seed,
    require_no_instruction,
    split_by_content,
)

BLOCK = 512  # items generated from one dataset object


def gym_task(
    name: str, instruction: str | None = None, template: str = "", drop: str = "", chat: bool = True, **params: Any
) -> Task:
    """A task from a reasoning-gym generator with its own verifier.

    instruction: None is `INSTRUCTION`, or nothing for plain prompts. template, drop: see `build_prompt`.
    chat: False gives plain prompts: the question, a line end, the answer; a chat template costs tokens.
    params: fields of the generator's config.
    """
    require_no_instruction(instruction, chat)
    if name not in DATASETS:
        known = [*TASKS, *DATASETS]
        close = difflib.get_close_matches(name, known, n=3) or sorted(known)
        raise TaskError(f"no task or reasoning-gym generator {name!r}; did you mean {', '.join(close)}?")
    judge = _dataset(name, params, seed=0)
    if not isinstance(judge[0]["answer"], str):
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
    return Task(name, split_by_content(stream), partial(_verify, judge), provenance=provenance)


def _dataset(name: str, params: Mapping[str, Any], seed: int) -> Any:
    try:
        return reasoning_gym.create_dataset(name, seed=seed, size=BLOCK, **params)
    except (TypeError, ValueError, AssertionError) as error:
        fields = [f for f in DATASETS[name][1].__dataclass_fields__ if f not in ("seed", "size")]
        raise TaskError(f"{name!r} refuses {dict(params)}: {error}; its parameters are {', '.join(fields)}") from error


def _verify(judge: Any, example: Example, answer: str) -> float:
    try:
        return judge.score_answer(answer, example.entry)
    except (ValueError, TypeError, KeyError):
        return 0.0  # several generators' verifiers parse what they are given without a guard; what fails is no answer
