"""What calibration can measure: running sums over tokens, and the statistics made of them.

A sum is taken of what a layer reads (x) or of what it makes of it (y - b = W x). Memory does not grow with the data.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lora_lite.layers.linear import dense, shape
from lora_lite.linalg import leading_eigenvectors, singular_directions


@dataclass(frozen=True)
class Sum:
    """A running sum.

    Attributes:
        side: "input" (of x, shared by layers that read the same tensor) or "output" (of y - b).
        add: (n, features) and what `prepare` made -> the term to add.
        rows: what the n rows are: all "tokens"; or one row a prompt, its "last" token or the "mean" of its tokens.
        label: take batches of one side of a `Contrast` only: True the positive, False the negative. None: all.
        prepare: made of the layer before the pass.
    """

    side: str
    add: Callable[[Tensor, Any], Tensor]
    rows: str = "tokens"
    label: bool | None = None
    prepare: Callable[[nn.Module], Any] | None = None


@dataclass
class Sums:
    """Running sums of one tensor, in fp64, with the number of rows that each has seen."""

    values: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    eigen: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)

    def add(self, name: str, rows: Tensor, prepared: Any) -> None:
        """Add `rows` (n, features) to the sum `name`."""
        if not len(rows):
            return
        # fp64 where the device has it: sums of millions of terms.
        value = SUMS[name].add(rows, prepared).to(torch.float32 if rows.device.type == "mps" else torch.float64)
        self.values[name] = self.values[name].add_(value) if name in self.values else value
        self.counts[name] = self.counts.get(name, 0) + len(rows)


@dataclass
class Statistics:
    """What calibration measured of one layer.

    Attributes:
        input: sums of what it reads, shared by all layers that read the same.
        output: sums of y - b.
    """

    input: Sums
    output: Sums

    def _sums(self, part: str) -> Sums:
        return self.input if SUMS[part].side == "input" else self.output

    @property
    def tokens(self) -> int:
        """Number of tokens (or prompts) seen, padding left out."""
        return max([*self.input.counts.values(), *self.output.counts.values()], default=0)

    def has(self, part: str) -> bool:
        """Whether the sum `part` was taken."""
        return part in self._sums(part).values

    def part(self, name: str) -> Tensor:
        """The sum `name` over the number of its rows."""
        sums = self._sums(name)
        return sums.values[name] / sums.counts[name]

    def mean(self, name: str) -> Tensor:
        """The statistic `name` of `STATISTICS`."""
        return STATISTICS[name].of(self)

    def eigen(self, name: str) -> tuple[Tensor, Tensor]:
        """Eigenvectors (columns) and eigenvalues of a statistic, falling; computed once for all its readers."""
        known = self._sums(STATISTICS[name].parts(1, 1)[0]).eigen
        if name not in known:
            known[name] = leading_eigenvectors(self.mean(name))
        return known[name]


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _moment(x: Tensor, _: Any) -> Tensor:
    x = _wide(x)
    return x.T @ x


def _square(x: Tensor, _: Any) -> Tensor:
    return _wide(x).square().sum(0)


def _sum(x: Tensor, _: Any) -> Tensor:
    return x.sum(0, dtype=torch.float32 if x.device.type == "mps" else torch.float64)


def _coordinate_abs(y: Tensor, U: Tensor) -> Tensor:
    return (_wide(y) @ U.to(_wide(y).dtype)).abs().sum(0)


def _all_directions(layer: nn.Module) -> Tensor:
    W = dense(layer)
    return singular_directions(W, min(shape(layer)))[0].to(W.device)


SUMS: dict[str, Sum] = {
    "input_moment": Sum("input", _moment),
    "input_sum": Sum("input", _sum),
    "input_square": Sum("input", _square),
    "output_moment": Sum("output", _moment),
    "coordinate_abs": Sum("output", _coordinate_abs, prepare=_all_directions),
    **{
        f"{side}_{rows}": Sum("output", _sum, rows, label)
        for side, label in (("positive", True), ("negative", False))
        for rows in ("last", "mean")
    },
}


@dataclass(frozen=True)
class Statistic:
    """A statistic: the sums that a layer of shape (i, o) takes for it, and what is made of them."""

    parts: Callable[[int, int], tuple[str, ...]]
    of: Callable[[Statistics], Tensor]


def _plain(*parts: str) -> Callable[[int, int], tuple[str, ...]]:
    return lambda i, o: parts


def _covariance(stats: Statistics) -> Tensor:
    mean = stats.part("input_sum")
    return stats.part("input_moment") - torch.outer(mean, mean)


def _response(stats: Statistics) -> Tensor:
    return stats.part("output_moment" if stats.has("output_moment") else "input_moment")


def _contrast(rows: str) -> Statistic:
    parts = (f"positive_{rows}", f"negative_{rows}")
    return Statistic(_plain(*parts), lambda stats: stats.part(parts[0]) - stats.part(parts[1]))


# What a method or a basis may ask for, by name.
STATISTICS: dict[str, Statistic] = {
    # E[x x^T] (i, i), uncentred; and E[x x^T] - E[x] E[x]^T.
    "input_moment": Statistic(_plain("input_moment"), lambda stats: stats.part("input_moment")),
    "input_covariance": Statistic(_plain("input_moment", "input_sum"), _covariance),
    # E[x_j^2] (i,).
    "input_square": Statistic(_plain("input_square"), lambda stats: stats.part("input_square")),
    # E[(y - b)(y - b)^T] = W E[x x^T] W^T (o, o).
    "output_moment": Statistic(_plain("output_moment"), lambda stats: stats.part("output_moment")),
    # The smaller of output_moment and input_moment: both give W E[x x^T] W^T.
    "response": Statistic(lambda i, o: ("output_moment",) if o <= i else ("input_moment",), _response),
    # E|u_j^T (y - b)| (min(i, o),), for the left singular vectors u_j of W.
    "coordinate_abs": Statistic(_plain("coordinate_abs"), lambda stats: stats.part("coordinate_abs")),
    # The mean of y over the positive prompts less that over the negative ones (o,), at one row a prompt.
    "contrast_last": _contrast("last"),
    "contrast_mean": _contrast("mean"),
}


def generator(seed: int, path: str) -> torch.Generator:
    """A CPU generator seeded by (seed, path), so that initial values depend on nothing else."""
    digest = hashlib.sha256(f"{seed}:{path}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
