"""Rows and plain text from the hub (through the library `datasets`), a folder or a file (as text, see `row_files`).

load_rows("openai/gsm8k:main", "test", ("question", "answer"))     # hub id, with a configuration after the colon
load_rows("data/gsm8k", "test", ("question", "answer"))            # a folder with train.jsonl and test.jsonl
load_rows("mine.csv", "train", ("question", "answer"))             # one file; it has one split
general_text("embedded"), general_text("book.txt"), general_text("Salesforce/wikitext:wikitext-2-raw-v1")
"""

import re
from collections.abc import Sequence
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

from lora_lite.lab import hub
from lora_lite.lab.tasks.row_files import FORMATS, CorpusError, plain_rows, read_rows, row_format, typed_rows
from lora_lite.lab.tasks.row_splits import split_files

EMBEDDED_TEXT = "embedded"
# A public-domain story that reasoning-gym's wheel carries: English prose that no task of the lab teaches.
_BOOK = "reasoning_gym/data/in_the_year_2889.txt"
_BOOK_FRAME = re.compile(r"\*\*\* ?(?:START|END) OF TH[^\n]*\*\*\*")  # between the publisher's preface and licence
CHARACTERS = 200_000  # of general text: about 50 thousand tokens


def load_rows(source: str | Path, split: str, columns: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of a split, in their order, each a dict of the `columns` asked for (None where a row lacks one).

    source: a file (jsonl, ndjson, json, csv, tsv, parquet; `split` is then only a name), a folder whose files are named
    by their split, or a hub id, with its configuration after a colon where it has several.
    Values of text files are the text that stands there: "01234", "1.10", "2024-03-15". Of those of parquet files and of
    the hub, numbers, lists and objects have their types, and all else is text: see `row_files.plain`.
    Raises CorpusError if it cannot be read, has no rows, or lacks a column; the message lists those that there are.
    """
    names, rows = read_table(source, split, columns)
    if missing := [name for name in columns if name not in names]:
        there = ", ".join(names)
        raise CorpusError(
            f"{str(source)!r} (split {split}) has no field {', '.join(map(repr, missing))}; its fields are {there}"
        )
    return [{name: row.get(name) for name in columns} for row in rows]


def read_table(source: str | Path, split: str, columns: Sequence[str]) -> tuple[list[str], list[dict[str, Any]]]:
    """The names of all fields of a split, and its rows with those of `columns` that they have; see `load_rows`."""
    where = f"{str(source)!r} (split {split})"
    path = Path(source).expanduser()
    if path.is_file() or path.is_dir():
        names, rows = _own_rows(path, split, columns)
    else:
        names, rows = _hub_rows(str(source), split, columns, where)
    if not rows:
        raise CorpusError(f"{where} holds no rows")
    return names, rows


def _own_rows(path: Path, split: str, columns: Sequence[str]) -> tuple[list[str], list[dict[str, Any]]]:
    files = [path] if path.is_file() else split_files(path, split)
    if not files:
        there = ", ".join(sorted(each.name for each in path.iterdir() if row_format(each))) or "none that can be read"
        raise CorpusError(
            f"{str(path)!r} has no file for the split {split}; its files are {there}; name one {split}.jsonl, or give "
            "the file itself"
        )
    names: dict[str, None] = {}
    rows: list[dict[str, Any]] = []
    for file in files:
        found, more = read_rows(file, columns)
        names.update(dict.fromkeys(found))
        rows += more
    return list(names), rows


def _hub_rows(source: str, split: str, columns: Sequence[str], where: str) -> tuple[list[str], list[dict[str, Any]]]:
    hub_id, _, config = source.partition(":")
    if row_format(source) or not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", hub_id):
        raise CorpusError(f"there is no file or folder {source!r}")
    # Imported here: it takes seconds, and generated tasks and own files do without.
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    silence = hub.silence()
    try:
        table = load_dataset(hub_id, config or None, split=split)
        names = list(table.column_names)
        # As Arrow's table: it knows which floats are narrow ones.
        rows = typed_rows(table.select_columns([name for name in columns if name in names]).with_format("arrow")[:])
    except (OSError, ValueError, DatasetsError) as error:
        if silence:
            raise CorpusError(
                f"cannot read rows from {where}: there is no file or folder of that name and no copy in the cache, and "
                f"{silence}"
            ) from error
        cause = f" ({error.__cause__})" if error.__cause__ else ""
        raise CorpusError(
            f"cannot read rows from {where}: {error}{cause}\nFix it: give a {', '.join(FORMATS)} file, a folder with "
            "a file for each split, such as train.jsonl and test.jsonl, or a hub id, as in 'openai/gsm8k:main'; that "
            "needs the network or a copy in the hub cache (HF_HOME)."
        ) from error
    return names, plain_rows(source, rows)


def general_text(
    source: str | Path = EMBEDDED_TEXT, split: str = "test", column: str = "text", characters: int = CHARACTERS
) -> str:
    """Plain text, to measure what a model forgets of language at large; at most `characters` of it.

    source: "embedded" (a story of 1889, no network), a .txt file, or rows with a text column as `load_rows` takes them.
    Raises CorpusError if it cannot be read, or holds nothing.
    """
    if source == EMBEDDED_TEXT:
        text = _embedded_book()
    elif Path(source).suffix == ".txt":
        text = _read_text(Path(source).expanduser())
    else:
        rows = load_rows(source, split, (column,))
        text = "\n".join(str(row[column]).strip("\n") for row in rows if row[column])
    text = text.strip()[:characters]
    if not text:
        raise CorpusError(f"{str(source)!r} holds no text")
    return text


def _embedded_book() -> str:
    # Found without importing the package, which takes seconds.
    whole = _read_text(Path(str(distribution("reasoning_gym").locate_file(_BOOK))))
    story = max(_BOOK_FRAME.split(whole), key=len)
    paragraphs = re.split(r"\n\s*\n", story)  # lines are broken at 72 letters, in the middle of sentences
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs if paragraph.strip())


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise CorpusError(f"there is no text file {str(path)!r}") from error
    except UnicodeDecodeError as error:
        raise CorpusError(f"{str(path)!r} is not UTF-8 text: {error}; save it as UTF-8") from error
