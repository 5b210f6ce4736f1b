from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_lite.lab import scoring
from lora_lite.lab.scoring import ScoringError, final_number

NUMBERS = {
    # plain
    "18": "18",
    "so she makes 18": "18",
    "3 apples and 4 pears": "4",
    "0": "0",
    "007": "7",
    # commas
    "1,234": "1234",
    "#### 1,234,567": "1234567",
    "1,234.50": "1234.5",
    "the values are 1,2,3": "3",
    "12,5": "5",
    "1,2345": "2345",
    "in all 1,234, and no more": "1234",
    # signs
    "-3": "-3",
    "x = -3": "-3",
    "−3": "-3",
    "5-3": "3",
    "(5)-3": "3",
    "COVID-19": "19",
    "from 10-12": "12",
    "it fell by - 4": "4",
    "-$3": "-3",
    "$-3": "-3",
    "#### -1,000": "-1000",
    # decimals and full stops
    "0.5": "0.5",
    ".5": "0.5",
    "-.5": "-0.5",
    "No.5": "5",
    "3.": "3",
    "18.00.": "18",
    "It is 3.\nDone.": "3",
    # currency, units, percent
    "$18": "18",
    "$1,234.50.": "1234.5",
    "€5": "5",
    "18 dollars": "18",
    "18km": "18",
    "5 m/s": "5",
    "50%": "50",
    "#### 50%": "50",
    "**42**": "42",
    r"$\boxed{42}$": "42",
    # the marks
    "1 + 2 = 3\n#### 7": "7",
    "#### 7 of 9": "7",
    "####7": "7",
    "#### 1\n#### 2": "2",
    "#### 1 then #### 2 then 3": "2",
    "The answer is 5 since 2 + 3 is that": "5",
    "the ANSWER is: $5.50": "5.5",
    "The\nanswer is 6": "6",
    "The answer is 1. No: the answer is 2. Sure of 100%": "2",
    "The answer is: 8\n#### 9": "9",
    "#### 9\nThe answer is: 8": "9",
    "The answer is not clear. It may be 4": "4",
}
NO_NUMBERS = [
    "",
    "none",
    "eighteen",
    "-",
    "$",
    ".",
    "####",
    "3 apples\n#### none",
    "2 + 2: the answer is four",
    "1 ####",
]


@pytest.mark.parametrize("text", NUMBERS)
def test_final_number(text: str) -> None:
    assert final_number(text) == Decimal(NUMBERS[text])


@pytest.mark.parametrize("text", NO_NUMBERS)
def test_no_final_number(text: str) -> None:
    assert final_number(text) is None


@given(st.decimals(allow_nan=False, allow_infinity=False, places=3, min_value=-(10**9), max_value=10**9))
def test_a_number_is_read_however_it_is_written(number: Decimal) -> None:
    for text in (f"{number:f}", f"{number:,.3f}", f"The answer is {number:,f}.", f"7 then 8\n#### {number:f} 9"):
        assert final_number(text) == number


@given(st.text(alphabet="1,.-$# aT\n"))
def test_any_text_has_a_final_number_or_none(text: str) -> None:
    found = final_number(text)
    assert found is None or found.is_finite()


@pytest.mark.parametrize(
    ("reference", "answer", "score"),
    [
        ("18", "so she makes $18.00 a day", 1.0),
        ("#### 1,000", "1000", 1.0),
        ("9 * 2 = 18\n#### 18", "The answer is: 18", 1.0),
        ("1,234.50", "1234.5", 1.0),
        ("0.1", "0.10", 1.0),
        ("100000000000000000001", "100000000000000000000", 0.0),  # one float, two decimals
        ("3", "3.0000001", 0.0),
        ("18", "18 or 19", 0.0),
        ("18", "-18", 0.0),
        ("18", "", 0.0),
        ("18", "I do not know", 0.0),  # whatever numbers the prompt has: only the reply is read
        ("many", "18", 0.0),
        ("many", "many", 0.0),
    ],
)
def test_numeric(reference: str, answer: str, score: float) -> None:
    assert scoring.numeric(reference, answer) == score


@pytest.mark.parametrize(
    ("answer", "score"), [("kai and\nriver", 1.0), (" Kai and River ", 1.0), ("kai and river.", 0.0), ("", 0.0)]
)
def test_exact_ignores_case_and_blanks_only(answer: str, score: float) -> None:
    assert scoring.exact("Kai  and River", answer) == score


