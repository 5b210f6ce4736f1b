"""S-space: adapters that hang a small core on a frozen basis of their layer.

For any orthonormal U (o, r), U U^T W is a part of W, and the layer's own output tells its coordinates:
h = U^T (y - b). (If U holds left singular vectors, h = diag(S) V^T x.) A core turns h into the change of those
coordinates:

    y' = y + U delta(h)        delta(.) = 0 at first; W is never touched, be it quantised or not

So a method of the family is a core: its parameters, and `delta`.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from lora_lite.adapter import Adapter, Input, LowRank, Output, cast, wide
from lora_lite.config import AdapterConfig, require
from lora_lite.frozen_basis import Basis
from lora_lite.linear import bias, dense, shape

SIDES = ("auto", "input", "output")
DEFAULT_R = 256

Coordinates = Float[Tensor, "*b r"]


@dataclass(frozen=True)
class FrozenBasisConfig(AdapterConfig):
    """What the methods of the family share.

    Args:
        r: number of directions. The default of 256 is lowered to the layer's rank min(i, o) where that is smaller;
            another r larger than it is an error. None: all of them.
        basis: which directions: "svd", "wanda", "asvd", "corda", a kind that `ll.register_basis` added, any of these
            with settings ("corda:power=1.0"), or a `Basis`.
        side: where the coordinates are read: from the "output" as U^T (y - b), or from the "input" as (U^T W) x, the
            same numbers. "auto" takes the cheaper, and the input where b is larger than W (Frobenius norms), for then
            y - b would lose digits in 16 bits. The choice is stored.
    """

    r: int | None = DEFAULT_R  # type: ignore[assignment]
    basis: str | Basis = "svd"
    side: str = "auto"

    optional = ("r",)
    unused = ("alpha",)

    def __post_init__(self) -> None:
        object.__setattr__(self, "basis", Basis.parse(self.basis))
        super().__post_init__()
        require(self.side in SIDES, self, "side", f"one of {SIDES}")

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "basis": str(self.basis)}

    def rank(self, i: int, o: int) -> int:
        """Number of directions of a layer. Raises `ValueError` if r is larger than min(i, o)."""
        if self.r is not None and self.r > min(i, o) and self.r != DEFAULT_R:
            raise ValueError(f"r = {self.r} is larger than the rank min(i, o) = {min(i, o)} of this layer")
        return min(i, o, self.r or i)


class FrozenBasisAdapter(Adapter):
    """A frozen basis U (o, r), S (r,) and, in subclasses, a core.

    U and S are stored; what reads the coordinates is derived from them and the layer.
    """

    U: Tensor
    S: Tensor
    P: Tensor | None
    Ub: Tensor | None
    rebuildable = ("U",)

    def __init__(self, cfg: FrozenBasisConfig, i: int, o: int) -> None:
        super().__init__(cfg)
        self.r = cfg.rank(i, o)
        self.frozen("U", o, self.r)
        self.frozen("S", self.r)
        self.derived("P")
        self.derived("Ub")

    @classmethod
    def tiny(cls) -> AdapterConfig:
        return cls.Config(r=8)

    @classmethod
    def needs(cls, cfg: Any) -> frozenset[str]:
        return cfg.basis.needs

    def init(self, layer: nn.Module, stats: Any, rng: torch.Generator) -> None:
        U, S = self.cfg.basis.of(layer, stats, self.r)
        self.U.copy_(U)
        self.S.copy_(S)
        self.cfg = self.cfg.replace(side=self._side(layer))
        self.init_core(rng)

    def init_core(self, rng: torch.Generator) -> None:
        """Fill the core's parameters; zeros need nothing."""

    def _side(self, layer: nn.Module) -> str:
        if self.cfg.side != "auto":
            return self.cfg.side
        (i, o), b = shape(layer), bias(layer)
        large = b is not None and bool(b.float().norm() > dense(layer).float().norm())
        return "input" if o > i or large else "output"

    def derive(self, layer: nn.Module) -> None:
        """P (r, i) = U^T W for the input side; U^T b (r,) for the output side."""
        b = bias(layer)
        if self.cfg.side == "input":
            self.derived("P", self.U.T @ dense(layer, self.U.dtype).to(self.U.device))
        elif b is not None:
            self.derived("Ub", self.U.T @ b.to(self.U))

    def change(self, x: Input, y: Output, layer: nn.Module, c: Tensor) -> LowRank:
        U = cast(self.U, y)
        if self.P is not None:
            h = x @ cast(self.P, x).T
        else:
            h = F.linear(y, U.T, None if self.Ub is None else -cast(self.Ub, y))
        return self.delta(h, c), U

    def delta(self, h: Coordinates, c: Tensor) -> Coordinates:
        """The change of the coordinates h (*b, r) at coefficient c, 0-dim or broadcasting over h."""
        raise NotImplementedError

    @property
    def inverse_S(self) -> Float[Tensor, " r"]:
        """1/S, and 0 where S = 0: p = h / S are the coordinates with the scale taken off."""
        return torch.where(self.S > 0, 1 / self.S, 0.0)


def times(h: Coordinates, factor: Tensor) -> Coordinates:
    """h * factor, multiplied in fp32 and rounded once to h's dtype."""
    return (wide(h) * wide(factor, h)).to(h.dtype)


class _Projection(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, low: float, high: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.bounds = low, high
        return x.clamp(low, high)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor, None, None]:
        (x,), (low, high), (grad,) = ctx.saved_tensors, ctx.bounds, grad_outputs
        outward = ((x > high) & (grad < 0)) | ((x < low) & (grad > 0))
        return torch.where(outward, 0.0, grad), None, None


def projected(x: Tensor, low: float, high: float) -> Tensor:
    """x clamped to [low, high]; out of it the gradient passes where a descent step leads back, so none gets stuck."""
    return _Projection.apply(x, low, high)
