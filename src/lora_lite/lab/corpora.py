"""Rows and plain text from the hub, a folder or a file, all through the library `datasets`.

load_rows("openai/gsm8k:main", "test", ("question", "answer"))     # hub id, with a configuration after the colon
load_rows("data/gsm8k", "test", ("question", "answer"))            # a folder with train.jsonl and test.jsonl
load_rows("mine.csv", "train", ("question", "answer"))             # one file; it has one split
general_text("embedded"), general_text("book.txt"), general_text("Salesforce/wikitext:wikitext-2-raw-v1")
"""

import re
import tempfile
from collections.abc import Sequence
from importlib.metadata import distribution
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_lite.errors import LoraLiteError

if TYPE_CHECKING:
    from datasets import Dataset

READERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}  # suffix -> reader of `datasets`
EMBEDDED_TEXT = "embedded"
# A public-domain story that reasoning-gym's wheel carries: English prose that no task of the lab teaches.
_BOOK = "reasoning_gym/data/in_the_year_2889.txt"
_BOOK_FRAME = re.compile(r"\*\*\* ?(?:START|END) OF TH[^\n]*\*\*\*")  # between the publisher's preface and licence
CHARACTERS = 200_000  # of general text: about 50 thousand tokens


class CorpusError(LoraLiteError, RuntimeError):
    """Rows or text cannot be read, or are not what was asked for; the message says from where, why, and what to do."""


def load_rows(source: str | Path, split: str, columns: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of a split, in their order, each a dict of the `columns` asked for (None where a row lacks one).

    source: a file (jsonl, json, csv, parquet; `split` is then only a name), a folder whose files are named by their
    split, or a hub id, with its configuration after a colon where it has several.
    Values of csv files are the text that stands there: "01234", "1.10", "None". Those of other files have their types,
    and those of the hub what the data set gives them.
    Raises CorpusError if it cannot be read, has no rows, or lacks a column; the message lists those that there are.
    """
    # Imported here: it takes seconds, and generated tasks do without.
    from datasets.exceptions import DatasetsError

    where = f"{str(source)!r} (split {split})"
    try:
        with tempfile.TemporaryDirectory(prefix="lora-lite-rows-") as cache:
            table = _load(str(source), split, cache)
            missing = [name for name in columns if name not in table.column_names]
            if missing:
                there = ", ".join(table.column_names)
                raise CorpusError(f"{where} has no field {', '.join(map(repr, missing))}; its fields are {there}")
            rows = table.select_columns(list(columns)).to_list()
    except StopIteration:  # what `datasets` raises for a file without a byte
        rows = []
    except (OSError, ValueError, DatasetsError) as error:
        cause = f" ({error.__cause__})" if error.__cause__ else ""
        raise CorpusError(
            f"cannot read rows from {where}: {error}{cause}\nMend it: give a {', '.join(READERS)} file, a folder with "
            "a file for each split, such as train.jsonl and test.jsonl, or a hub id, as in 'openai/gsm8k:main'; that "
            "needs the network or a copy in the hub cache (HF_HOME)."
        ) from error
    if not rows:
        raise CorpusError(f"{where} holds no rows")
    return rows


def _load(source: str, split: str, cache: str) -> "Dataset":
    """A table from wherever it is. Local files are read anew each time, into `cache`: they may change between runs."""
    from datasets import load_dataset, load_dataset_builder

    path = Path(source).expanduser()
    if path.is_file():
        if path.suffix not in READERS:
            raise CorpusError(f"cannot tell how to read {source!r}; the file's name ends in {', '.join(READERS)}")
        reader, options = READERS[path.suffix], _as_text([str(path)]) if path.suffix == ".csv" else {}
        return load_dataset(reader, data_files={"train": str(path)}, split="train", cache_dir=cache, **options)
    if path.is_dir():
        builder = load_dataset_builder(str(path), cache_dir=cache)
        files = (builder.config.data_files or {}).get(split, []) if builder.name == "csv" else []
        return load_dataset(str(path), split=split, cache_dir=cache, **_as_text(files))
    hub_id, _, config = source.partition(":")
    if path.suffix in READERS or not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", hub_id):
        raise CorpusError(f"there is no file or folder {source!r}")
    return load_dataset(hub_id, config or None, split=split)


def _as_text(files: Sequence[str]) -> dict[str, Any]:
    """Options with which `datasets` reads these csv files as text: it guesses at no types, and at no empty values."""
    import pandas
    from datasets import Features, Value

    names: dict[str, Value] = {}
    for file in files:
        mark = "\t" if Path(file).suffix == ".tsv" else ","
        head = pandas.read_csv(file, nrows=1, dtype=str, keep_default_na=False, sep=mark)
        if not isinstance(head.index, pandas.RangeIndex):  # pandas takes the first fields for names of rows
            raise CorpusError(
                f"the rows of {file!r} have more fields than its first line names ({', '.join(head.columns)}); "
                'put values that hold commas into quotes: "1, 2"'
            )
        names |= {name: Value("string") for name in head.columns}
    return {"features": Features(names), "keep_default_na": False} if names else {}


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
