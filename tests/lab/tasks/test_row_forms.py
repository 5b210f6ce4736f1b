"""What known forms read: each part of a question that has a field of its own, and the system message."""

from pathlib import Path
from typing import Any

import pytest

from lab_helpers import write_rows
from lora_lite.lab.tasks.catalogue import load_task
from lora_lite.lab.tasks.row_forms import exchanges


@pytest.mark.parametrize(
    ("row", "question", "answer", "system"),
    [
        ({"instruction": "Who?", "context": "It is Ann.", "response": "Ann"}, "It is Ann.\n\nWho?", "Ann", ""),
        ({"instruction": "Who?", "context": "", "response": "Ann", "category": "qa"}, "Who?", "Ann", ""),
        ({"question": "Who?", "context": ["It is.", "Ann."], "answer": "Ann"}, "It is.\n\nAnn.\n\nWho?", "Ann", ""),
        ({"question": "Who?", "choices": ["Bob", "Ann"], "answer": "B"}, "Who?\n\nA. Bob\nB. Ann", "B", ""),
        ({"question": "Who?", "choices": ["Bob", "Ann"], "answer": 0}, "Who?\n\nA. Bob\nB. Ann", "A", ""),
        ({"question": "Who?", "choices": ["Bob", "Ann"], "answer": 2}, "Who?\n\nA. Bob\nB. Ann", "B", ""),
        ({"question": "1 + 1?", "choices": ["1", "2"], "answer": 1}, "1 + 1?\n\nA. 1\nB. 2", "1", ""),
        (
            {"question": "Who?", "choices": {"text": ["Bob", "Ann"], "label": ["A", "B"]}, "answer": "Ann"},
            "Who?\n\nA. Bob\nB. Ann", "Ann", "",
        ),
        ({"instruction": "Add.", "input": 12, "output": "3", "system": "Short."}, "Add.\n\n12", "3", "Short."),
        ({"system_prompt": "Short.", "prompt": "Who?", "response": "Ann"}, "Who?", "Ann", "Short."),
        (
            {"system": "Short.", "conversations": [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "A"}]},
            "Who?", "A", "Short.",
        ),
    ],
)  # fmt: skip
def test_every_part_of_a_question_is_read(
    row: dict[str, Any], question: str, answer: str, system: str, tmp_path: Path
) -> None:
    write_rows(tmp_path / "mine.jsonl", [row])
    [[found], _] = exchanges(str(tmp_path / "mine.jsonl"), "train")
    assert (found.question, found.answer, found.system) == (question, answer, system)


def test_fields_that_are_not_read_are_told(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    write_rows(path, [{"id": i, "question": f"{i}?", "hint": "x", "answer": i, "system": "S."} for i in range(40)])
    task = load_task(str(path))
    assert task.notes == (f"fields of {path} that are not read: id, hint",)
    assert {example.instruction for example in task.distinct("train")} == {"S."}
    assert load_task(f"{path}:answer=answer").notes == ()
