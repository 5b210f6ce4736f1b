"""Scores of answers: pure functions of two texts, the reference answer and the one that is given.

final_number("16 - 3 = 13 eggs.\\n#### 13")            # Decimal("13")
numeric("#### 1/2", "It is 0.5.")                     # 1.0
numeric("#### 1,234", "So the answer is $1234.00.")    # 1.0
scorer("regex", r"colou?r: (\\w+)")("color: red", "The colour: red")    # 1.0
"""

import re
import unicodedata
from collections import deque
from collections.abc import Callable

from lora_lite.errors import LoraLiteError
from lora_lite.lab.tasks.number_tokens import INVISIBLE, NUMBER, Number, numbers, plain, value
from lora_lite.lab.tasks.patterns import PatternError, PatternTimeout
from lora_lite.lab.tasks.patterns import pattern as compiled

RIGHT = 1 - 1e-6  # an answer with this score is right; verifiers work in floats

Scorer = Callable[[str, str], float]  # (reference answer, given answer) -> score in [0, 1]
Finder = Callable[[str, str], bool]  # (reference answer, reply) -> whether the answer is anywhere in the reply

_MARK = "####"  # GSM8K's, before the answer
# The mark with its answer, "#### 7" or "#### Total: 7"; in "#### Step 1" it is a heading of Markdown.
_MARKED = re.compile(r"####(?!#)(?:[^\n\d#]*[:=])?(?:\\boxed|[^\w#])*?(?=-?[$€£¥₹]?\.?[0-9])")
_HEADING = re.compile(r"(\d\d?)[.):][ \t*_]+[^\W\d_]")  # the number in "#### 1. Understand the question"
_SPOKEN = re.compile(r"the\s+answer\s+is", re.IGNORECASE)  # MetaMathQA's
_BOXED = re.compile(r"\\boxed\s*\{", re.IGNORECASE)  # MATH's
# What may stand between two numbers of one calculation: a unit, then operators, brackets and currencies.
_OPERATION = re.compile(
    r"[%°]?(?:\s*[^\W\d_]+(?:/[^\W\d_]+)?)?[\s()\[\]{}$€£¥₹<>]*"
    r"(?:(?:[-+*/=]|\b(?:times|plus|minus|over|x|divided\s+by|multiplied\s+by|equals)\b)[\s()\[\]{}$€£¥₹<>]*)+",
    re.IGNORECASE,
)


class ScoringError(LoraLiteError, ValueError):
    """A scorer that does not exist or cannot be made; the message says which there are, or what the pattern lacks."""


class SlowScoring(ScoringError):
    """A pattern took too long in a text."""


def final_number(text: str) -> Number | None:
    """The number that a text comes to; None if there is none.

    It is the first number after the last "####"; without that mark, the first after the last "The answer is" (in any
    case); without either, the first after the last "\\boxed{"; else the last number of the text. Of a calculation
    there, it is the result: of "3 * 6 = 18" 18. A "####" that begins a heading ("#### Step 1") counts only where
    nothing else marks the answer. A mark that no number follows gives None: a number in the reasoning before it is not
    the answer. Currency, thousands separators, units, percent signs and a full stop at the end do not count:
    "-$1,234.50." is -1234.5, "50%" is 50. How numbers are written, and the values of times and dates: `number_tokens`.
    """
    text = plain(text)
    if answer := _after_mark(text):
        return _stated(answer)
    if spoken := _last(_SPOKEN, text):
        return _stated(text[spoken.end() :])
    if boxed := _last(_BOXED, text):
        return _stated(text[boxed.end() :])
    heading, _, below = text.rpartition(_MARK)[2].partition("\n") if _MARK in text else ("", "", text)
    number = _last(NUMBER, below) or NUMBER.search(heading)
    return value(number) if number else None


