"""Scores of answers: pure functions of two texts, the reference answer and the one that is given.

numeric("#### 1/2", "It is 0.5.")                     # 1.0
numeric("#### 1,234", "So the answer is $1234.00.")    # 1.0
scorer("regex", r"colou?r: (\\w+)")("color: red", "The colour: red")    # 1.0
"""

import re
import unicodedata
from collections.abc import Callable

from lora_lite.errors import LoraLiteError
from lora_lite.lab.scoring.final_numbers import amounts, final_amount, reference_amount
from lora_lite.lab.scoring.number_tokens import INVISIBLE, NUMBER, numbers, plain
from lora_lite.lab.scoring.patterns import PatternError, PatternTimeout
from lora_lite.lab.scoring.patterns import pattern as compiled

RIGHT = 1 - 1e-6  # an answer with this score is right; verifiers work in floats

Scorer = Callable[[str, str], float]  # (reference answer, given answer) -> score in [0, 1]
Finder = Callable[[str, str], bool]  # (reference answer, reply) -> whether the answer is anywhere in the reply


class ScoringError(LoraLiteError, ValueError):
    """A scorer that does not exist or cannot be made; the message says which there are, or what the pattern lacks."""


class SlowScoring(ScoringError):
    """A pattern took too long in a text."""


def exact(reference: str, answer: str) -> float:
    """1 if the answer is the reference; case, blanks and the encoding of accents do not count: see `normal`."""
    return float(normal(reference) == normal(answer))


def numeric(reference: str, answer: str) -> float:
    """1 if the reference's one number is exactly the answer's final one (18.00 is 18, 0.5 is 1/2); else 0.

    0 too where the reference is no single number, such as "(1, 2)" or "3√2": see `final_numbers.reference_amount`.
    """
    expected, found = reference_amount(reference), final_amount(answer)
    return float(expected is not None and found is not None and expected.same(found))


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

    False where the reference is no single number.
    """
    expected = reference_amount(reference)
    return expected is not None and any(expected.same(found) for found in amounts(answer))


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
