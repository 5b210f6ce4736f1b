"""Which number a text comes to: a reply, read leniently, and a reference answer, which must leave no doubt.

final_number("16 - 3 = 13 eggs.\\n#### 13")            # Decimal("13")
final_number("The answer is 5 + 3, which is 8")       # Decimal("8")
reference_amount("#### 18 dollars")                   # Amount(Decimal("18"), DOLLARS)
reference_amount("(1, 2)")                            # None: it is no single number
"""

import re
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

from lora_lite.lab.scoring.number_tokens import NUMBER, Number, numbers, plain, value

DOLLARS, CENTS = "dollars", "cents"

_MARK = "####"  # GSM8K's, before the answer
# The mark with its answer, "#### 7" or "#### Total: 7"; in "#### Step 1" it is a heading of Markdown.
_MARKED = re.compile(r"####(?!#)(?:[^\n\d#]*[:=])?(?:\\boxed|[^\w#])*?(?=-?[$€£¥₹]?\.?[0-9])")
_HEADING = re.compile(r"(\d\d?)[.):][ \t*_]+[^\W\d_]")  # the number in "#### 1. Understand the question"
_SPOKEN = re.compile(  # MetaMathQA's "The answer is", and what models make of it
    r"\b(?:the|my|our)\s+(?:(?:final|correct|right|exact|numerical)\s+)?answer\s+is\b"
    r"|\bfinal\s+answer[\s*_]*(?:is\b|[:=])",
    re.IGNORECASE,
)
_BOXED = re.compile(r"\\boxed\s*\{", re.IGNORECASE)  # MATH's
_BRACKETS = r"[\s()\[\]{}$€£¥₹<>]*"
_UNIT = r"[%°]?(?:\s*[^\W\d_]+(?:/[^\W\d_]+)?)?"
# What may stand between two numbers of one calculation: a unit, then operators, brackets and currencies.
_OPERATION = re.compile(
    rf"{_UNIT}{_BRACKETS}"
    rf"(?:(?:[-+*/=≈]|\b(?:times|plus|minus|over|x|divided\s+by|multiplied\s+by|equals)\b){_BRACKETS})+",
    re.IGNORECASE,
)
# What may stand between a calculation and its result, beyond "=": ", which is", "or", "so she has".
_RESULT = re.compile(
    rf"{_UNIT}[\s,;.)\]}}$*_]*(?:\b(?:which|that|this|it)\s+)?"
    r"(?:\b(?:is|are|equals?|makes?|gives?|comes\s+to|or|so|thus|hence)\b|->|[→⇒≈~])(?:\s+[^\W\d_]+){0,3}[\s$€£¥₹*:]*",
    re.IGNORECASE,
)
_SENTENCE = re.compile(r"\n|[.!?;](?:\s|$)")  # where the answer of a reference ends, behind a mark
# Around its number, what makes a reference another number than that, or more than one. "@" stands for the number.
_NOT_PLAIN = re.compile(
    r"""
    [√∛±∓<>≤≥≠∞π∪∩|^]
  | \\(?!circ|degree)[a-z]                                    # a command of LaTeX that `plain` does not know
  | @\ ?(?:[ijnxyz]|pi|sqrt)\b | @!                           # a multiple of a variable, a factorial
  | @\)?\s*[+*]\s*[\w(] | @\s?[-/]\s?[ijnxyz]\b               # a calculation with one
  | (?:(?<![^\W\d_])[^\W\d_]|[)\]])\s*[-+*/]\s*[$€£¥₹]?@ | [^\W\d_]\s*[+*]\s*@
  | (?<![^\W\d_])[^\W\d_][_(]?@ | @[_^]                       # "x3", "B2", "f(3)"
  | \b(?:sqrt|root|log|ln|sin|cos|tan|exp|abs|mod|minus|negative|plus)\s*(?:of\s+)?[({]?\s*@
  | @.*\band\s+an?\s | \b(?:or|between)\b
    """,
    re.IGNORECASE | re.VERBOSE,
)
_EMPHASIS = re.compile(r"\*\*|__|`|(?<!\S)[*_](?=\S)|(?<=\S)[*_](?!\S)")
_CUBIC = re.compile(r"(?<=[^\W\d_])(?<=\b[kcmd]m|.\bm|\bft|\bin)[23]\b", re.IGNORECASE)  # of "m2": part of a unit


@dataclass(frozen=True)
class Amount:
    """A number, and whether it is said to be of dollars (or another currency) or of cents; "" where neither is."""

    number: Number
    money: str = ""

    def same(self, other: "Amount") -> bool:
        """Whether both are one amount: 5 dollars are 500 cents; where one has no unit, the numbers decide."""
        if {self.money, other.money} == {DOLLARS, CENTS}:
            return self._cents() == other._cents()
        return self.number == other.number

    def _cents(self) -> Number:
        if self.money == CENTS or isinstance(self.number, tuple):
            return self.number
        return Fraction(self.number) * 100


def final_number(text: str) -> Number | None:
    """The number that a text comes to; None if there is none.

    It is the first number after the last "####"; without that mark, the first after the last "The answer is" (in any
    case, also "the final answer is"); without either, the first after the last "\\boxed{"; else the last number of the
    text. Of a calculation there, it is the result: of "3 * 6 = 18" and of "3 * 6, which is 18" 18. A "####" that begins
    a heading ("#### Step 1") counts only where nothing else marks the answer. A mark that no number follows gives None:
    a number in the reasoning before it is not the answer. Currency, thousands separators, units, percent signs and a
    full stop at the end do not count: "-$1,234.50." is -1234.5, "50%" is 50. How numbers are written, and the values of
    times and dates: `number_tokens`.
    """
    found = final_amount(text)
    return found.number if found else None


