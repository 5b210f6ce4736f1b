"""A file with few rows is enough for every command: what there is is used, and that is said."""

import json
from pathlib import Path

import pytest

from lab_helpers import write_rows
from lora_lite import cli
from lora_lite.lab.findings.analysis import analyse
from lora_lite.lab.tasks.catalogue import load_task
from lora_lite.lab.tasks.task import SPLITS, Example, TaskError, from_examples

ROWS = [{"question": f"{i} + 1?", "answer": f"{i + 1}"} for i in range(60)]


@pytest.mark.parametrize("rows", range(3, 12))
def test_each_split_of_a_small_file_has_a_row(rows: int, tmp_path: Path) -> None:
    for name, ordered in (("mine.jsonl", ROWS[:rows]), ("again.jsonl", ROWS[:rows][::-1])):
        write_rows(tmp_path / name, ordered)
    parts, again = (
        {split: {e.prompt for e in load_task(str(tmp_path / name)).distinct(split)} for split in SPLITS}
        for name in ("mine.jsonl", "again.jsonl")
    )
    assert parts == again and all(parts.values()) and sum(map(len, parts.values())) == rows
    examples = [Example(row["question"], row["answer"], "t") for row in ROWS[:rows]]
    assert all(from_examples("t", examples).examples(split, 1) for split in SPLITS)


def test_two_rows_are_too_few_for_three_splits(tmp_path: Path) -> None:
    write_rows(tmp_path / "mine.jsonl", ROWS[:2])
    task = load_task(str(tmp_path / "mine.jsonl"))
    with pytest.raises(TaskError, match="fewer than three different questions has none for every split"):
        task.parts({"train": 1, "validation": 1, "test": 1})


@pytest.mark.parametrize(("command", "rows"), [(["bench"], 60), (["study", "rotation_axis"], 60), (["bench"], 3)])
def test_few_rows_are_enough(
    command: list[str], rows: int, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = tmp_path / "mine.jsonl", tmp_path / "out"
    write_rows(path, ROWS[:rows])
    quick = ["--seeds", "1", "--rates", "1", "--steps", "2", "--max-new-tokens", "2", "--general-windows", "0"]
    flags = [
        *quick,
        "--other-task",
        "",
        "--no-costs",
        "--no-page",
        "--methods",
        "lora",
        "--baseline",
        "lora",
        "--layers",
        "0",
    ]
    assert cli.main([*command, "--model", model, "--task", str(path), "--out", str(out), *flags]) == 0
    task = load_task(str(path))
    there = {split: len(list(task.distinct(split))) for split in ("train", "validation", "test")}
    plan = json.loads((out / "study.json").read_text())
    assert plan["sources"]["examples"] == {**there, "train": min(there["train"], 16)}
    found = analyse(out)
    assert (
        found.items == there["test"] == len(json.loads((out / "data" / f"{plan['prints']['test']}.json").read_text()))
    )
    told = capsys.readouterr().out
    for split in ("validation", "test"):
        note = f"has {there[split]} distinct {split} examples, {plan['study'][f'{split}_examples']} were asked for"
        assert any(note in line for line in found.task_notes) and note in " ".join(told.split())
