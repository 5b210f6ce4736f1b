"""A question in a model's chat template, whatever the template does with system messages.

Templates differ: some refuse a system message, some skip it, some want the content as a list of parts. What a template
does is seen by rendering marks in place of the texts; a prompt that would lack its question or instruction is an error.
Templates come with models, and may be broken or hostile: each is tried once where it can be stopped (`bounded`).
"""

import contextlib
import re
import textwrap
from typing import Any

from transformers import PreTrainedTokenizerBase

from lora_lite.errors import LoraLiteError
from lora_lite.lab.models.bounded import why_unbounded

_MARKS = ("Q7c1d0e5question", "I3b9f42ainstruction")  # letters and digits, which no template changes

_BOUNDED: set[str] = set()  # templates that were tried, and end

Conversation = list[dict[str, Any]]


class ChatTemplateError(LoraLiteError, ValueError):
    """A chat template that shows no question or no instruction, fails or never ends; the message says what to do."""


def render_chat(tokenizer: PreTrainedTokenizerBase, question: str, instruction: str) -> str:
    """The rendering, ready for the answer: the instruction as system message where that is shown, else in the user's
    turn. Raises ChatTemplateError if the question or the instruction would not be in it."""
    form = _form(tokenizer, bool(instruction))
    text = str(_render(tokenizer, _conversation(form, question, instruction)))
    for name, wanted in (("question", question), ("instruction", instruction)):
        if wanted.strip() not in text:
            raise ChatTemplateError(
                f"the tokenizer's chat template changes the {name} {wanted[:80]!r} or leaves it out; "
                "give a plain prompt (chat=False), or set another tokenizer.chat_template"
            )
    return text


def chat_pieces(tokenizer: PreTrainedTokenizerBase, question: str, instruction: str) -> list[tuple[str, bool]]:
    """`render_chat` in pieces, (text, whether it is the question's or the instruction's)."""
    whole = render_chat(tokenizer, question, instruction)
    form = _form(tokenizer, bool(instruction))
    marked = str(_render(tokenizer, _marked(form, bool(instruction))))
    texts = {_MARKS[0]: question.strip(), _MARKS[1]: instruction.strip()}
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


def _form(tokenizer: PreTrainedTokenizerBase, instructed: bool) -> tuple[bool, bool]:
    """(whether the instruction is a system message, whether contents are lists of parts) of a template."""
    _require_bounded(tokenizer)
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


def _require_bounded(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise ChatTemplateError for a template that takes too long or too much memory with the marks alone."""
    template = repr(tokenizer.chat_template)
    if template in _BOUNDED:
        return
    marked = [_marked(form, instructed) for instructed in (True, False) for form in _forms(instructed)]

    def render_all() -> None:
        for conversation in marked:
            with contextlib.suppress(ChatTemplateError):
                _render(tokenizer, conversation)

    if why := why_unbounded(render_all):
        raise ChatTemplateError(
            f"the tokenizer's chat template cannot be used: {why}; give a plain prompt (chat=False), or set another "
            "tokenizer.chat_template"
        )
    _BOUNDED.add(template)


def _forms(instructed: bool) -> list[tuple[bool, bool]]:
    """The forms to try, in their order."""
    return [(system, parts) for parts in (False, True) for system in ((True, False) if instructed else (False,))]


def _marked(form: tuple[bool, bool], instructed: bool) -> Conversation:
    return _conversation(form, _MARKS[0], _MARKS[1] if instructed else "")


def _conversation(form: tuple[bool, bool], question: str, instruction: str) -> Conversation:
    system, parts = form
    user = question if system or not instruction else f"{question}\n{instruction}"
    messages = [("system", instruction)] if system else []
    return [
        {"role": role, "content": [{"type": "text", "text": text}] if parts else text}
        for role, text in [*messages, ("user", user)]
    ]


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
