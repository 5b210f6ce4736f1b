"""Forms in which rows of questions and answers are found, recognised by the names of their fields."""

import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from lora_lite.lab.tasks.corpora import load_rows, read_table
from lora_lite.lab.tasks.row_files import CorpusError

_ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}


@dataclass(frozen=True)
class Exchange:
    """What a row says: values of any type, as they stand. system: its system message, "" without one."""

    question: Any
    answer: Any
    system: str = ""
    left_out: str = ""  # why the row does not serve, where the form itself shows it


@dataclass(frozen=True)
class Form:
    """Fields that a row must have and may have, and how it is read."""

    fields: tuple[str, ...]
    read: Callable[[dict[str, Any]], Exchange]
    optional: tuple[str, ...] = ()


def pair(question: str, answer: str) -> Form:
    """A field for the question and one for the answer."""
    return Form((question, answer), lambda row: Exchange(row[question], row[answer]))


def _task_with_input(row: dict[str, Any]) -> Exchange:
    given = row.get("input")
    asked = f"{row['instruction']}\n\n{given}" if isinstance(given, str) and given.strip() else row["instruction"]
    return Exchange(asked, row["output"])


def _conversation(field: str) -> Form:
    return Form((field,), lambda row: _exchange(row[field]))


def _exchange(turns: Any) -> Exchange:
    """The one question of a conversation, its answer, and the system message before them."""
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        return Exchange("", "", left_out="no list of messages")
    roles = [_ROLES.get(str(turn.get("role", turn.get("from")))) for turn in turns]
    texts = [turn.get("content", turn.get("value")) for turn in turns]
    system = ""
    if roles[:1] == ["system"] and isinstance(texts[0], str):
        system, roles, texts = texts[0].strip(), roles[1:], texts[1:]
    if roles != ["user", "assistant"]:
        # An earlier turn is no part of one question: neither the splits by content nor the templates know of turns.
        return Exchange("", "", left_out="not one message of the user and one of the assistant")
    return Exchange(texts[0], texts[1], system)


FORMS = (
    pair("question", "answer"),
    pair("prompt", "completion"),
    pair("prompt", "response"),
    pair("query", "response"),
    Form(("instruction", "output"), _task_with_input, ("input",)),
    pair("instruction", "response"),
    _conversation("messages"),
    _conversation("conversations"),
)
FIELDS = tuple(dict.fromkeys(name for form in FORMS for name in (*form.fields, *form.optional)))


def form_of(names: Sequence[str], where: str) -> Form:
    """The one form whose fields are all there. Raises CorpusError, with what is known, if there is none or several."""
    found = [form for form in FORMS if set(form.fields) <= set(names)]
    if len(found) == 1:
        return found[0]
    known = "; ".join("/".join(form.fields) for form in found or FORMS)
    why = "several known forms" if found else "no known form of questions and answers"
    raise CorpusError(
        f"{where} has the fields {', '.join(names)}: {why} ({known}); name them with question=..., answer=..."
    )


def exchanges(source: str, split: str, question: str = "", answer: str = "") -> list[Exchange]:
    """What the rows of a split say: by the named fields, or by the form that has its fields there."""
    if question or answer:
        form = pair(question or "question", answer or "answer")
        return [form.read(row) for row in load_rows(source, split, form.fields)]
    names, rows = read_table(source, split, FIELDS)
    form = form_of(names, f"{source!r} (split {split})")
    return [form.read({**dict.fromkeys(form.fields), **row}) for row in rows]


def text_of(value: Any, source: str) -> str:
    """A question or answer as text without blanks around it. Raises CorpusError for a list or an object."""
    if isinstance(value, list | dict):
        raise CorpusError(
            f"a question or answer of {source!r} is a {type(value).__name__}, not text: "
            f"{textwrap.shorten(str(value), 80)!r}; name a field of text, or write the text into one"
        )
    return "" if value is None else str(value).strip()
