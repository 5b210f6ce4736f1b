"""Arms of a comparison: methods with settings, written on one line.

    lora,dora[r=4],antipasto_arrow[block=8,32],ia3+ia3_ff

A setting with several values sweeps: it gives an arm for each. "+" attaches methods side by side (with disjoint
targets). "all" stands for every method that is trained.
"""

import ast
import dataclasses
import itertools
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import lora_lite as ll
from lora_lite.config import AdapterConfig
from lora_lite.registry import method_of

ALL = "all"
MOST_ARMS = 1000  # each is trained several times
LONGEST_LINE = 20_000  # letters
OUTSIDE_BRACKETS = r"(?![^\[(]*[\])])"


class ArmError(ll.LoraLiteError, ValueError):
    """A line of arms cannot be read, or names a method or setting that is not there."""


@dataclass(frozen=True)
class Arm:
    """A method with its settings. name: as written, without what is default. configs: one, or several side by side."""

    name: str
    configs: tuple[AdapterConfig, ...]

    @property
    def method(self) -> str:
        """The registry name, or several joined by "+"."""
        return "+".join(method_of(cfg).facts.name for cfg in self.configs)

    @property
    def lr(self) -> float:
        """The registered default learning rate of its (first) method."""
        return method_of(self.configs[0]).facts.lr

    def with_seed(self, seed: int) -> list[AdapterConfig]:
        """Its configs, with the seed of the initial values."""
        return [cfg.replace(seed=seed) for cfg in self.configs]


def parse_arms(lines: str | Iterable[str], common: Mapping[str, Any] | None = None) -> list[Arm]:
    """The arms that a line, or several, stand for.

    common: fields of every config (targets, layers). A method with target names of its own (IA3) keeps them: where it
    acts is part of what it is.
    Raises ArmError for what cannot be read: an unknown method or setting, a refused value, an arm that comes twice; and
    for more than 1,000 arms.
    """
    text = lines if isinstance(lines, str) else ",".join(lines)
    if len(text) > LONGEST_LINE:
        raise ArmError(f"the line of arms has {len(text):,} letters, more than {LONGEST_LINE:,}: {text[:60]!r}...")
    arms: dict[str, Arm] = {}
    for word in filter(None, (part.strip() for part in re.split(rf",{OUTSIDE_BRACKETS}", text))):
        for arm in [arm for each in (trained() if word == ALL else [word]) for arm in _expand(each, common or {})]:
            if arm.name in arms:
                raise ArmError(f"the arm {arm.name!r} comes twice in {text!r}")
            arms[arm.name] = arm
        require_few(len(arms), text)
    if not arms:
        raise ArmError(f"no method in {text!r}: give some, such as lora,dora, or {ALL}")
    return list(arms.values())


def trained() -> list[str]:
    """The names of the methods that are trained."""
    return [name for name, cls in ll.methods().items() if cls.facts.trained]


def require_few(count: int, text: str) -> None:
    """Raise `ArmError` for more arms than anybody can train."""
    if count > MOST_ARMS:
        raise ArmError(f"{text[:200]!r} stands for {count:,} arms, more than {MOST_ARMS:,}: give fewer values")


def _expand(word: str, common: Mapping[str, Any]) -> list[Arm]:
    """The arms of one word: the product of its sweeps, and of its parts joined by "+"."""
    parts = [_part(part.strip(), common) for part in re.split(rf"\+{OUTSIDE_BRACKETS}", word)]
    require_few(math.prod(map(len, parts)), word)
    return [
        Arm("+".join(name for name, _ in choice), tuple(cfg for _, cfg in choice))
        for choice in itertools.product(*parts)
    ]


def _part(text: str, common: Mapping[str, Any]) -> list[tuple[str, AdapterConfig]]:
    matched = re.fullmatch(r"(\w+)(?:\[(.*)\])?", text, flags=re.DOTALL)
    if matched is None:
        raise ArmError(f"{text!r} is not a method, or a method with settings such as lora[r=4,8]")
    name, settings = matched[1], _settings(matched[2] or "", text)
    cls = ll.methods().get(name)
    if cls is None or not cls.facts.trained:
        why = "is not trained, so there is nothing to compare" if cls else "is no method"
        raise ArmError(f"{name!r} {why}; the methods are {', '.join(trained())}")
    known = {field.name for field in dataclasses.fields(cls.Config)} - {*cls.Config.unused, "seed", "dtype"}
    if unknown := sorted(settings.keys() - known):
        raise ArmError(f"{text!r}: {name} has no setting {', '.join(unknown)}; it has {', '.join(sorted(known))}")
    own_targets = bool(cls.Config().target_names)
    shared = {k: v for k, v in common.items() if not (own_targets and k in ("target_names", "target_roles"))}
    require_few(math.prod(map(len, settings.values())), text)
    arms = []
    for values in itertools.product(*settings.values()):
        chosen = dict(zip(settings, values, strict=True))
        label = ",".join(f"{key}={value}" for key, value in chosen.items())
        try:
            cfg = cls.Config(**{**shared, **chosen})
        except (ValueError, TypeError) as error:
            raise ArmError(f"{text!r}: {error}") from error
        arms.append((f"{name}[{label}]" if label else name, cfg))
    return arms


def _settings(text: str, whole: str) -> dict[str, list[Any]]:
    """ "block=8,32,r=64" -> {"block": [8, 32], "r": [64]}: a part without a name is one more value of the last one."""
    settings: dict[str, list[Any]] = {}
    for part in filter(None, (part.strip() for part in re.split(rf",{OUTSIDE_BRACKETS}", text))):
        key, equals, value = part.partition("=")
        if equals and key.strip().isidentifier():
            if key.strip() in settings:
                raise ArmError(f"{whole!r}: {key.strip()} comes twice; write its values as {key.strip()}=a,b")
            settings[key.strip()] = [_value(value)]
        elif settings:
            settings[list(settings)[-1]].append(_value(part))
        else:
            raise ArmError(f"{whole!r}: {part!r} is not setting=value")
    return settings


def _value(text: str) -> Any:
    """A Python literal, else the text itself."""
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError):
        return text.strip()
    except (RecursionError, MemoryError) as error:
        raise ArmError(f"the value {text[:60]!r}... is nested too deeply") from error
