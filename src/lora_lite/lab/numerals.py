"""Numbers as people read them: in tables, pages and pictures. Minus signs are minus signs, not hyphens."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95% interval."""

    mean: float
    low: float
    high: float

    def excludes(self, value: float) -> bool:
        """Whether `value` lies outside."""
        return not self.low <= value <= self.high


DASH = "—"  # stands for a missing value
COUNTS = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))
BYTES = ((1e9, " GB"), (1e6, " MB"), (1e3, " kB"))
SURE = 0.05  # p-values below it decide; a printed one stands on its own side of it


def _minus(text: str) -> str:
    return text.replace("-", "−")


def percent(share: float, digits: int = 1) -> str:
    """0.623 -> "62.3%"."""
    return _minus(f"{100 * share:.{digits}f}%")


def points(share: float) -> str:
    """A difference of shares in percentage points, with its sign: 0.023 -> "+2.3"."""
    return signed(100 * share, 1)


def signed(value: float, digits: int = 3) -> str:
    """With its sign; what rounds to nothing has none: -0.00001 -> "0.000"."""
    text = f"{value:+.{digits}f}"
    return _minus(text) if float(text) else text[1:]


def loss(value: float) -> str:
    """Nats a token: 0.43219 -> "0.432"."""
    return _minus(f"{value:.3f}")


def short(value: float, digits: int = 3) -> str:
    """In so many digits, for ticks and small print: 0.000012345 -> "1.23e−05"."""
    return _minus(f"{value:.{digits}g}")


def p_value(p: float) -> str:
    """A p-value, on its own side of 0.05: 0.0832 -> "p = 0.083", 0.04996 -> "p = 0.04996", 2e-10 -> "p < 0.001"."""
    if p < 0.001:
        return "p < 0.001"
    digits = 2 if p >= 0.1 else 3
    while (float(f"{p:.{digits}f}") < SURE) != (p < SURE):
        digits += 1
    return f"p = {p:.{digits}f}" if p < 1 else "p = 1"


def seen(share: float | None) -> str:
    """What a tie could not miss, in points: 0.3112 -> "sees 31.1"; None -> "sees none"."""
    return "sees none" if share is None else f"sees {100 * share:.1f}"


def ratio(value: float) -> str:
    """A time as a multiple of another: 1.2345 -> "1.23×"."""
    return _minus(f"{value:.2f}×")


def compact(value: float) -> str:
    """A count in three digits: 4884480 -> "4.88M"."""
    return _scaled(value, COUNTS)


def size(count: float) -> str:
    """Bytes: 19700000 -> "19.7 MB"."""
    return _scaled(count, BYTES, " B")


def tidy(text: str) -> str:
    """Without zeros that carry nothing, for the ticks of an axis: "5.00M" -> "5M", "0 B" -> "0"."""
    number = re.match(r"[−\d.]+", text)
    if number is None:
        return text
    short = number[0].rstrip("0").rstrip(".") if "." in number[0] else number[0]
    return "0" if short == "0" else short + text[number.end() :]


def _scaled(value: float, units: tuple[tuple[float, str], ...], plain: str = "") -> str:
    for unit, name in units:
        if abs(value) >= 0.9995 * unit:
            scaled = value / unit
            decimals = max(0, 2 - math.floor(math.log10(abs(scaled)) + 1e-9))
            return _minus(f"{scaled:.{min(decimals, 2)}f}{name}")
    return _minus(f"{value:.4g}{plain}")


def rate(value: float) -> str:
    """A learning rate: 5e-05 -> "5e−5", 0.002 -> "0.002"."""
    text = f"{value:.3g}"
    if "e" not in text:
        return text
    mantissa, exponent = text.split("e")
    return _minus(f"{mantissa}e{int(exponent)}")


def seconds(value: float) -> str:
    """A duration: 0.0344 -> "0.034 s", 143.2 -> "143 s"."""
    decimals = 0 if value >= 100 else 1 if value >= 10 else 2 if value >= 1 else 3
    return _minus(f"{value:.{decimals}f} s")


def span(interval: Interval, show: Callable[[float], str]) -> str:
    """An interval's ends: "59.1% to 65.0%"."""
    return f"{show(interval.low)} to {show(interval.high)}"
