"""What row tasks say of their rows: what was left out, odd answer keys, and where answers are looked for in replies."""

from pathlib import Path

import pytest

from lab_helpers import write_rows
from lora_lite.lab.tasks import task as tasks
from lora_lite.lab.tasks.catalogue import load_task
from lora_lite.lab.tasks.task import TaskError
from lora_lite.lab.training.evaluate import judge


def test_rows_left_out_are_told_in_a_note(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    write_rows(path, [{"question": f"{i}?", "answer": f"{i}" if i % 5 == 0 else ""} for i in range(600)])
    assert load_task(str(path)).notes == (f"480 of 600 rows of {path} left out: without question or answer (480)",)


@pytest.mark.parametrize(
    "options", ["answer=question", "answer=question,score=numeric", "answer=copy,template={question}!"]
)
def test_answers_that_are_their_questions_are_an_error(options: str, tmp_path: Path) -> None:
    rows = [{"question": f"What is {i}?", "copy": f"what is  {i}?", "answer": i} for i in range(100)]
    write_rows(tmp_path / "mine.jsonl", [*rows, {"question": "", "copy": "", "answer": 3}])
    field = options.split(",")[0]
    with pytest.raises(
        TaskError, match=rf"every answer in .* is its own question \(question=question, {field}\).*name the"
    ):
        load_task(f"{tmp_path / 'mine.jsonl'}:{options}")


def test_some_answers_that_are_their_questions_are_told(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    write_rows(path, [{"question": f"a sentence {i}", "answer": f"A sentence {i + i % 2}"} for i in range(100)])
    assert load_task(str(path)).notes == (f"50 of 100 rows of {path} have their question as the answer",)


@pytest.mark.parametrize(
    ("score", "answers", "told"),
    [("exact", ["blue", "Blue"], True), ("numeric", ["1 + 1 = 2", "It is 2"], True), ("exact", ["blue", "red"], False)],
)
def test_answers_that_are_all_the_same_are_told(score: str, answers: list[str], told: bool, tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    write_rows(path, [{"question": f"{i}?", "answer": answers[i % 2]} for i in range(100)])
    task = load_task(f"{path}:score={score}")
    for split in tasks.SPLITS:
        said = f"all {len(list(task.distinct(split)))} {split} answers are the same, "
        assert any(note.startswith(said) for note in task.notes) is told
    assert len(task.notes) == (3 if told else 0)


def test_the_number_of_a_worked_solution_is_looked_for_in_replies(tmp_path: Path) -> None:
    rows = [{"question": f"What is {i} - 2?", "answer": f"{i} - 2 = {i - 2}\n#### {i - 2}"} for i in range(100, 140)]
    write_rows(tmp_path / "train.jsonl", rows[:-1])
    write_rows(tmp_path / "test.jsonl", rows[-1:])
    write_rows(tmp_path / "meta.jsonl", [{"query": "1 + 1?", "response": "The answer is: 2"}])
    own = f"{tmp_path / 'train.jsonl'}:score=numeric,test={tmp_path / 'test.jsonl'}"
    meta = f"metamath_gsm8k:train={tmp_path / 'meta.jsonl'},gsm8k={tmp_path}"
    for spec in (f"gsm8k:path={tmp_path}", meta, own):
        task = load_task(spec)
        [example] = task.examples("test", 1)
        assert judge(task, example, "It is 137.0. Or 7") == (0.0, True)
        assert judge(task, example, "It is 137.5. Or 1137") == (0.0, False)


def test_what_a_pattern_holds_is_looked_for_in_replies(tmp_path: Path) -> None:
    write_rows(tmp_path / "mine.jsonl", [{"question": f"Land {i}?", "answer": f"City {i}"} for i in range(100)])
    task = load_task(rf"{tmp_path / 'mine.jsonl'}:score=regex,pattern=City (\d+)")
    [example] = task.examples("test", 1)
    assert judge(task, example, example.answer.removeprefix("City ")) == (0.0, True)
    assert judge(task, example, f"Town {example.answer}1") == (0.0, False)


def test_a_file_gives_the_same_examples_in_the_same_order_wherever_it_lies(tmp_path: Path) -> None:
    orders = []
    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
        write_rows(tmp_path / folder / "mine.jsonl", [{"question": f"{i}?", "answer": f"{i}"} for i in range(100)])
        task = load_task(str(tmp_path / folder / "mine.jsonl"))
        orders.append([example.prompt for split in tasks.SPLITS for example in task.distinct(split, seed=3)])
    assert orders[0] == orders[1] and len(orders[0]) == 100
