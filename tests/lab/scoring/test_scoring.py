import unicodedata
from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_lite.lab.scoring import scoring
from lora_lite.lab.scoring.final_numbers import final_number
from lora_lite.lab.scoring.scoring import ScoringError

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
    # headings of Markdown are no marks
    "#### Step 1\n3 + 4\nThe answer is 7.": "7",
    "#### Step 2\nSo there are 8 eggs": "8",
    "#### Step 1\n3 + 4\n#### 7": "7",
    "#### 1. Understand the question\n#### 2. **Solve** it\nThe answer is 7.": "7",
    "#### 1) Read it\n3 + 4 is 7": "7",
    "#### 18. So she makes that.": "18",
    "#### **Answer:** $7$\nfor 2": "7",
    "#### Total = 7 of 9": "7",
    "#### about 7 of 9": "7",
    "##### 7": "7",
    # calculations
    "The answer is 3 * 6 = 18.": "18",
    "the answer is 3 eggs * $6 = $18 a day for 5 days": "18",
    "The answer is 3*6=<<3*6=18>>18": "18",
    r"The answer is $3 \times 6 = 18$.": "18",
    "The answer is 3 times 6 equals 18": "18",
    "The answer is 18 = 3 * 6": "18",
    "The answer is 3 * 6 = 9 * 2 = 18": "18",
    "The answer is 16 -3 = 13": "13",
    "The answer is (3 + 4) * -2 = -14": "-14",
    "The answer is 7 days = 1 week": "7",
    "The answer is 5 (2 + 3 = 5 in all)": "5",
    "#### 3 + 4 = 7": "7",
    # exponents and powers
    "1.5e3": "1500",
    "1E+3 m": "1000",
    "1e-05": "0.00001",
    "5eggs": "5",
    "1.5 × 10³": "1500",
    r"-1.5 \times 10^{-3}": "-0.0015",
    "2^10": "1024",
    "2**3": "8",
    "it has 5 m²": "5",
    "it has 5 m^2": "5",
    # separators, invisible characters and digits of other scripts
    "1{,}234": "1234",
    r"1\,234 km": "1234",
    "1\u00a0234": "1234",
    "1\u202f234\u202f567": "1234567",
    "1\u00a0kg or 20\u00a0kg": "20",
    "1_234": "1234",
    "1'234": "1234",
    "1\u200b8": "18",
    "\ufeff18\u200d": "18",
    "１８": "18",
    "١٨": "18",
    # dashes
    "–5": "-5",
    "it is ‑$5": "-5",
    "#### –1,000": "-1000",
    "grades 4–7": "7",
    "grades 4 – 7": "7",
    "-100000000000000000000000000000001": "-100000000000000000000000000000001",
    # LaTeX
    r"-\$1{,}234.50": "-1234.5",
    r"50\%": "50",
    r"So \boxed{7} for 3 people": "7",
    r"#### $\boxed{42}$ of 50": "42",
    r"\boxed{\text{18 eggs}}": "18",
}
FRACTIONS = {
    "1/2": Fraction(1, 2),
    "#### 1/3": Fraction(1, 3),
    "-1/2": Fraction(-1, 2),
    "= −$3/4.": Fraction(-3, 4),
    "1 / 2 cup": Fraction(1, 2),
    "1.5/4": Fraction(3, 8),
    "2/4%": Fraction(1, 2),
    "1 1/2": Fraction(3, 2),
    "-1 1/2 cups": Fraction(-3, 2),
    "½": Fraction(1, 2),
    "1½": Fraction(3, 2),
    "1 ½": Fraction(3, 2),
    "1⁄3": Fraction(1, 3),
    r"\frac{1}{2}": Fraction(1, 2),
    r"$-\dfrac{1}{2}$": Fraction(-1, 2),
    r"\tfrac{-3}{4}": Fraction(-3, 4),
    r"\frac12": Fraction(1, 2),
    r"1\frac{1}{2}": Fraction(3, 2),
    r"The answer is: $\boxed{\frac{5}{6}}$.": Fraction(5, 6),
    "The answer is 1/4 + 1/2 = 3/4": Fraction(3, 4),
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


@pytest.mark.parametrize("text", FRACTIONS)
def test_fractions_are_exact(text: str) -> None:
    assert final_number(text) == FRACTIONS[text]


@given(st.decimals(allow_nan=False, allow_infinity=False, places=3, min_value=-(10**9), max_value=10**9))
def test_a_number_is_read_however_it_is_written(number: Decimal) -> None:
    for text in (f"{number:f}", f"{number:,.3f}", f"The answer is {number:,f}.", f"7 then 8\n#### {number:f} 9"):
        assert final_number(text) == number


@given(st.text(alphabet="1,.-$# aT\n/:^e=*\\{}½²–\u00a0"))
def test_any_text_has_a_final_number_that_is_itself_or_none(text: str) -> None:
    found = final_number(text)
    assert found is None or found == final_number(text)


@pytest.mark.parametrize(
    "text", ["1e999999999999999999999", "9^999999999", "2^-99999", "1e99999/3", "0^-1", "1/0", "9" * 9000 + "/7"]
)
def test_a_number_too_large_to_write_out_is_equal_to_itself_only(text: str) -> None:
    assert scoring.numeric(text, text) == 1.0
    assert scoring.numeric(text, "8" + text) == scoring.numeric("8" + text, text) == scoring.numeric("1", text) == 0.0


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
        ("1/2", "3/2", 0.0),
        ("#### 1/2", "#### 1/3", 0.0),
        ("1.5e3", "9.9e3", 0.0),
        ("1e-05", "5", 0.0),
        ("3:45", "2:45", 0.0),
        ("1/2", "so 0.5 of it", 1.0),
        ("1/3", "0.3333333333333333", 0.0),
        ("3/4", "6/8", 1.0),
        ("-1/2", "1/2", 0.0),
        ("1 1/2", "2 1/2", 0.0),
        ("1 1/2", "1.5 cups", 1.0),
        ("½", "¼", 0.0),
        (r"\frac{1}{2}", r"\frac{3}{2}", 0.0),
        ("1.5e3", "1,500", 1.0),
        ("1.5 × 10³", "1.5 × 10⁴", 0.0),
        ("2^3", "5^3", 0.0),
        ("3:45", "It is 03:45.", 1.0),
        ("3:45 pm", "3:45 a.m.", 0.0),
        ("3:45 pm", "15:45", 1.0),
        ("12:30 am", "0:30", 1.0),
        ("1:02:30", "2:02:30", 0.0),
        ("3:45", "3.75", 0.0),
        ("-3:45", "3:45", 0.0),
        ("2024-03-15", "2023-03-15", 0.0),
        ("2024-03-15", "2024/3/15", 1.0),
        ("3/15/2024", "4/15/2024", 0.0),
        ("1.2.3", "9.2.3", 0.0),
        ("-100000000000000000000000000000001", "-100000000000000000000000000000000", 0.0),
        ("7", "#### Step 1\nAdd 3 and 4.\nThe answer is 7.", 1.0),
        ("1", "#### Step 1\nAdd 3 and 4.\nThe answer is 7.", 0.0),
    ],
)
def test_numeric(reference: str, answer: str, score: float) -> None:
    assert scoring.numeric(reference, answer) == score


