"""Rows of your own files as text: what stands in a file is what is taught.

No types are guessed: a number keeps its spelling (20 digits, 1.10, 1e3), a date stays text, and a column that nobody
asked for may hold what it likes. Where values have types (Parquet, the hub), `plain` says how they are written. Files
are read line by line, and only the columns asked for are kept.
"""

import csv
import datetime
import decimal
import gzip
import json
import math
import sys
import zlib
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from lora_lite.errors import LoraLiteError

FORMATS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")

Row = dict[str, Any]


class CorpusError(LoraLiteError, RuntimeError):
    """Rows or text cannot be read, or are not what was asked for; the message says from where, why, and what to do."""


def row_format(source: str | Path) -> str | None:
    """How a file's name says that it is read, such as ".jsonl"; None for another one. Case and ".gz" do not count."""
    suffixes = [suffix.lower() for suffix in Path(source).suffixes]
    last = suffixes[-2] if suffixes[-1:] == [".gz"] and len(suffixes) > 1 else suffixes[-1] if suffixes else ""
    return last if last in FORMATS else None


def read_rows(path: Path, columns: Collection[str]) -> tuple[list[str], list[Row]]:
    """All fields that a file's rows have, and its rows with those of `columns` that they have.

    JSON numbers and booleans are text as written, within lists and objects too; NaN and null are None.
    Raises CorpusError, with the line, for what is damaged or ambiguous.
    """
    kind = row_format(path)
    if kind is None:
        raise CorpusError(f"cannot tell how to read {str(path)!r}; the file's name ends in {', '.join(FORMATS)}")
    if kind == ".parquet":
        return _parquet(path, columns)
    names: dict[str, None] = {}
    rows: list[Row] = []
    try:
        opener = gzip.open if path.suffix.lower() == ".gz" else open
        with opener(path, "rt", encoding="utf-8-sig", newline="" if kind in (".csv", ".tsv") else None) as file:
            found = _cells(path, file, "\t" if kind == ".tsv" else ",") if kind in (".csv", ".tsv") else None
            for line, row in found or (_objects(path, file) if kind == ".json" else _lines(path, file)):
                names.update(dict.fromkeys(row))
                rows.append({name: _value(path, line, name, row) for name in columns if name in row})
    except UnicodeDecodeError as error:
        raise CorpusError(f"{str(path)!r} is not UTF-8 text: {error}; save it as UTF-8") from error
    except (OSError, EOFError, zlib.error) as error:
        raise CorpusError(f"cannot read rows from {str(path)!r}: {error}") from error
    return list(names), rows


class _Repeated(dict[str, Any]):
    """An object in which a name occurs more than once; `twice` are those names."""

    twice: tuple[str, ...] = ()


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) == len(pairs):
        return found
    repeated, names = _Repeated(found), [name for name, _ in pairs]
    repeated.twice = tuple(name for name in found if names.count(name) > 1)
    return repeated


_DECODER = json.JSONDecoder(
    object_pairs_hook=_pairs,
    parse_float=str,
    parse_int=str,
    parse_constant=lambda name: None if name == "NaN" else name,
)


def _decode(path: Path, line: int, text: str) -> Any:
    try:
        return _DECODER.decode(text)
    except json.JSONDecodeError as error:
        _damaged(path, line + error.lineno - 1, f"{error.msg} at column {error.colno}", error)
    except RecursionError as error:
        _damaged(path, line, "it is nested too deeply", error)


def _damaged(path: Path, line: int, why: str, error: Exception | None = None) -> NoReturn:
    raise CorpusError(
        f"cannot read rows from {str(path)!r}, line {line}: {why}; repair that line or take it out"
    ) from (error)


def _lines(path: Path, file: Iterable[str]) -> Iterator[tuple[int, Row]]:
    for line, text in enumerate(file, 1):
        if text.strip():
            yield line, _object(path, line, _decode(path, line, text.strip()))


def _objects(path: Path, file: Iterable[str]) -> Iterator[tuple[int, Row]]:
    """The rows of a .json file: an array of objects, or an object a line as in .jsonl."""
    text = "".join(file)
    if text.lstrip()[:1] != "[":
        try:
            _DECODER.decode(text.strip())
        except json.JSONDecodeError:
            return _lines(path, iter(text.split("\n")))
        return iter([(1, _object(path, 1, _decode(path, 1, text.strip())))])
    return ((n, _object(path, n, row)) for n, row in enumerate(_decode(path, 1, text), 1))


def _object(path: Path, line: int, row: Any) -> Row:
    if not isinstance(row, dict):
        _damaged(path, line, f"a row is an object with fields, not {type(row).__name__}")
    return row


