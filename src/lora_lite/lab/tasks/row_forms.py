"""Forms in which rows of questions and answers are found, recognised by the names of their fields."""

import re
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lora_lite.lab.tasks.corpora import load_rows, read_table
from lora_lite.lab.tasks.row_files import CorpusError

_ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
_SYSTEM = ("system", "system_prompt")  # columns beside the question


@dataclass(frozen=True)
class Exchange:
    """What a row says: values of any type, as they stand. system: its system message, "" without one."""

    question: Any
    answer: Any
    system: str = ""
    left_out: str = ""  # why the row does not serve, where the form itself tells
    choices: tuple[str, ...] = ()  # that the question names, with letters


@dataclass(frozen=True)
class Form:
    """Fields that a row must have and may have, and how it is read: (row, source) -> what it says."""

    fields: tuple[str, ...]
    read: Callable[[dict[str, Any], str], Exchange]
    optional: tuple[str, ...] = ()


def pair(question: str, answer: str) -> Form:
    """A field for the question and one for the answer, and no other."""
    return Form((question, answer), lambda row, source: Exchange(row[question], row[answer]))


def _asked(question: str, answer: str) -> Form:
    """A pair whose question may have parts in fields of their own: a context before it, an input or choices behind."""

    def read(row: dict[str, Any], source: str) -> Exchange:
        asked = text_of(row[question], source)
        if not asked:
            return Exchange("", row[answer])
        choices = _choices(row.get("choices"), source)
        parts = (_passage(row.get("context"), source), asked, _passage(row.get("input"), source), _lettered(choices))
        return Exchange("\n\n".join(filter(None, parts)), row[answer], _system(row, source), choices=choices)

    return Form((question, answer), read, ("context", "input", "choices", *_SYSTEM))


def _passage(value: Any, source: str) -> str:
    """A text, or several below each other."""
    if isinstance(value, list) and all(isinstance(each, str) for each in value):
        value = "\n\n".join(value)
    return text_of(value, source)


def _system(row: dict[str, Any], source: str) -> str:
    return next(filter(None, (text_of(row.get(name), source) for name in _SYSTEM)), "")


def _choices(value: Any, source: str) -> tuple[str, ...]:
    """The choices of a question: a list, ARC's {"text": [...], "label": [...]}, or none. A text is one choice."""
    if isinstance(value, dict) and isinstance(value.get("text"), list):
        value = value["text"]
    found = value if isinstance(value, list) else [] if value is None else [value]
    return tuple(text_of(each, source) for each in found)


def _lettered(choices: Sequence[str]) -> str:
    if len(choices) < 2:
        return "".join(choices)
    return "\n".join(f"{letter}. {choice}" for letter, choice in zip(_letters(choices), choices, strict=True))


def _letters(choices: Sequence[str]) -> list[str]:
    return [chr(ord("A") + place) if place < 26 else str(place + 1) for place in range(len(choices))]


def by_letter(rows: Sequence[Exchange]) -> list[Exchange]:
    """Rows in which an answer that is the number of a choice, as MMLU's, is its letter.

    Numbers count from 0, unless none of the rows has 0 and one has the number of its last choice counted from 1.
    """
    numbers = [_number(row) for row in rows]
    told = [(number, len(row.choices)) for number, row in zip(numbers, rows, strict=True) if number is not None]
    first = int(all(number for number, _ in told) and any(number == count for number, count in told))
    return [
        replace(row, answer=_letters(row.choices)[number - first])
        if number is not None and 0 <= number - first < len(row.choices)
        else row
        for number, row in zip(numbers, rows, strict=True)
    ]


def _number(row: Exchange) -> int | None:
    """The answer as the number of a choice; None where it is none, or a choice's own text."""
    answer = str(row.answer).strip()
    if len(row.choices) < 2 or answer in row.choices or not re.fullmatch(r"[0-9]{1,3}", answer):
        return None
    return int(answer)


def _conversation(field: str) -> Form:
    def read(row: dict[str, Any], source: str) -> Exchange:
        said = _exchange(row[field])
        return said if said.system or said.left_out else replace(said, system=_system(row, source))

    return Form((field,), read, _SYSTEM)


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
    _asked("question", "answer"),
    _asked("prompt", "completion"),
    _asked("prompt", "response"),
    _asked("query", "response"),
    _asked("instruction", "output"),
    _asked("instruction", "response"),
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


def exchanges(source: str, split: str, question: str = "", answer: str = "") -> tuple[list[Exchange], list[str]]:
    """What the rows of a split say: by the named fields, or by the form that has its fields there.

    With the form, also the names of the fields that it does not read; fields that were named are a choice already.
    """
    if question or answer:
        form = pair(question or "question", answer or "answer")
        return [form.read(row, source) for row in load_rows(source, split, form.fields)], []
    names, rows = read_table(source, split, FIELDS)
    form = form_of(names, f"{source!r} (split {split})")
    unread = [name for name in names if name not in (*form.fields, *form.optional)]
    return by_letter([form.read({**dict.fromkeys(form.fields), **row}, source) for row in rows]), unread


def text_of(value: Any, source: str) -> str:
    """A question or answer as text without blanks around it. Raises CorpusError for a list or an object."""
    if isinstance(value, list | dict):
        raise CorpusError(
            f"a question or answer of {source!r} is a {type(value).__name__}, not text: "
            f"{textwrap.shorten(str(value), 80)!r}; name a field of text, or write the text into one"
        )
    return "" if value is None else str(value).strip()
