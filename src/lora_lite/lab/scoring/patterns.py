"""Regular expressions of users: refused if compiling them would take too much, and stopped where a search does.

Backtracking makes some expressions exponential: `((?:a+)+b)` in a row of n letters "a" takes 2^n steps. Which ones is
not seen from outside, so the search itself has a limit of time, which is what the package `regex` has and `re` lacks.
"""

from functools import lru_cache

import regex

from lora_lite.errors import LoraLiteError

SECONDS = 1.0  # that a search in one text may take
ATOMS = 100_000  # that an expression may have once its counted repeats are written out, as `regex` does
_ATOM = regex.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*+\]|\{(\d{0,10})(?:,(\d{0,10}))?\}|.", regex.DOTALL)


class PatternError(LoraLiteError, ValueError):
    """An expression that is none, or is too large; the message continues a sentence that begins with its name."""


class PatternTimeout(PatternError):
    """A search that took too long."""


class Pattern:
    """A compiled expression whose searches end.

    Raises PatternError if the text is no regular expression, or is too large; the methods raise PatternTimeout for a
    text in which the search takes more than SECONDS.
    """

    def __init__(self, text: str, dotall: bool = False) -> None:
        try:
            atoms = _atoms(text)
            if atoms > ATOMS:
                raise PatternError(f"is too large: {atoms:,} atoms with its repeats written out, of {ATOMS:,} allowed")
            self._compiled = regex.compile(text, regex.DOTALL if dotall else 0)
        except regex.error as error:
            raise PatternError(f"is not a regular expression: {error}") from error
        except RecursionError as error:
            raise PatternError("is too large: its brackets are nested too deeply") from error
        self.groups = self._compiled.groups

    def findall(self, text: str) -> list[str]:
        """What all matches hold: of their one group if there is one."""
        try:
            return self._compiled.findall(text, timeout=SECONDS)
        except TimeoutError as error:
            raise PatternTimeout(_slow(text)) from error

    def remove(self, text: str) -> str:
        """The text without what matches."""
        try:
            return self._compiled.sub("", text, timeout=SECONDS)
        except TimeoutError as error:
            raise PatternTimeout(_slow(text)) from error


@lru_cache(maxsize=64)
def pattern(text: str, dotall: bool = False) -> Pattern:
    """The compiled expression of a text; compiled once."""
    return Pattern(text, dotall)


def _slow(text: str) -> str:
    return (
        f"takes more than {SECONDS:g} s in a text of {len(text):,} characters; write it without a repeat inside a "
        'repeat, as in "(?:a+)+"'
    )


def _atoms(text: str) -> int:
    """Characters, classes and groups of an expression, those of a counted group as often as it is repeated."""
    sizes, last = [0], 0
    for found in _ATOM.finditer(text):
        if found[0] == "(":
            sizes.append(1)
        elif found[0] == ")" and len(sizes) > 1:
            last = sizes.pop()
            sizes[-1] += last
        elif times := found[2] or found[1]:
            if last > 1:  # one character or class is repeated by a counter
                sizes[-1] += last * (int(times) - 1)
                last *= int(times)
        else:
            last = 1
            sizes[-1] += 1
    return sum(sizes)
