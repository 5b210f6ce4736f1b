"""Own files are text as it stands, and a folder's splits are the files with their whole names."""

import csv
import datetime as dt
import gzip
import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from lab_helpers import write_rows
from lora_lite.lab.tasks.catalogue import load_task
from lora_lite.lab.tasks.corpora import CorpusError, load_rows
from lora_lite.lab.tasks.task import TaskError

AS_WRITTEN = [
    ('"2024-03-15"', "2024-03-15"), ("5", "5"), ("7.5", "7.5"), ("12345678901234567890", "12345678901234567890"),
    ("1.10", "1.10"), ("1e400", "1e400"), ("9" * 5000, "9" * 5000), ("true", "true"), ("null", None), ("NaN", None),
    ("-Infinity", "-Infinity"), (r'"a\u2028b"', "a\u2028b"),
]  # fmt: skip


@pytest.mark.parametrize("name", ["rows.jsonl", "ROWS.JSONL", "rows.ndjson", "rows.json", "rows.jsonl.gz"])
def test_values_are_the_text_that_stands_there(name: str, tmp_path: Path) -> None:
    objects = [f'{{"answer": {text}, "question": "q", "other": {i}}}' for i, (text, _) in enumerate(AS_WRITTEN)]
    objects[3] = objects[3].replace('"other": 3', '"other": {"x": ["y"]}')  # nobody asked for it
    text = "[" + ",\n".join(objects) + "]" if name == "rows.json" else "\r\n\r\n".join(objects)
    raw = b"\xef\xbb\xbf" + text.encode()
    (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
    assert [row["answer"] for row in load_rows(tmp_path / name, "train", ("answer",))] == [v for _, v in AS_WRITTEN]


def test_a_table_with_tabs_is_text(tmp_path: Path) -> None:
    (tmp_path / "rows.TSV").write_text("question\tanswer\n1, 2\t007\n")
    assert load_rows(tmp_path / "rows.TSV", "train", ("question", "answer")) == [{"question": "1, 2", "answer": "007"}]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.jsonl", '{"question": "a", "answer": "b"}\n\n{"question"', r"rows\.jsonl', line 3: Expecting"),
        ("rows.jsonl", '[{"question": "a"}]', "line 1: a row is an object with fields, not list"),
        ("rows.jsonl", '{"question": "a", "answer": "b", "answer": "c"}', "line 1: it has the field 'answer' more"),
        ("rows.jsonl", r'{"question": "a", "answer": "\ud800"}', "line 1: the field 'answer' holds half a character"),
        ("rows.jsonl", "[" * 200_000, "line 1: it is nested too deeply"),
        ("rows.csv", 'question,answer\n1,"2\n3,4\n', "line 3: unexpected end of data"),
        ("rows.csv", "question,answer,answer\n1,2,3\n", "line 2: it has the field 'answer' more than once"),
        ("rows.jsonl.gz", "plain", "Not a gzipped file"),
    ],
)
def test_damage_is_told_with_its_line(name: str, content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(CorpusError, match=message):
        load_rows(tmp_path / name, "train", ("question", "answer"))


@pytest.mark.parametrize("answer", [["4"], {"text": "4"}])
def test_an_answer_that_is_no_text_is_refused(answer: Any, tmp_path: Path) -> None:
    write_rows(tmp_path / "mine.jsonl", [{"question": "2 + 2?", "answer": answer}])
    with pytest.raises(CorpusError, match=r"answer of .* is a (list|dict), not text"):
        load_task(str(tmp_path / "mine.jsonl"))


def gsm_row(text: str) -> dict[str, str]:
    return {"question": f"{text}?", "answer": "#### 1"}


@pytest.mark.parametrize("below", ["", "grade_school_math/data"])
def test_gsm8ks_own_repository(below: str, tmp_path: Path) -> None:
    folder = tmp_path / below
    folder.mkdir(parents=True, exist_ok=True)
    for stem in ("train", "test", "train_socratic", "test_socratic", "train.old", "example_model_solutions"):
        write_rows(folder / f"{stem}.jsonl", [gsm_row(f"{stem} {i}") for i in range(12)])
    for split in ("train", "test"):
        rows = load_rows(tmp_path, split, ("question", "answer"))
        assert [row["question"] for row in rows] == [f"{split} {i}?" for i in range(12)]
    task = load_task(f"gsm8k:path={tmp_path}")
    assert {e.prompt.split()[1] for e in task.distinct("train")} == {"train"}


def test_a_folder_whose_split_is_not_clear_is_refused(tmp_path: Path) -> None:
    write_rows(tmp_path / "train.jsonl", [gsm_row("a")])
    write_rows(tmp_path / "Train.json", [gsm_row("a")])
    with pytest.raises(CorpusError, match=r"several files that could be its split train: Train\.json, train\.jsonl"):
        load_rows(tmp_path, "train", ("question",))


def test_shards_are_one_split(tmp_path: Path) -> None:
    for i in range(2):
        write_rows(tmp_path / f"train-0000{i}-of-00002.jsonl", [gsm_row(str(i))])
    assert [row["question"] for row in load_rows(tmp_path, "train", ("question",))] == ["0?", "1?"]


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    for i in (0, 2):
        write_rows(tmp_path / f"train-0000{i}-of-00003.jsonl", [gsm_row(str(i))])
    with pytest.raises(CorpusError, match=r"train-00001-of-00003\.jsonl' is missing: 2 of 3 shards"):
        load_rows(tmp_path, "train", ("question",))
    write_rows(tmp_path / "train-00001-of-00002.jsonl", [gsm_row("1")])
    with pytest.raises(CorpusError, match="shards of 2 and of 3; keep"):
        load_rows(tmp_path, "train", ("question",))


@pytest.mark.parametrize("name", ["rows.csv", "rows.tsv"])
def test_a_long_cell_is_read(name: str, tmp_path: Path) -> None:
    before = csv.field_size_limit()
    mark = "," if name.endswith("csv") else "\t"
    (tmp_path / name).write_text(f"question{mark}answer\n{'a' * 200_000}{mark}b\n")
    [row] = load_rows(tmp_path / name, "train", ("question", "answer"))
    assert len(row["question"]) == 200_000 and csv.field_size_limit() == before


def test_a_boolean_has_one_form_wherever_it_stands(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", [{"answer": [True, {"content": False}], "question": True}])
    [row] = load_rows(tmp_path / "rows.jsonl", "train", ("question", "answer"))
    assert row == {"question": "true", "answer": ["true", {"content": "false"}]}
    table = pyarrow.table({"question": [True], "answer": [[{"content": False, "at": dt.date(2024, 3, 15)}]]})
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    [row] = load_rows(tmp_path / "rows.parquet", "train", ("question", "answer"))
    assert row == {"question": "true", "answer": [{"content": "false", "at": "2024-03-15"}]}


def test_a_column_that_nobody_asked_for_may_change_its_type_late(tmp_path: Path) -> None:
    lines = [json.dumps({"question": f"{i}?", "answer": i, "note": i if i < 90_000 else [i]}) for i in range(100_000)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    rows = load_rows(tmp_path / "rows.jsonl", "train", ("question", "answer"))
    assert len(rows) == 100_000 and rows[-1] == {"question": "99999?", "answer": "99999"}


TURNS = [{"role": "user", "content": "{q}"}, {"role": "assistant", "content": "{a}"}]
FORMS: dict[str, dict[str, Any]] = {
    "prompt/completion": {"prompt": "{q}", "completion": "{a}"},
    "query/response": {"query": "{q}", "response": "{a}"},
    "alpaca": {"instruction": "{q}", "input": "", "output": "{a}"},
    "messages": {"messages": TURNS},
    "sharegpt": {"conversations": [{"from": "human", "value": "{q}"}, {"from": "gpt", "value": "{a}"}]},
}


@pytest.mark.parametrize("form", FORMS)
def test_known_forms_need_no_names(form: str, tmp_path: Path) -> None:
    texts = [json.dumps(FORMS[form]).replace("{q}", f"{i} + 1?").replace("{a}", str(i + 1)) for i in range(60)]
    (tmp_path / "mine.jsonl").write_text("\n".join(texts))
    task = load_task(str(tmp_path / "mine.jsonl"))
    pairs = {(e.prompt, e.answer) for split in ("train", "validation", "test") for e in task.distinct(split)}
    assert pairs == {(f"{i} + 1?", str(i + 1)) for i in range(60)}


def test_a_system_message_is_the_instruction_and_several_turns_are_left_out(tmp_path: Path) -> None:
    system = {"role": "system", "content": "Short."}
    rows = [{"messages": [system, {"role": "user", "content": f"{i}?"}, TURNS[1]]} for i in range(9)]
    write_rows(tmp_path / "mine.jsonl", [*rows, {"messages": [*TURNS, *TURNS]}])
    task = load_task(str(tmp_path / "mine.jsonl"))
    assert {e.instruction for e in task.distinct("train")} == {"Short."}
    told = "not one message of the user and one of the assistant (1; the first is row 10)"
    assert any(note.endswith(told) for note in task.notes)
    write_rows(tmp_path / "mine.jsonl", [{"messages": [*TURNS, *TURNS]}, {"messages": "none"}])
    with pytest.raises(TaskError, match=r"left out: not one message .* \(1; the first is row 1\), no list of messages"):
        load_task(str(tmp_path / "mine.jsonl"))


def test_an_input_follows_its_instruction(tmp_path: Path) -> None:
    write_rows(tmp_path / "mine.jsonl", [{"instruction": "Add.", "input": f"1, {i}", "output": "x"} for i in range(30)])
    assert load_task(str(tmp_path / "mine.jsonl")).examples("train", 1)[0].prompt.startswith("Add.\n\n1, ")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"q": "a", "solution": "b"},
            r"fields q, solution: no known form .*question/answer; prompt/completion.*messages",
        ),
        (
            {"question": "a", "answer": "b", "prompt": "c", "completion": "d"},
            "several known forms .question/answer; pro",
        ),
    ],
)
def test_unknown_fields_are_told_with_the_known_ones(row: dict[str, str], message: str, tmp_path: Path) -> None:
    write_rows(tmp_path / "mine.jsonl", [row])
    with pytest.raises(CorpusError, match=message):
        load_task(str(tmp_path / "mine.jsonl"))


