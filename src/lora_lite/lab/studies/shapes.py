"""Whether plain data, as JSON and YAML give them, have the shape that a type says: a list may stand for a tuple."""

import math
import types
from collections.abc import Iterator, Mapping
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints, is_typeddict


def lacking(value: object, shape: type, path: str = "") -> Iterator[str]:
    """Dotted keys of a TypedDict that are required, and are missing from `value` or of another type there."""
    held = value if isinstance(value, dict) else {}
    required: frozenset[str] = shape.__required_keys__
    for key, hint in get_type_hints(shape).items():
        if key not in required:
            continue
        if is_typeddict(hint):
            yield from lacking(held.get(key), hint, f"{path}{key}.")
        elif key not in held or not fits(held[key], hint):
            yield f"{path}{key}"


def fits(value: object, hint: Any) -> bool:
    """Whether a value is of a type. Numbers are finite; of lists and mappings, only what a tuple holds is looked at."""
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return any(fits(value, each) for each in get_args(hint))
    if origin is Literal:
        return value in get_args(hint)
    if origin is tuple:
        return isinstance(value, list | tuple) and all(fits(each, get_args(hint)[0]) for each in value)
    if origin is not None or is_typeddict(hint):
        return isinstance(value, list if origin is list else Mapping)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return type(value) is hint or (hint is type(None) and value is None)
