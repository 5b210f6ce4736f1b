"""Numbers in texts of people and models: one grammar, and exact values.

numbers(plain("from -$1,234.50 to 1 1/2"))        # matches of "-$1,234.50" and "1 1/2"
value(...)                                        # Decimal("-1234.50"), Fraction(3, 2)

A number is a sign, a currency, digits with separators, decimals, and an exponent, a power of ten, a fraction, or, after
a whole number, a proper one: "-$1,234.50", "1.5e-3", "2 x 10^5", "3/4", "1 1/2"; a word of scale belongs to it: "2
million", "1.5k". A time, a ratio, a date or a version is one token as well: "3:45 pm", "2024-03-15", "1.2.3".
"""

import re
import unicodedata
from collections.abc import Iterator
from decimal import Decimal
from fractions import Fraction

# Decimals and fractions compare exactly; what has several parts, or is too large to be written out, part by part.
Number = Decimal | Fraction | tuple[Decimal | str, ...]

DIGITS = 1000  # of a fraction or power that is computed

_SCALES = {
    "hundred": 2, "thousand": 3, "k": 3, "lakh": 5, "million": 6, "m": 6, "mn": 6, "crore": 7, "billion": 9, "b": 9,
    "bn": 9, "trillion": 12,
}  # fmt: skip

_PLAIN = r"(?:\d{1,3}(?:[,_'’]\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<!\w)\.\d+"
# A minus is a sign unless it stands behind something to subtract from or to join: "= -3" and "-$3" are negative, "5-3"
# and "COVID-19" are not. Commas count between groups of three digits only: "1,234" is one number, "1,2,3" are three.
NUMBER = re.compile(
    rf"""
    (?:(?<![\w)\]%])(?P<sign>-)[$€£¥₹]?)?
    (?:
        (?P<parts>
            \d+ (?: :\d+)+ (?:\.\d+)?            # a time or a ratio
          | (?:\d{{4}}-\d\d?-\d\d?|\d\d?-\d\d?-\d{{4}})(?!\d)    # a date
          | \d+ (?:/\d+){{2,}}                   # a date
          | \d+ (?:\.\d+){{2,}}                  # a version
        )
        (?:[ ]?(?P<half>[ap])\.?m\b)?
      | (?P<digits>{_PLAIN}) (?:e(?P<exponent>[-+]?\d+)(?!\w))?
        (?:
            [ ]?[*x][ ]?10\^(?P<ten>[-+]?\d+)
          | \^(?P<power>[-+]?\d+)
          | [ ]?/[ ]?(?P<over>{_PLAIN})
          | [ ]{{1,2}}(?P<top>\d+)/(?P<bottom>\d+)
        )?
        (?P<scale>
            (?:[ -]?(?:hundred|thousand|lakh|million|crore|billion|trillion)s?\b)+
          | (?-i:[kKMB]|[mM]n|[bB]n)(?!\w)      # "5 m" and "5m" are metres
        )?
    )
    """,
    re.ASCII | re.IGNORECASE | re.VERBOSE,
)

INVISIBLE = re.compile("[\u00ad\u200b-\u200f\u2060\ufeff]")  # soft hyphen, zero-width characters, marks of direction
_DASHES = dict.fromkeys(map(ord, "‐‑‒–−﹣－"), "-")
_SIGNS = {ord(sign): plain for sign, plain in zip("×·⋅∙⁄∕÷＋．，：／＝％＄", "****///+.,:/=%$", strict=True)}
_HIGH = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺", "0123456789-+")
_LATEX = (
    (r" ?\\[dt]?frac\s*(?:\{\s*(-?)([\d.,]+)\s*\}|()(\d))\s*(?:\{\s*([\d.,]+)\s*\}|(\d))", r" \1\3\2\4/\5\6"),
    (r"(?<=[-−$({=+*]) (?=-?[\d.,]+/)", ""),  # a sign before a fraction is the number's
    (r"\{,\}|\\!,|,\\!", ","),
    (r"(?<=\d)(?:\\[,:; ]|~)(?=\d{3}(?!\d))", ","),
    (r"\\(?:[,:;! ]|quad\b|qquad\b|left\b|right\b)|~", " "),
    (r"\\(?:times|cdot|ast)\b", "*"),
    (r"\\div\b", "/"),
    (r"\\(?:text|textbf|mathrm|mathbf|mbox)\s*\{([^{}]*)\}", r"\1"),
    (r"\\([$%#&_()\[\]{}])", r"\1"),
)