def _cells(path: Path, file: Iterable[str], mark: str) -> Iterator[tuple[int, Row]]:
    reader = csv.reader(file, delimiter=mark, strict=True)
    head: list[str] = []
    former = csv.field_size_limit(sys.maxsize >> 32 or sys.maxsize)  # a C long, which has 32 bits on some systems
    try:
        for cells in reader:
            if not cells:
                continue
            if not head:
                head = cells
                continue
            if len(cells) > len(head):
                raise CorpusError(
                    f"the rows of {str(path)!r} have more fields than its first line names ({', '.join(head)}); "
                    f'put values that hold commas into quotes: "1, 2" (line {reader.line_num})'
                )
            yield reader.line_num, _pairs(list(zip(head, cells, strict=False)))
    except csv.Error as error:
        _damaged(path, reader.line_num, str(error), error)
    finally:
        csv.field_size_limit(former)


def _value(path: Path, line: int, name: str, row: Row) -> Any:
    if name in getattr(row, "twice", ()):
        _damaged(path, line, f"it has the field {name!r} more than once")
    try:
        return _text(row[name])
    except UnicodeEncodeError as error:
        _damaged(path, line, f"the field {name!r} holds half a character ({error.reason})", error)


def _text(value: Any) -> Any:
    """A value of JSON with its booleans as text, within lists and objects too. UnicodeEncodeError: half a character."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return [_text(each) for each in value]
    if isinstance(value, dict):
        return {name: _text(each) for name, each in value.items()}
    if isinstance(value, str) and not value.isascii():
        value.encode()
    return value


def _parquet(path: Path, columns: Collection[str]) -> tuple[list[str], list[Row]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = list(file.schema_arrow.names)
            wanted = [name for name in columns if name in names]
            rows = [row for batch in file.iter_batches(columns=wanted) for row in typed_rows(batch)]
    except (OSError, pyarrow.ArrowException) as error:
        raise CorpusError(f"cannot read rows from {str(path)!r}: {error}") from error
    return names, plain_rows(str(path), rows)


def typed_rows(batch: Any) -> list[Row]:
    """The rows of a pyarrow batch or table, in which floats of 16 and 32 bits have the fewest digits that tell them."""
    columns = {
        name: _short_floats(column.to_pylist(), column.type)
        for name, column in zip(batch.schema.names, batch.columns, strict=True)
    }
    return [{name: values[row] for name, values in columns.items()} for row in range(batch.num_rows)]


def _short_floats(values: list[Any], kind: Any) -> list[Any]:
    """Values with the float nearest to the shortest text of each narrow one: 0.1, not 0.10000000149011612."""
    import numpy
    import pyarrow

    narrow = {"halffloat": numpy.float16, "float": numpy.float32}.get(str(kind))
    if narrow is not None:
        return [None if value is None else float(str(narrow(value))) for value in values]
    if pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind) or pyarrow.types.is_fixed_size_list(kind):
        return [None if value is None else _short_floats(value, kind.value_type) for value in values]
    if pyarrow.types.is_struct(kind):
        for field in kind:
            short = iter(_short_floats([value[field.name] for value in values if value is not None], field.type))
            values = [None if value is None else {**value, field.name: next(short)} for value in values]
    return values


def plain_rows(source: str, rows: Iterable[Row]) -> list[Row]:
    """Rows whose values have types, as those of Parquet files and of the hub do, with `plain` values.

    Raises CorpusError, with the row's number, for bytes that are no text.
    """
    found: list[Row] = []
    for number, row in enumerate(rows, 1):
        try:
            found.append({name: plain(value) for name, value in row.items()})
        except UnicodeDecodeError as error:
            name = next(name for name, value in row.items() if _holds(value, error.object))
            raise CorpusError(
                f"{source!r}, row {number}: the field {name!r} holds bytes that are not UTF-8 text ({error.reason}); "
                "name a field of text, or write the text into one"
            ) from error
    return found


def _holds(value: Any, part: bytes) -> bool:
    if isinstance(value, dict):
        value = list(value.values())
    return any(_holds(each, part) for each in value) if isinstance(value, list) else value is part or value == part


def plain(value: Any) -> Any:
    """A value with a type of its own as text: what is taught must not depend on how Python happens to show an object.

    Timestamps as "2024-03-15 12:30:00", with fractions and the offset ("+00:00") where they have them; dates and times
    likewise (ISO 8601); durations as "1 day, 6:00:00"; decimals with all their digits, "1.10"; booleans as "true" and
    "false"; bytes as the UTF-8 text they hold; NaN is None, as in JSON. Integers, floats and text stay as they
    are; lists and objects hold what is so written. Raises UnicodeDecodeError for other bytes.
    """
    if isinstance(value, list):
        return [plain(each) for each in value]
    if isinstance(value, dict):
        return {name: plain(each) for name, each in value.items()}
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and math.isnan(value):
        return None
    if isinstance(value, datetime.datetime):  # pandas' too, which has nanoseconds
        return value.isoformat(sep=" ")
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, datetime.timedelta):
        return str(value)
    if isinstance(value, decimal.Decimal):
        return f"{value:f}"
    return value.decode("utf-8") if isinstance(value, bytes) else value
