"""What every adapter config shares: the fields, and the checks that run when one is made."""

import dataclasses
import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from lora_lite.patterns import compile_pattern, is_plain
from lora_lite.peft_names import advice

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}
ROLES = ("reader", "writer", "inner")


class Default(tuple[str, ...]):
    """The value of a field of strings that nobody gave. It compares and prints as any other tuple, but names of layers
    that were given go before it."""

    __slots__ = ()


DEFAULT_ROLES = Default(("reader", "writer"))
DEFAULT_EXCLUDE = Default(("lm_head", "embed_tokens"))


def require(ok: bool, config: object, field: str, allowed: str) -> None:
    """Raise `ValueError` naming the config's field, its value and the allowed values, unless `ok`."""
    if not ok:
        raise ValueError(f"{type(config).__name__}.{field} = {getattr(config, field)!r}: must be {allowed}")


def is_int(value: object, low: int) -> bool:
    """An integer (no bool) of at least `low`."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= low


def is_number(value: object, low: float = -math.inf, high: float = math.inf) -> bool:
    """A finite real number in [low, high], no larger than a float can be."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return abs(value) <= sys.float_info.max and low <= value <= high


def _strings(config: object, field: str) -> None:
    """Normalise a tuple-of-strings field in place; a bare string is refused, for it would be read letter by letter."""
    value = getattr(config, field)
    ok = isinstance(value, Iterable) and not isinstance(value, str)
    strings = tuple(value) if ok else ()  # read once: an iterator gives its items only once
    require(ok and all(isinstance(v, str) for v in strings), config, field, "a tuple of strings, e.g. ('q_proj',)")
    object.__setattr__(config, field, value if isinstance(value, Default) else strings)


@dataclass(frozen=True)
class AdapterConfig:
    """Fields common to all methods. A config is frozen and checked when it is made.

    Args:
        r: rank, or number of directions. At least 1.
        alpha: numerator of the scaling alpha / r. Finite.
        dtype: dtype of the adapter's tensors, kept even when the model is cast.
        target_names: names of the layers to adapt: whole parts of the module path ("q_proj", "layers.1.mlp"), or
            regexes (anything with characters other than letters, digits, "_", "-" and "."; searched in the path). A
            layer must match one; what is named is adapted unless roles or exclusions that are given too leave it out.
            Empty: no filter.
        target_roles: which of "reader" (d_model -> other), "writer" (other -> d_model), "inner" to adapt.
            Empty: roles are not asked for. The default is not asked for either where names are given.
        exclude_names: names or regexes of modules to leave out. "lm_head" and "embed_tokens" also stand for whatever
            the model calls its output head and its input embedding; as the default they give way to names that spell
            these.
        layers: indices of the repeated blocks to adapt: places in the outermost list of blocks, such as `model.layers`.
            None: all.
        d_model: width of the residual stream; None: read from the config of the model or of each of its towers, or
            measured where a stage has another.
        seed: seeds the initial values, together with the path of the layer.

    Raises:
        ValueError: a field outside its allowed values, which the message lists.
    """

    r: int = 8
    alpha: float = 16.0
    dtype: torch.dtype = torch.float32
    target_names: tuple[str, ...] = ()
    target_roles: tuple[str, ...] = DEFAULT_ROLES
    exclude_names: tuple[str, ...] = DEFAULT_EXCLUDE
    layers: tuple[int, ...] | None = None
    d_model: int | None = None
    seed: int = 0

    # Fields that may be None, with a meaning that the method's docstring gives.
    optional: ClassVar[tuple[str, ...]] = ()
    # Fields that may be "auto", likewise.
    automatic: ClassVar[tuple[str, ...]] = ()
    # Fields that a method has no use for: hidden from the command line, and a value other than the default is refused.
    unused: ClassVar[tuple[str, ...]] = ()

    def __new__(cls, *_: Any, **given: Any) -> "AdapterConfig":
        """The object before its fields: where a field that was given does not exist, say what stands for it here."""
        names = [field.name for field in dataclasses.fields(cls)]
        for name in given:
            if name not in names:
                hint = advice(name, names) or f"the fields are {', '.join(names)}"
                raise TypeError(f"{cls.__name__} has no field {name!r}; {hint}")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for name, ok, allowed in (
            ("r", is_int(self.r, 1), "an integer >= 1"),
            ("alpha", is_number(self.alpha), "a finite number"),
        ):
            value = getattr(self, name)
            special = (name in self.optional and value is None) or (name in self.automatic and value == "auto")
            words = [", or None"] * (name in self.optional) + [", or 'auto'"] * (name in self.automatic)
            require(ok or special, self, name, allowed + "".join(words))
        require(self.dtype in DTYPES.values(), self, "dtype", f"one of {', '.join(map(str, DTYPES.values()))}")
        for field in ("target_names", "target_roles", "exclude_names"):
            _strings(self, field)
        for field in ("target_names", "exclude_names"):
            for pattern in getattr(self, field):
                try:
                    if not is_plain(pattern):
                        compile_pattern(pattern)
                except ValueError as error:
                    raise ValueError(f"{type(self).__name__}.{field}: {error}") from error
        require(set(self.target_roles) <= set(ROLES), self, "target_roles", f"a subset of {ROLES}")
        if self.layers is not None:
            layers = tuple(self.layers) if isinstance(self.layers, Iterable) else ()
            ok = len(layers) > 0 and all(is_int(index, 0) for index in layers)
            require(ok, self, "layers", "None or a non-empty tuple of integers >= 0")
            object.__setattr__(self, "layers", layers)
        require(self.d_model is None or is_int(self.d_model, 1), self, "d_model", "None or an integer >= 1")
        require(is_int(self.seed, 0), self, "seed", "an integer >= 0")
        for field in dataclasses.fields(self):
            if field.name in self.unused:
                ok = getattr(self, field.name) == field.default
                require(ok, self, field.name, f"left at {field.default!r}: this method has no such setting")

    def replace(self, **changes: Any) -> "AdapterConfig":
        """A copy with some fields changed, checked again."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; `from_dict` is its inverse."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {**values, "dtype": str(self.dtype).removeprefix("torch.")}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "AdapterConfig":
        """The config that `to_dict` wrote. Unknown fields and dtypes raise `ValueError`."""
        names = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - names):
            raise ValueError(f"{cls.__name__}: unknown fields {unknown}; the fields are {sorted(names)}")
        if (dtype := str(values.get("dtype", "float32"))) not in DTYPES:
            raise ValueError(f"{cls.__name__}.dtype = {dtype!r}: must be one of {sorted(DTYPES)}")
        as_tuples = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
        return cls(**{**as_tuples, "dtype": DTYPES[dtype]})
