"""A question in a model's chat template, with what was said before, whatever the template does with system messages.

Templates differ: some refuse a system message, some skip it, some want the content as a list of parts. What a template
does is seen by rendering marks in place of the texts; a prompt that would lack its question or instruction is an error.
Templates come with models, and may be broken or hostile: each is tried once where it can be stopped (`bounded`).
"""

import contextlib
import re
import textwrap
from collections.abc import Sequence
from itertools import chain
from typing import Any

from transformers import PreTrainedTokenizerBase

from lora_lite.errors import LoraLiteError
from lora_lite.lab.models.bounded import why_unbounded

_MARKS = ("Q7c1d0e5question", "I3b9f42ainstruction")  # letters and digits, which no template changes

_BOUNDED: set[tuple[str, int]] = set()  # templates that were tried, and end: with so many questions before the last

Conversation = list[dict[str, Any]]
History = Sequence[tuple[str, str]]  # questions before this one, each with its reply


class ChatTemplateError(LoraLiteError, ValueError):
    """A chat template that shows no question or no instruction, fails or never ends; the message says what to do."""


def render_chat(tokenizer: PreTrainedTokenizerBase, question: str, instruction: str, history: History = ()) -> str:
    """The rendering, ready for the answer: the instruction as system message where that is shown, else in the user's
    first turn. Raises ChatTemplateError if a question or the instruction would not be in it; earlier replies may be
    shortened, as templates of models that think aloud do."""
    form = _form(tokenizer, bool(instruction), len(history))
    text = str(_render(tokenizer, _conversation(form, question, instruction, history)))
    asked = [("question", earlier) for earlier, _ in history]
    for name, wanted in (*asked, ("question", question), ("instruction", instruction)):
        if wanted.strip() not in text:
            raise ChatTemplateError(
                f"the tokenizer's chat template changes the {name} {wanted[:80]!r} or leaves it out; "
                "give a plain prompt (chat=False), or set another tokenizer.chat_template"
            )
    return text


def chat_pieces(
    tokenizer: PreTrainedTokenizerBase, question: str, instruction: str, history: History = ()
) -> list[tuple[str, bool]]:
    """`render_chat` in pieces, (text, whether it is a question's, a reply's or the instruction's)."""
    whole = render_chat(tokenizer, question, instruction, history)
    form = _form(tokenizer, bool(instruction), len(history))
    marked = str(_render(tokenizer, _marked(form, bool(instruction), len(history))))
    texts = {_MARKS[0]: question.strip(), _MARKS[1]: instruction.strip()}
    earlier = chain.from_iterable(_earlier_marks(len(history)))
    texts |= {mark: text.strip() for mark, text in zip(earlier, chain.from_iterable(history), strict=True)}
    pieces = [(marked, False)]
    for mark, text in texts.items():
        pieces = [
            piece
            for told, literal in pieces
            for piece in ([(told, True)] if literal else _replaced(told, mark, text))
        ]  # fmt: skip
    if "".join("".join(text for text, _ in pieces).split()) != "".join(whole.split()):
        raise ChatTemplateError(
            f"the question {question[:80]!r} holds names of control tokens, and the chat template changes it; "
            "take them out, or give a plain prompt (chat=False)"
        )
    return pieces


def _replaced(told: str, mark: str, text: str) -> list[tuple[str, bool]]:
    frames = told.split(mark)
    pieces = [(frames[0], False)]
    for frame in frames[1:]:
        pieces += [(text, True), (frame, False)]
    return pieces


def _form(tokenizer: PreTrainedTokenizerBase, instructed: bool, earlier: int) -> tuple[bool, bool]:
    """(whether the instruction is a system message, whether contents are lists of parts) of a template.

    The same whatever was said before. earlier: how many questions there were, with which the template is tried.
    """
    _require_bounded(tokenizer, 0)
    _require_bounded(tokenizer, earlier)
    wanted, reason = _MARKS if instructed else _MARKS[:1], ""
    for form in _forms(instructed):
        try:
            text = str(_render(tokenizer, _marked(form, instructed)))
        except ChatTemplateError as error:  # refused, or contents of another type than it expects
            reason = f" (the last try: {error.__cause__})"
            continue
        if all(text.count(mark) == 1 and not _shows_part(text, mark) for mark in wanted):
            return form
    raise ChatTemplateError(
        "the tokenizer's chat template does not show the user's message"
        + (" with an instruction, be it in the system message or in the user's" if instructed else "")
        + f"{reason}; give a plain prompt (chat=False), or set another tokenizer.chat_template"
    )


def _shows_part(text: str, mark: str) -> bool:
    """Whether a mark stands in the part itself, {'type': 'text', 'text': mark}, which the template took for a text."""
    return re.search(rf"""text\\?['"]\s*:\s*\\?['"]{mark}""", text) is not None


def _require_bounded(tokenizer: PreTrainedTokenizerBase, earlier: int) -> None:
    """Raise ChatTemplateError for a template that takes too long or too much memory with the marks alone."""
    tried = repr(tokenizer.chat_template), earlier
    if tried in _BOUNDED:
        return
    marked = [_marked(form, instructed, earlier) for instructed in (True, False) for form in _forms(instructed)]

    def render_all() -> None:
        for conversation in marked:
            with contextlib.suppress(ChatTemplateError):
                _render(tokenizer, conversation)

    if why := why_unbounded(render_all):
        raise ChatTemplateError(
            f"the tokenizer's chat template cannot be used: {why}; give a plain prompt (chat=False), or set another "
            "tokenizer.chat_template"
        )
    _BOUNDED.add(tried)


def _forms(instructed: bool) -> list[tuple[bool, bool]]:
    """The forms to try, in their order."""
    return [(system, parts) for parts in (False, True) for system in ((True, False) if instructed else (False,))]


def _marked(form: tuple[bool, bool], instructed: bool, earlier: int = 0) -> Conversation:
    return _conversation(form, _MARKS[0], _MARKS[1] if instructed else "", _earlier_marks(earlier))


def _earlier_marks(number: int) -> list[tuple[str, str]]:
    """A mark for each earlier question and reply, none of which begins another."""
    return [(f"E5d2a{place}asked", f"R8f61b{place}replied") for place in range(number)]


def _conversation(form: tuple[bool, bool], question: str, instruction: str, history: History = ()) -> Conversation:
    system, parts = form
    turns = [*chain.from_iterable(history), question]
    if instruction and not system:
        turns[0] = f"{turns[0]}\n{instruction}"
    messages = [("system", instruction)] if instruction and system else []
    messages += [("assistant" if place % 2 else "user", text) for place, text in enumerate(turns)]
    return [{"role": role, "content": [{"type": "text", "text": text}] if parts else text} for role, text in messages]


def _render(tokenizer: PreTrainedTokenizerBase, conversation: Conversation) -> Any:
    """Raises ChatTemplateError, with its cause, for whatever the template raises but for what has no bounds."""
    try:
        return tokenizer.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False)
    except (RecursionError, MemoryError):
        raise
    except Exception as error:  # a template is foreign code: dividing by zero is no worse than refusing in words
        told = textwrap.shorten(f"{type(error).__name__}: {error}", 200)
        raise ChatTemplateError(
            f"the tokenizer's chat template fails ({told}); give a plain prompt (chat=False), or set another "
            "tokenizer.chat_template"
        ) from error
