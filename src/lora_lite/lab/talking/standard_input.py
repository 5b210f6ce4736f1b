"""What is typed or piped in: a line of a chat, or a whole prompt."""

import sys

from lora_lite.lab import terminal
from lora_lite.lab.errors import RunError


def next_line() -> str:
    """The next line of the chat. Raises EOFError at the end of the input."""
    try:
        line = input("> ")
    except UnicodeDecodeError as error:
        raise no_text("standard input", error) from error
    require_text(line)
    return line


def whole_input() -> str:
    """All of standard input, without the line end at its end."""
    if sys.stdin.isatty():
        terminal.remark("the prompt is read from here; Ctrl-D ends it")
    try:
        return sys.stdin.read().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise no_text("standard input", error) from error


def require_text(text: str) -> None:
    """Raise RunError for bytes that were no text, which Python takes along as halves of surrogate pairs."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise no_text("the prompt", error) from error


def no_text(what: str, error: UnicodeError) -> RunError:
    """The error for bytes that are no text."""
    return RunError(f"{what} is no text in {sys.stdin.encoding or 'UTF-8'} ({error}): convert it first, with iconv")
