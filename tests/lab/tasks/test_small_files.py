"""A file with few rows is enough for every command: what there is is used, and that is said."""

import json
from pathlib import Path

import pytest

from lab_helpers import write_rows
from lora_lite import cli
from lora_lite.lab.findings.analysis import analyse
from lora_lite.lab.tasks.catalogue import load_task

ROWS = [{"question": f"{i} + 1?", "answer": f"{i + 1}"} for i in range(60)]


@pytest.mark.parametrize("command", [["bench"], ["study", "rotation_axis"]])
def test_sixty_rows_are_enough(
    command: list[str], model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = tmp_path / "mine.jsonl", tmp_path / "out"
    write_rows(path, ROWS)
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
        assert any(note in line for line in found.notes) and note in " ".join(told.split())
