"""The coefficient of one adapter, and what it may be set to."""

import threading
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


class Cell:
    """A place for what compiled code reads: c, and whether its `train_also` weights are to be the base's."""

    def __init__(self, value: Tensor, base: bool = False) -> None:
        self.value, self.base = value, base


class _Local(threading.local):
    """A cell for each thread: the shared one, until a block puts another there."""

    def __init__(self, cell: Cell) -> None:
        self.cell = cell


class Coefficient:
    """The coefficient c of one adapter, common to its layers: a plain tensor, 0-dim, or (B,) with one value a row.

    A Python float would make `torch.compile` compile again for each value, a registered buffer would be cast by
    `model.half()` and overwritten by DDP.
    """

    def __init__(self, name: str, state: Any) -> None:
        self.name, self.state = name, state
        self.shared = Cell(torch.ones((), dtype=torch.float64, device="cpu"))
        self.local = _Local(self.shared)

    @property
    def value(self) -> Tensor:
        """The coefficient in force here."""
        return self.state.coefficients.setting(self).c

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "local"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.local = _Local(self.shared)


@dataclass(frozen=True, eq=False)
class Setting:
    """What an adapter is set to: c, and whether its `train_also` weights are the base's."""

    c: Tensor
    base: bool = False


Settings = Mapping[Coefficient, Setting]
TRAINED = Setting(torch.ones((), dtype=torch.float64, device="cpu"))


@dataclass(eq=False)
class Lasting:
    """A `scale` that was made and not (yet) entered; lasting for sure once it is settled, withdrawn when entered."""

    owner: "weakref.ref[object]"
    settings: Settings
    thread: int
    settled: bool = False
    withdrawn: bool = False
