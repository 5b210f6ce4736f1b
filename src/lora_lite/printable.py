"""Text from files, models and users, made fit to be shown: what would steer a terminal is shown as an escape."""

import re

# Control characters but for line feed and tab; marks that reorder what is shown (U+202A and the like), which hide what
# a name is; separators of lines and paragraphs; halves of surrogate pairs, which no encoding takes.
_STEERING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")


def printable(text: object) -> str:
    r"""Text as it may be printed: "\x1b[31m" is shown as backslash, x, 1, b, and so on. Line feeds and tabs stay."""
    return _STEERING.sub(lambda match: _escape(ord(match[0])), str(text))


def one_line(text: object) -> str:
    r"""`printable`, on one line: of names and the like. A line feed is shown as backslash, n."""
    return printable(text).replace("\n", r"\n").replace("\t", r"\t")


def _escape(code: int) -> str:
    return "\\r" if code == ord("\r") else f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
