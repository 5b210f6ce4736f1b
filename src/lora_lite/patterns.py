"""Names of modules and parameters as users write them: whole dotted parts, or a regex where it looks like one."""

import difflib
import functools
import re
from collections.abc import Iterable

LONGEST = 2000  # characters of a regex: what is much longer takes Python seconds to compile
PLAIN = re.compile(r"[\w.-]+")


def is_plain(pattern: str) -> bool:
    """Whether `pattern` is a plain name: only letters, digits, "_", "-" and dots, so that it does not look like a
    regex."""
    return PLAIN.fullmatch(pattern) is not None and pattern.strip(".-") != ""


@functools.lru_cache(maxsize=4096)
def compile_pattern(pattern: str) -> re.Pattern[str]:
    r"""What to `search` a dotted path with.

    A plain name ("q_proj", "layers.1") is found where it makes up whole parts of the path, in sequence: "layers.1" in
    "model.layers.1.mlp", but neither in "model.layers.10.mlp" nor "v_proj" in "qkv_proj". Everything else is a regex,
    which is searched anywhere in the path (".*v_proj", r"layers\.1\.").

    Raises:
        ValueError: no valid regex, or one longer than 2000 characters.
    """
    if is_plain(pattern):
        return re.compile(rf"(?:\A|\.){re.escape(pattern.strip('.'))}(?:\.|\Z)")
    if len(pattern) > LONGEST:
        raise ValueError(
            f"{pattern[:40]!r}... has {len(pattern)} characters, more than the {LONGEST} of a regular expression; give "
            "several, or the names"
        )
    try:
        return re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:  # the latter two: counts and nesting beyond Python's
        shown = pattern if len(pattern) <= 80 else f"{pattern[:80]}..."
        raise ValueError(f"{shown!r} must be a valid regular expression ({error})") from error


def matches(pattern: str, path: str) -> bool:
    """Whether `pattern`, a plain name or a regex, names `path`."""
    return compile_pattern(pattern).search(path) is not None


def spells(pattern: str, path: str) -> bool:
    """Whether `pattern` names `path` itself rather than everything: a plain name that matches, or a regex that matches
    and holds the last part of the path as a word."""
    word = re.escape(path.rsplit(".", 1)[-1])
    return matches(pattern, path) and (is_plain(pattern) or re.search(rf"\b{word}\b", pattern) is not None)


def near_misses(pattern: str, paths: Iterable[str], most: int = 5) -> str:
    """A sentence that names what comes closest to `pattern` in `paths`, or what there is.

    For a plain name that lies within parts of paths it says which, and how to write the regex.
    """
    paths = list(paths)
    if is_plain(pattern) and (within := [path for path in paths if pattern in path]):
        parts = dict.fromkeys(_around(path, pattern) for path in within)
        return (
            f"it is no whole part of a path, but lies within {', '.join(list(parts)[:most])} ({len(within)} times): "
            f"give that name, or the regex {'.*' + re.escape(pattern)!r} to match within parts"
        )
    names = sorted({path.rsplit(".", 1)[-1] for path in paths} | set(paths))
    words = [word for word in re.findall(r"\w+", pattern[:LONGEST]) if word][:most] or [pattern[:80]]
    close = [name for word in words for name in difflib.get_close_matches(word, names, n=most, cutoff=0.6)]
    if close:
        return f"near misses: {', '.join(dict.fromkeys(close))}"
    last = sorted({path.rsplit(".", 1)[-1] for path in paths if not path.rsplit(".", 1)[-1].isdigit()}) or paths[:most]
    return f"the names here are {', '.join(last[:20])}"


def _around(path: str, name: str) -> str:
    """The parts of `path` that hold `name`, whole."""
    start = path.index(name)
    end = path.find(".", start + len(name))
    return path[path.rfind(".", 0, start) + 1 : end if end >= 0 else len(path)]
