import json
from pathlib import Path

import pytest

from lab_helpers import write_rows
from lora_lite.lab.tasks.corpora import CorpusError, general_text, load_rows

ROWS = [{"question": f"{i} + 1?", "answer": str(i + 1), "level": i} for i in range(4)]
WANTED = [{"question": row["question"], "answer": row["answer"]} for row in ROWS]
COLUMNS = ("question", "answer")


def write_csv(path: Path) -> None:
    path.write_text("question,answer,level\n" + "".join(f"{r['question']},{r['answer']},0\n" for r in ROWS))


def write_parquet(path: Path) -> None:
    from datasets import Dataset

    Dataset.from_list(ROWS).to_parquet(path)


WRITERS = {
    "rows.jsonl": lambda path: write_rows(path, ROWS),
    "rows.json": lambda path: path.write_text(json.dumps(ROWS)),
    "rows.csv": write_csv,
    "rows.parquet": write_parquet,
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_file_gives_its_rows_in_order(name: str, tmp_path: Path) -> None:
    WRITERS[name](tmp_path / name)
    found = load_rows(tmp_path / name, "train", COLUMNS)
    assert found == WANTED


def test_a_folder_has_a_file_for_each_split(tmp_path: Path) -> None:
    write_rows(tmp_path / "train.jsonl", ROWS[:3])
    write_rows(tmp_path / "test.jsonl", ROWS[3:])
    (tmp_path / "LICENSE").write_text("free")
    assert load_rows(tmp_path, "train", COLUMNS) == WANTED[:3]
    assert load_rows(str(tmp_path), "test", COLUMNS) == WANTED[3:]
    with pytest.raises(CorpusError, match=r"no file for the split validation; its files are test\.jsonl, train\.jsonl"):
        load_rows(tmp_path, "validation", COLUMNS)


CELLS = ["01234", "1.10", "None", "NA", "null", "1", "True", "2024-01-02", "1e3", "a, b", "nan", ""]


@pytest.mark.parametrize("folder", [False, True])
def test_a_csv_is_text_as_it_stands(folder: bool, tmp_path: Path) -> None:
    lines = [f'{i},"{cell}","{cell}"\n' for i, cell in enumerate(CELLS)]
    (tmp_path / "train.csv").write_text("level,question,answer\n" + "".join(lines))
    (tmp_path / "test.csv").write_text("level,question,answer\n" + "7,7,07\n")
    found = load_rows(tmp_path if folder else tmp_path / "train.csv", "train", COLUMNS)
    assert found == [{"question": cell, "answer": cell} for cell in CELLS]
    if folder:
        assert load_rows(tmp_path, "test", COLUMNS) == [{"question": "7", "answer": "07"}]


def test_a_file_that_changed_is_read_anew(tmp_path: Path) -> None:
    for rows in (ROWS[:2], ROWS[2:]):
        write_rows(tmp_path / "rows.jsonl", rows)
        assert [row["question"] for row in load_rows(tmp_path / "rows.jsonl", "train", COLUMNS)] == [
            row["question"] for row in rows
        ]


def test_a_row_that_lacks_a_field_has_none(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", [{"question": "a", "answer": "b"}, {"question": "c"}])
    assert load_rows(tmp_path / "rows.jsonl", "train", COLUMNS)[1] == {"question": "c", "answer": None}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.jsonl", '{"q": "a", "solution": "b"}', "no field 'question', 'answer'; its fields are q, solution"),
        ("rows.jsonl", "", "holds no rows"),
        ("rows.jsonl", "\n\n", "holds no rows"),
        ("rows.jsonl", '{"question": "a"}\n{"question"', "cannot read rows.*line 2"),
        ("rows.csv", "question,answer\n", "holds no rows"),
        (
            "rows.csv",
            "question,answer\nIs it 1, 2?,3\n",
            "more fields than its first line names .question, answer.; put",
        ),
        ("rows.txt", "a b", "ends in .jsonl, .ndjson, .json, .csv, .tsv, .parquet"),
    ],
)
def test_files_that_do_not_serve(name: str, content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(CorpusError, match=message):
        load_rows(tmp_path / name, "train", COLUMNS)
    assert [path.name for path in tmp_path.iterdir()] == [name]  # nothing is left beside it


@pytest.mark.parametrize("source", ["no/such/rows.jsonl", "./nowhere", "/no/such/folder", "rows.csv"])
def test_what_is_not_there_is_named(source: str) -> None:
    with pytest.raises(CorpusError, match=f"no file or folder '{source}'"):
        load_rows(source, "train", COLUMNS)


@pytest.mark.parametrize("source", ["openai/gsm8k:main", "meta-math/MetaMathQA"])
def test_the_hub_is_asked_for_what_looks_like_an_id(source: str) -> None:
    """Without network, as all tests are: what the message says shows what was asked."""
    with pytest.raises(
        CorpusError, match=f"cannot read rows from '{source}' .*no copy in the cache, and HF_HUB_OFFLINE is set"
    ):
        load_rows(source, "test", COLUMNS)


# ---- plain text


def test_the_embedded_text_is_prose() -> None:
    text = general_text()
    assert len(text.split()) > 5000 and "Little though they seem to think of it, the people of this" in text
    assert "gutenberg.org" not in text and "***" not in text
    paragraphs = text.split("\n\n")
    assert len(paragraphs) > 50 and not any("\n" in paragraph for paragraph in paragraphs)
    assert general_text(characters=100) == text[:100]


def test_a_text_file_and_a_text_column(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text(" Once upon a time.\n")
    assert general_text(tmp_path / "book.txt") == "Once upon a time."
    write_rows(tmp_path / "test.jsonl", [{"text": "Once\n"}, {"text": ""}, {"text": " = Title = \n"}, {"text": "upon"}])
    assert general_text(tmp_path) == "Once\n = Title = \nupon"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("book.txt", None, "no text file"),
        ("book.txt", b" \n", "holds no text"),
        ("book.txt", b"caf\xe9", "not UTF-8"),
        ("rows.jsonl", b'{"body": "a"}', "no field 'text'; its fields are body"),
    ],
)
def test_texts_that_do_not_serve(name: str, content: bytes | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(CorpusError, match=message):
        general_text(tmp_path / name)