def test_a_small_task_is_used_whole_and_says_so(tmp_path: Path) -> None:
    write_rows(tmp_path / "mine.jsonl", [{"question": f"{i}?", "answer": i} for i in range(60)])
    task = load_task(str(tmp_path / "mine.jsonl"))
    found, notes = task.up_to("train", 640)
    assert len(found) == len(list(task.distinct("train"))) > 30
    assert notes == (f"{task.name} has {len(found)} distinct train examples, 640 were asked for: all are used",)
    assert task.up_to("train", 5)[1] == ()


TYPED = {
    "timestamp": ([dt.datetime(2024, 3, 15, 12, 30), dt.datetime(2024, 3, 15)],
                  ["2024-03-15 12:30:00", "2024-03-15 00:00:00"]),
    "zoned": ([dt.datetime(2024, 3, 15, 12, tzinfo=dt.timezone.utc)] * 2, ["2024-03-15 12:00:00+00:00"] * 2),
    "date": ([dt.date(2024, 3, 15), None], ["2024-03-15", None]),
    "time": ([dt.time(1, 2, 3), dt.time(1, 2, 3, 400000)], ["01:02:03", "01:02:03.400000"]),
    "duration": ([dt.timedelta(hours=30), dt.timedelta(seconds=-1)], ["1 day, 6:00:00", "-1 day, 23:59:59"]),
    "decimal": ([Decimal("1.10"), Decimal("-0.05")], ["1.10", "-0.05"]),
    "bytes": ([b"ab", "é".encode()], ["ab", "é"]),
    "int": ([5, 12345678901234567], [5, 12345678901234567]),
    "bool": ([True, False], ["true", "false"]),
    "text": (["01234", "None"], ["01234", "None"]),
}  # fmt: skip