@pytest.mark.parametrize(
    ("pattern", "reference", "answer", "score"),
    [
        (r"colou?r: (\w+)", "color: red", "The colour: red", 1.0),
        (r"colou?r: (\w+)", "color: red", "The colour: blue", 0.0),
        (r"colou?r: (\w+)", "color: red", "red", 0.0),
        (r"colou?r: (\w+)", "red", "red", 0.0),
        (r"<a>(.*?)</a>", "<a>5</a>", "<a> 4 </a> no, <a> 5 </a>", 1.0),
        (r"<a>(.*?)</a>", "<a>5</a>", "<a>5</a> no, <a>4</a>", 0.0),
        (r"(?:is|are) (\d+)", "is 3", "they are 3", 1.0),
        (r"^(\w)\)", "b) because", "B) because", 0.0),
    ],
)
def test_regex(pattern: str, reference: str, answer: str, score: float) -> None:
    assert scoring.scorer("regex", pattern)(reference, answer) == score


@pytest.mark.parametrize(
    ("kind", "pattern", "message"),
    [
        ("fuzzy", "", "no scorer 'fuzzy'; there are exact, numeric and regex"),
        ("regex", "", "needs pattern="),
        ("regex", "(", "not a regular expression"),
        ("regex", r"\d+", "has 0 groups"),
        ("regex", r"(a)(b)", "has 2 groups"),
        ("numeric", r"(a)", "belongs to score=regex"),
    ],
)
def test_scorers_that_cannot_be(kind: str, pattern: str, message: str) -> None:
    with pytest.raises(ScoringError, match=message):
        scoring.scorer(kind, pattern)


def test_plain_scorers_by_name() -> None:
    assert scoring.scorer("exact")("18", "18.0") == 0.0
    assert scoring.scorer("numeric")("18", "18.0") == 1.0


@pytest.mark.parametrize(
    ("reference", "answer", "found"),
    [
        ("aunt", "She is his Aunt.", True),
        ("aunt", "She haunts him", False),
        ("-3", "it is -3", True),
        ("3", "it is 13", False),
        ("a (b)", "an A (b)!", True),
        ("5", "15, 5.2, -5, 2.5 or 5,000", False),
        ("5", "1, 5, 7", True),
        ("1.10", "it is 1.1", False),
        ("5 km", "it is 1.5 km", False),
        ("$5", "it costs $5.25", False),
        ("City 5", "City 5.", True),
        (" ", "anything", False),
    ],
)
def test_mentions(reference: str, answer: str, found: bool) -> None:
    assert scoring.mentions(reference, answer) is found


SOLUTION = "She has 16 - 3 = 13 eggs.\n#### 1,013.50"


@pytest.mark.parametrize(
    ("kind", "pattern", "reference", "reply", "found"),
    [
        ("numeric", "", SOLUTION, "I would say $1013.5 a day, or 7", True),
        ("numeric", "", SOLUTION, "13 eggs, 16", False),
        ("numeric", "", "#### 5", "15 or 5.2 or 5,000 or -5", False),
        ("numeric", "", "#### 5", "first 5.0 then 9", True),
        ("numeric", "", "#### -5", "it is -$5 now. 3", True),
        ("numeric", "", "no number", "no number", False),
        ("exact", "", SOLUTION, "I would say $1013.5", False),
        ("exact", "", "the aunt", "It is The Aunt.", True),
        ("regex", r"colou?r: (\w+)", "color: red", "It is red, I think", True),
        ("regex", r"colou?r: (\w+)", "color: red", "It is a tired colour: blue", False),
        ("regex", r"colou?r: (\w+)", "red", "red", False),
        ("regex", r"is (\d+)", "is 5", "15, 5.2", False),
    ],
)
def test_finders_look_for_the_answer_whatever_the_format(
    kind: str, pattern: str, reference: str, reply: str, found: bool
) -> None:
    assert scoring.finder(kind, pattern)(reference, reply) is found


@given(reference=st.text(alphabet="1,.-$# a\n"), reply=st.text(alphabet="1,.-$# a\n"))
def test_a_reply_with_the_right_number_has_it_anywhere(reference: str, reply: str) -> None:
    assert scoring.finder("numeric")(reference, reply) or not scoring.numeric(reference, reply)


def test_a_finder_that_cannot_be_is_an_error() -> None:
    with pytest.raises(ScoringError, match="no scorer 'fuzzy'"):
        scoring.finder("fuzzy")
    with pytest.raises(ScoringError, match="has 0 groups"):
        scoring.finder("regex", "a")
