"""Scores of answers: pure functions of two texts, the reference answer and the one that is given.

final_number("16 - 3 = 13 eggs.\\n#### 13")            # Decimal("13")
numeric("#### 1,234", "So the answer is $1234.00.")    # 1.0
scorer("regex", r"colou?r: (\\w+)")("color: red", "The colour: red")    # 1.0
"""

import re
from collections import deque
from collections.abc import Callable
from decimal import Decimal

from lora_lite.errors import LoraLiteError

RIGHT = 1 - 1e-6  # an answer with this score is right; verifiers work in floats

Scorer = Callable[[str, str], float]  # (reference answer, given answer) -> score in [0, 1]
Finder = Callable[[str, str], bool]  # (reference answer, reply) -> whether the answer is anywhere in the reply

_MARK = "####"  # GSM8K's, before the answer
_SPOKEN = re.compile(r"the\s+answer\s+is", re.IGNORECASE)  # MetaMathQA's
# A minus is a sign unless it stands behind something to subtract from or to join: "= -3" and "-$3" are negative, "5-3"
# and "COVID-19" are not. Commas count between groups of three digits only: "1,234" is one number, "1,2,3" are three.
_NUMBER = re.compile(
    r"(?:(?<![\w)\]%])(?P<sign>[-−])[$€£¥]?)?(?P<digits>\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d+(?:\.\d+)?|(?<!\w)\.\d+)",
    re.ASCII,
)


class ScoringError(LoraLiteError, ValueError):
    """A scorer that does not exist or cannot be made; the message says which there are, or what the pattern lacks."""


def final_number(text: str) -> Decimal | None:
    """The number that a text comes to; None if there is none.

    It is the first number after the last "####"; without that mark, the first after the last "The answer is" (in any
    case); without either, the last number of the text. A mark that no number follows gives None: a number in the
    reasoning before it is not the answer. Currency, thousands commas, units, percent signs and a full stop at the end
    do not count: "-$1,234.50." is -1234.5, "50%" is 50.
    """
    if _MARK in text:
        number = _NUMBER.search(text.rpartition(_MARK)[2])
    elif spoken := _last(_SPOKEN, text):
        number = _NUMBER.search(text[spoken.end() :])
    else:
        number = _last(_NUMBER, text)
    if number is None:
        return None
    return _value(number)


def _value(number: re.Match[str]) -> Decimal:
    value = Decimal(number["digits"].replace(",", ""))
    return -value if number["sign"] else value


def _last(pattern: re.Pattern[str], text: str) -> re.Match[str] | None:
    return next(iter(deque(pattern.finditer(text), maxlen=1)), None)


def exact(reference: str, answer: str) -> float:
    """1 if the answer is the reference; case and blanks do not count."""
    return float(normal(reference) == normal(answer))


def numeric(reference: str, answer: str) -> float:
    """1 if the final numbers of both are equal as decimals (18.00 is 18); 0 where either has none."""
    expected = final_number(reference)
    return float(expected is not None and expected == final_number(answer))


def regex(pattern: str) -> Scorer:
    """A scorer that compares what the one group of a pattern holds in its last match, without surrounding blanks.

    The pattern is searched in the reference and in the answer; a text that it does not match scores 0.
    Raises ScoringError if it is no regular expression, or has not exactly one group.
    """
    extract = _extractor(pattern)

    def compare(reference: str, answer: str) -> float:
        expected = extract(reference)
        return float(expected is not None and expected == extract(answer))

    return compare


def _extractor(pattern: str) -> Callable[[str], str | None]:
    """What reads the group of a pattern's last match out of a text; None where it does not match."""
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ScoringError(f"pattern={pattern!r} is not a regular expression: {error}") from error
    if compiled.groups != 1:
        raise ScoringError(
            f"pattern={pattern!r} has {compiled.groups} groups; put the answer, and nothing else, into one: (...); "
            "a group that only holds things together is written (?:...)"
        )

    def extract(text: str) -> str | None:
        found = compiled.findall(text)
        return found[-1].strip() if found else None

    return extract


def scorer(kind: str, pattern: str = "") -> Scorer:
    """The scorer of a name: "exact", "numeric", or "regex" with its pattern. Raises ScoringError for what is none."""
    if pattern and kind != "regex":
        raise ScoringError(f"a pattern belongs to score=regex, not to score={kind}")
    if kind == "regex":
        if not pattern:
            raise ScoringError("score=regex needs pattern=..., a regular expression with one group around the answer")
        return regex(pattern)
    plain = {"exact": exact, "numeric": numeric}
    if kind not in plain:
        raise ScoringError(f"no scorer {kind!r}; there are {', '.join(plain)} and regex")
    return plain[kind]


def mentions(reference: str, answer: str) -> bool:
    """Whether the reference occurs anywhere as whole words: what a reader who ignores the format would count.

    A number in it has to be a whole one there too: "5" is not in "15", "5.2" or "-5", nor "5 km" in "1.5 km".
    """
    sought = reference.strip().casefold()
    if _NUMBER.fullmatch(sought):
        return any(number.group() == sought for number in _NUMBER.finditer(answer))
    before = r"(?<!\w)(?<!\d[.,])" if sought[:1].isdigit() else r"(?<!\w)"
    after = r"(?!\w)(?![.,]\d)" if sought[-1:].isdigit() else r"(?!\w)"
    return bool(sought) and re.search(before + re.escape(sought) + after, answer.casefold()) is not None


def mentions_number(reference: str, answer: str) -> bool:
    """Whether the number that the reference comes to is anywhere among the numbers of the answer, read as by `numeric`.

    False where the reference has none.
    """
    expected = final_number(reference)
    return expected is not None and any(_value(number) == expected for number in _NUMBER.finditer(answer))


def finder(kind: str, pattern: str = "") -> Finder:
    """What looks for the answer anywhere in a reply, for the `scorer` of the same name and pattern.

    exact: the reference as whole words. numeric: its number. regex: what the pattern's group holds in the reference, as
    whole words, whether or not the pattern matches the reply. Raises ScoringError as `scorer` does.
    """
    scorer(kind, pattern)
    if kind == "regex":
        extract = _extractor(pattern)
        return lambda reference, answer: mentions(extract(reference) or "", answer)
    return {"exact": mentions, "numeric": mentions_number}[kind]


def normal(text: str) -> str:
    """A text in lower case with single blanks between its words."""
    return " ".join(text.casefold().split())