@pytest.mark.parametrize("kind", TYPED)
def test_values_of_parquet_files_become_text_in_a_stated_form(kind: str, tmp_path: Path) -> None:
    values, expected = TYPED[kind]
    table = pyarrow.table({"question": ["a?", "b?"], "answer": values})
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    found = [row["answer"] for row in load_rows(tmp_path / "rows.parquet", "train", ("question", "answer"))]
    assert found == expected and list(map(type, found)) == list(map(type, expected))


def test_timestamps_finer_than_pythons_are_text_too(tmp_path: Path) -> None:
    column = pyarrow.array([1710505800_000000001, 1710505800_000000000], pyarrow.timestamp("ns"))
    table = pyarrow.table({"question": ["a?", "b?"], "answer": column})
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    found = [row["answer"] for row in load_rows(tmp_path / "rows.parquet", "train", ("answer",))]
    assert found == ["2024-03-15 12:30:00.000000001", "2024-03-15 12:30:00"]
    raw = pyarrow.table({"answer": [b"\xff\xfe"]})
    pyarrow.parquet.write_table(raw, tmp_path / "raw.parquet")
    with pytest.raises(CorpusError, match=r"row 1: the field 'answer' holds bytes that are not UTF-8"):
        load_rows(tmp_path / "raw.parquet", "train", ("answer",))


@pytest.mark.parametrize("kind", [pyarrow.float32(), pyarrow.float16()])
def test_narrow_floats_are_the_shortest_text_that_tells_them(kind: Any, tmp_path: Path) -> None:
    values = np.array([0.1, 2.5, 1e-3, 7.0], kind.to_pandas_dtype())
    column = pyarrow.array(values, kind)
    within = pyarrow.array([[value] for value in values], pyarrow.list_(kind))
    parts = pyarrow.StructArray.from_arrays([column], ["content"])
    table = pyarrow.table({"answer": column, "list": within, "parts": parts, "empty": pyarrow.nulls(4, kind)})
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    rows = load_rows(tmp_path / "rows.parquet", "train", ("answer", "list", "parts", "empty"))
    expected = [0.1, 2.5, 0.001, 7.0]
    assert [row["answer"] for row in rows] == [row["list"][0] for row in rows] == expected
    assert [row["parts"] for row in rows] == [{"content": value} for value in expected] and rows[0]["empty"] is None