@pytest.mark.parametrize(
    ("answer", "score"), [("kai and\nriver", 1.0), (" Kai and River ", 1.0), ("kai and river.", 0.0), ("", 0.0)]
)
def test_exact_ignores_case_and_blanks_only(answer: str, score: float) -> None:
    assert scoring.exact("Kai  and River", answer) == score


@pytest.mark.parametrize("text", ["café", "Ångström", "Ὀδυσσεύς", "한글", "é̱"])
def test_exact_takes_accents_in_either_form(text: str) -> None:
    composed, decomposed = unicodedata.normalize("NFC", text), unicodedata.normalize("NFD", text)
    assert composed != decomposed
    assert scoring.exact(composed, decomposed) == scoring.exact(decomposed, composed.upper()) == 1.0
    assert scoring.mentions(composed, f"It is {decomposed}.")


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("New\u00a0York", 1.0),
        ("\ufeffnew\u200b york", 1.0),
        ("New\u2009\u2009York", 1.0),
        ("NewYork", 0.0),
        ("Néw York", 0.0),
    ],
)
def test_exact_ignores_what_is_not_seen(answer: str, score: float) -> None:
    assert scoring.exact("New York", answer) == score


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
        (r"\\boxed{(.*?)}", r"\boxed{5}", r"It is \boxed{5}.", 1.0),
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
        ("regex", "(a{99999999999})", "not a regular expression"),
        ("regex", "(" * 3000 + "a" + ")" * 3000, "nested too deeply"),
        ("regex", "(?:(?:(?:(a){1000}){1000}){1000}){1000}", "too large: .* atoms"),
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
        ("5", "5/6, 1/5, 5e3, 5:30 or 5^2", False),
        ("1/2", "either ½ or so", True),
        ("5 km", "1/5 km", False),
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


SLOW = r"(?:a|aa)+(b)$"  # 1.6^n steps in a row of n letters "a"


def test_a_search_that_takes_too_long_ends() -> None:
    compare = scoring.scorer("regex", SLOW)
    assert compare("aab", "aaab") == 1.0
    with pytest.raises(scoring.SlowScoring, match="takes more than 1 s in a text of 60 characters"):
        compare("aab", "a" * 60)


def test_a_pattern_with_nested_repeats_ends() -> None:
    compare = scoring.scorer("regex", r"((?:a+)+)$")
    assert compare("a" * 40, "a" * 40) == 1.0
    assert compare("aa", "a" * 40 + "!") == 0.0


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