def final_amount(text: str) -> Amount | None:
    """The number of `final_number`, with its currency."""
    text = plain(text)
    answer = _answer(text)
    if answer is not None:
        found = _stated(answer)
    else:
        heading, _, below = text.rpartition(_MARK)[2].partition("\n") if _MARK in text else ("", "", text)
        found = _last(NUMBER, below) or NUMBER.search(heading)
    return _amount(found) if found else None


def amounts(text: str) -> Iterator[Amount]:
    """All numbers of a text, as `final_amount` reads them."""
    return map(_amount, numbers(plain(text)))


def reference_amount(text: str) -> Amount | None:
    """The one number that a reference answer is; None where it is no number, several, or more than a number.

    It is what stands behind a mark, or the whole text: a number with a currency, a unit and words, or a calculation
    with its result ("3 + 5 = 8"). "(1, 2)", "3-5", "3√2" and "x=3, y=4" are none: whoever compares one of their numbers
    takes a wrong answer for right.
    """
    text = plain(text)
    answer = _answer(text)
    if answer is not None:
        answer = _within_box(answer)
    elif _MARK in text:
        answer = text.rpartition(_MARK)[2]
    text = _CUBIC.sub("", text if answer is None else _SENTENCE.split(answer.strip(), maxsplit=1)[0])
    found = list(numbers(text))
    if not found or _NOT_PLAIN.search(_EMPHASIS.sub("", _without(text, found))):
        return None
    if len(found) == 1:
        return _amount(found[0])
    sides = _sides(text)
    whole = len(sides) == 2 and len(sides[1]) == 1 and sum(map(len, sides)) == len(found)
    return _amount(sides[1][0]) if whole and len(sides[0]) > 1 else None


def _without(text: str, found: list[re.Match[str]]) -> str:
    """The text with "@" for its number; of a calculation, what stands before the first and behind the last."""
    return f"{text[: found[0].start()]}@{text[found[-1].end() :]}"


def _within_box(text: str) -> str:
    """What a text has in its first \\boxed{...}; the text where it has none."""
    box = _BOXED.search(text)
    if not box:
        return text
    depth, start = 1, box.end()
    for place in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return text[start:place]
    return text[start:]


def _answer(text: str) -> str | None:
    """What stands behind the mark that counts; None if there is no mark."""
    if answer := _after_mark(text):
        return answer
    if spoken := _last(_SPOKEN, text):
        return text[spoken.end() :]
    if boxed := _last(_BOXED, text):
        return text[boxed.start() :]
    return None


def _after_mark(text: str) -> str:
    """What stands after the last "####" with an answer; "" if there is none."""
    marks = list(_MARKED.finditer(text))
    for mark in reversed(marks):
        heading = _HEADING.match(text, mark.end())
        if not (heading and int(heading[1]) <= len(marks)):
            return text[text.index(_MARK, mark.start()) + len(_MARK) :]
    return ""


def _stated(text: str) -> re.Match[str] | None:
    """The number that a text begins with, or the result where that is a calculation: its first side of one number."""
    sides = _sides(text)
    if not sides:
        return None
    first = sides[0][0]
    if len(sides) > 1 and len(sides[1]) == 1 and _quotient(first) == value(sides[1][0]):
        return sides[1][0]  # "16:2 = 8"
    return next((side[0] for side in sides if len(side) == 1), first)


def _sides(text: str) -> list[list[re.Match[str]]]:
    """The numbers of the calculation that a text begins with, those of each side of its "=" apart."""
    sides: list[list[re.Match[str]]] = []
    end = 0
    for number in numbers(text):
        between = text[end : number.start("parts") if number["parts"] else number.start("digits")]
        open_ended = bool(sides) and (len(sides[-1]) > 1 or _quotient(sides[-1][0]) is not None)
        result = open_ended and _RESULT.fullmatch(between)
        if sides and not (result or _OPERATION.fullmatch(between) or (number["sign"] and between.strip() == "-")):
            break
        if not sides or result or re.search("[=≈]|equals", between, re.IGNORECASE):
            sides.append([])
        sides[-1].append(number)
        end = number.end()
    return sides


def _quotient(number: re.Match[str]) -> Fraction | None:
    """What "16:2" is worth as a division; None for what cannot be one."""
    ratio = re.fullmatch(r"(\d{1,300}):(\d{1,300})", number.group())
    return Fraction(int(ratio[1]), int(ratio[2])) if ratio and int(ratio[2]) else None


def _amount(number: re.Match[str]) -> Amount:
    before, behind = number.string[: number.end()], number.string[number.end() : number.end() + 20]
    start = number.start("parts") if number["parts"] else number.start("digits")
    if re.match(r"\s?(?:cents?\b|¢|pence\b)", behind, re.IGNORECASE):
        money = CENTS
    elif re.search(r"[$€£][ -]?$", before[:start]) or re.match(r"\s?(?:dollars?|euros?|usd|eur)\b|[$€£]", behind, re.I):
        money = DOLLARS
    else:
        money = ""
    return Amount(value(number), money)


def _last(pattern: re.Pattern[str], text: str) -> re.Match[str] | None:
    return next(iter(deque(pattern.finditer(text), maxlen=1)), None)
