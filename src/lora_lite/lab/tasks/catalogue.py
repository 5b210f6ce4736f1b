"""The catalogue of tasks: from a line of text to a task, whoever supplies it."""

import ast
import inspect
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lora_lite.lab.tasks.gym import gym_task
from lora_lite.lab.tasks.row_files import row_format
from lora_lite.lab.tasks.row_tasks import TASKS
from lora_lite.lab.tasks.task import Example, Task, TaskError


def mixture(tasks: Sequence[Task]) -> Task:
    """Several tasks in turn, equally many examples of each; every example is scored by its own task."""
    if len({task.name for task in tasks}) != len(tasks) or not tasks:
        raise TaskError(f"a mixture needs tasks of different names, got {[task.name for task in tasks]}")
    by_name = {task.name: task for task in tasks}

    def source(split: str, seed: int) -> Iterator[Example | None]:
        parts = [task.distinct(split, seed) for task in tasks]
        for batch in zip(*parts, strict=False):  # ends with the first part that is exhausted
            yield from batch

    def verify(example: Example, completion: str) -> float:
        task = by_name[example.task]
        return task.verify(example, task.extract(completion))

    def mention(example: Example, completion: str) -> bool:
        return by_name[example.task].mention(example, completion)

    budgets = [task.max_new_tokens for task in tasks]
    budget = None if None in budgets else max(b for b in budgets if b is not None)
    provenance = {task.name: task.provenance for task in tasks}
    notes = tuple(dict.fromkeys(note for task in tasks for note in task.notes))
    return Task("+".join(by_name), source, verify, str, budget, provenance, notes, mention)


def load_task(spec: str) -> Task:
    """A task from a line of text: "name", "name:key=value,key=value", or several with "+".

    A name is one of `row_tasks.TASKS` (gsm8k, metamath_gsm8k, jsonl), a file of your own ("mine.jsonl" is short for
    "jsonl:path=mine.jsonl"), or a generator of reasoning-gym; the keys are the arguments of its function, there or in
    `gym.gym_task`. Values are Python literals, anything else is a string: "spell_backward:max_word_len=5+gcd". A comma
    between brackets is part of a value, and so is a "+" that no name follows.
    Raises TaskError for an unknown name (with near misses), or a parameter that does not exist or is refused.
    """
    tasks = [_supply(*parse_spec(part)) for part in re.split(r"\+(?=\s*[\w./~-]+\s*(?::|\+|$))", spec)]
    return tasks[0] if len(tasks) == 1 else mixture(tasks)


def _supply(name: str, params: dict[str, Any]) -> Task:
    if row_format(name) or ("/" in name and Path(name).expanduser().exists()):
        name, params = "jsonl", {"path": name, **params}
    if name in TASKS:
        known = inspect.signature(TASKS[name]).parameters
        unknown = [key for key in params if key not in known]
        if unknown:
            raise TaskError(f"the task {name!r} has no parameter {unknown[0]!r}; it has {', '.join(known)}")
        return TASKS[name](**params)
    return gym_task(name, **params)


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