def _after_mark(text: str) -> str:
    """What stands after the last "####" with an answer; "" if there is none."""
    marks = list(_MARKED.finditer(text))
    for mark in reversed(marks):
        heading = _HEADING.match(text, mark.end())
        if not (heading and int(heading[1]) <= len(marks)):
            return text[mark.end() :]
    return ""


def _stated(text: str) -> Number | None:
    """The number that a text begins with, or the result where that is a calculation: its first side of one number."""
    sides: list[list[re.Match[str]]] = []
    end = 0
    for number in numbers(text):
        between = text[end : number.start("parts") if number["parts"] else number.start("digits")]
        if sides and not (_OPERATION.fullmatch(between) or (number["sign"] and between.strip() == "-")):
            break
        if not sides or "=" in between or "equals" in between.casefold():
            sides.append([])
        sides[-1].append(number)
        end = number.end()
    if not sides:
        return None
    return value(next((side[0] for side in sides if len(side) == 1), sides[0][0]))


def _last(pattern: re.Pattern[str], text: str) -> re.Match[str] | None:
    return next(iter(deque(pattern.finditer(text), maxlen=1)), None)


def exact(reference: str, answer: str) -> float:
    """1 if the answer is the reference; case, blanks and the encoding of accents do not count: see `normal`."""
    return float(normal(reference) == normal(answer))


def numeric(reference: str, answer: str) -> float:
    """1 if the final numbers of both are exactly equal (18.00 is 18, 0.5 is 1/2); 0 where either has none."""
    expected = final_number(reference)
    return float(expected is not None and expected == final_number(answer))


def regex(pattern: str) -> Scorer:
    """A scorer that compares what the one group of a pattern holds in its last match, without surrounding blanks.

    The pattern is searched in the reference and in the answer; a text that it does not match scores 0. The scorer
    raises SlowScoring for a text that takes too long.
    Raises ScoringError if it is no regular expression, is too large, or has not exactly one group.
    """
    extract = _extractor(pattern)

    def compare(reference: str, answer: str) -> float:
        expected = extract(reference)
        return float(expected is not None and expected == extract(answer))

    return compare


def _extractor(pattern: str) -> Callable[[str], str | None]:
    """What reads the group of a pattern's last match out of a text; None where it does not match."""
    try:
        expression = compiled(pattern)
    except PatternError as error:
        raise ScoringError(f"pattern={pattern!r} {error}") from error
    if expression.groups != 1:
        raise ScoringError(
            f"pattern={pattern!r} has {expression.groups} groups; put the answer, and nothing else, into one: (...); "
            "a group that only holds things together is written (?:...)"
        )

    def extract(text: str) -> str | None:
        try:
            found = expression.findall(text)
        except PatternTimeout as error:
            raise SlowScoring(f"pattern={pattern!r} {error}") from error
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
    sought = plain(reference.strip()).casefold()
    if NUMBER.fullmatch(sought):
        return any(number.group() == sought for number in numbers(plain(answer).casefold()))
    sought = normal(reference)
    before = r"(?<!\w)(?<!\d[.,:/])" if sought[:1].isdigit() else r"(?<!\w)"
    after = r"(?!\w)(?![.,:/]\d)" if sought[-1:].isdigit() else r"(?!\w)"
    return bool(sought) and re.search(before + re.escape(sought) + after, normal(answer)) is not None


def mentions_number(reference: str, answer: str) -> bool:
    """Whether the number that the reference comes to is anywhere among the numbers of the answer, read as by `numeric`.

    False where the reference has none.
    """
    expected = final_number(reference)
    return expected is not None and any(value(number) == expected for number in numbers(plain(answer)))


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
    """A text in lower case with single blanks between its words.

    Letters with accents are in one form (NFC), whether they came as one character or as two, and characters of no width
    are left out, so that two texts that look the same are.
    """
    folded = unicodedata.normalize("NFD", INVISIBLE.sub("", text)).casefold()
    return " ".join(unicodedata.normalize("NFC", folded).split())