def plain(text: str) -> str:
    """The text with its numbers in ASCII: digits of any script, dashes as minus, LaTeX, vulgar fractions, powers.

    Invisible characters are left out; a space that does not break a line separates thousands, and is a blank elsewhere.
    """
    if not text.isascii():
        text = INVISIBLE.sub("", text).translate(_DASHES).translate(_SIGNS)
        text = re.sub(r"(?<=\d)[\u00a0\u2007\u2009\u202f](?=\d{3}(?!\d))", ",", text)
        text = re.sub(r"[^\S\n]", " ", text)
        text = re.sub(r"(?<=[\w)])[⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺]+", lambda high: "^" + high[0].translate(_HIGH), text)
        text = re.sub(r"(?<=\d) ?([¼-¾⅐-⅞])", lambda part: " " + _written_out(part[1]), text)
        text = re.sub(r"[¼-¾⅐-⅞]", lambda part: _written_out(part[0]), text)
        text = re.sub(r"(?![0-9])\d", lambda digit: str(unicodedata.decimal(digit[0])), text)
    if "\\" in text or "{,}" in text:
        for pattern, ascii_text in _LATEX:
            text = re.sub(pattern, ascii_text, text)
    text = re.sub(r"(?<=\d)\*\*(?=[-+]?\d)", "^", text)
    text = re.sub(r"\^\{\s*([-+]?\d+)\s*\}", r"^\1", text)
    return re.sub(r"(?<=[^\W\d_])\^[-+]?\d+", "", text)  # of "m^2": part of a unit


def _written_out(part: str) -> str:
    return unicodedata.normalize("NFKC", part).replace("⁄", "/")


def numbers(text: str) -> Iterator[re.Match[str]]:
    """The numbers of a plain text, in order."""
    return NUMBER.finditer(text)


def value(number: re.Match[str]) -> Number:
    """What a number is worth, exactly; parts of a time, date or version in their order."""
    found = _parts(number) if number["parts"] else _magnitude(number)
    if not number["sign"]:
        return found
    if isinstance(found, tuple):
        return ("-", *found)
    return found.copy_negate() if isinstance(found, Decimal) else -found  # -Decimal rounds to the context's digits


def _parts(number: re.Match[str]) -> Number:
    joint = re.sub(r"\d", "", number["parts"])[0]
    first, *others = map(Decimal, number["parts"].split(joint))
    if half := number["half"]:
        first = first % 12 + (12 if half in "pP" else 0)
    return first, *others


def _magnitude(number: re.Match[str]) -> Number:
    as_text = (number.group().lower(),)
    exponent, ten = number["exponent"] or "0", number["ten"] or "0"
    if max(len(exponent), len(ten)) > 17:  # beyond what a Decimal holds
        return as_text
    scale = sum(_SCALES[word.removesuffix("s")] for word in re.findall(r"[a-z]+", (number["scale"] or "").lower()))
    shift = int(exponent) + int(ten)
    if not (number["over"] or number["top"] or number["power"]):
        return Decimal(f"{_bare(number['digits'])}e{shift + scale}")
    whole = Decimal(f"{_bare(number['digits'])}e{shift}")
    if len(number.group()) > DIGITS or abs(whole.adjusted()) > DIGITS:
        return as_text
    found = _fraction(number, whole)
    return as_text if found is None else found * 10**scale


def _fraction(number: re.Match[str], whole: Decimal) -> Fraction | None:
    """What a fraction, a mixed number or a power is worth; None where it is none, or too large to be written out."""
    if over := number["over"]:
        below = Fraction(_bare(over))
        return Fraction(whole) / below if below else None
    if top := number["top"]:
        proper = int(top) < int(number["bottom"])
        return Fraction(whole) + Fraction(int(top), int(number["bottom"])) if proper else None
    power = int(number["power"])
    small = len(number["digits"]) * abs(power) <= DIGITS and (whole or power >= 0)
    return Fraction(whole) ** power if small else None


def _bare(digits: str) -> str:
    return re.sub(r"[,_'’]", "", digits)
