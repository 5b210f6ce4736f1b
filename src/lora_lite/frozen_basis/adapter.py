"""S-space: adapters with a small core on a frozen basis of their layer.

For any orthonormal U (o, r), U U^T W is a part of W, and the layer's own output gives its coordinates:
h = U^T (y - b). (If U holds left singular vectors, h = diag(S) V^T x.) A core turns h into the change of those
coordinates:

    y' = y + U delta(h)        delta(.) = 0 at first; W is never touched, be it quantised or not

So a method of the family is a core: its parameters, and `delta`.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lora_lite.adapter import Adapter, Input, LowRank, Output
from lora_lite.config import AdapterConfig, require
from lora_lite.frozen_basis.basis import Basis
from lora_lite.layers.linear import bias, dense, shape
from lora_lite.numerics import read, wide

SIDES = ("auto", "input", "output")
DEFAULT_R = 256
SPAN = 8.0  # 2^-8, the rounding of bf16, of the largest direction is 3% of one that is 8 times weaker

Coordinates = Float[Tensor, "*b r"]
Blocks = Float[Tensor, "*c n bs bs"]


@dataclass(frozen=True)
class FrozenBasisConfig(AdapterConfig):
    """What the methods of the family share.

    Args:
        r: number of directions; one larger than the layer's rank min(i, o) is an error. "auto": 256, or the rank
            where that is smaller. None: all of them.
        basis: which directions: "svd", "wanda", "asvd", "corda", a kind that `ll.register_basis` added, any of these
            with settings ("corda:power=1.0"), or a `Basis`.
        side: where the coordinates are read: from the "output" as U^T (y - b), or from the "input" as (U^T W) x, the
            same numbers. "auto" takes the cheaper, and the input where the output would lose digits in 16 bits: where b
            is larger than W (Frobenius norms), or where the core divides by S and S spans more than a factor of 8. The
            choice is stored.
    """

    r: int | Literal["auto"] | None = "auto"  # type: ignore[assignment]
    basis: str | Basis = "svd"
    side: str = "auto"

    optional = ("r",)
    automatic = ("r",)
    unused = ("alpha",)

    def __post_init__(self) -> None:
        object.__setattr__(self, "basis", Basis.parse(self.basis))
        super().__post_init__()
        require(self.side in SIDES, self, "side", f"one of {SIDES}")

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "basis": str(self.basis)}

    def rank(self, i: int, o: int) -> int:
        """Number of directions of a layer. Raises `ValueError` if r is larger than min(i, o)."""
        full = min(i, o)
        if self.r is None:
            return full
        if self.r == "auto":
            return min(full, DEFAULT_R)
        if self.r > full:
            raise ValueError(f"r = {self.r} is larger than the rank min(i, o) = {full} of this layer")
        return self.r


class FrozenBasisAdapter(Adapter):
    """A frozen basis U (o, r), S (r,) and, in subclasses, a core.

    U and S are stored; what reads the coordinates is derived from them and the layer.
    """

    U: Tensor
    S: Tensor
    P: Tensor | None
    Ub: Tensor | None
    rebuildable = ("U",)
    divides_by_S: ClassVar[bool] = False
    """Whether the core reads h / S, which raises the rounding of y along weak directions above what they carry."""

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
        S = self.S[self.S > 0]
        spread = self.divides_by_S and len(S) > 0 and bool(S.max() > SPAN * S.min())
        return "input" if o > i or large or spread else "output"

    def derive(self, layer: nn.Module) -> None:
        """P (r, i) = U^T W for the input side; U^T b (r,) for the output side."""
        b = bias(layer)
        if self.cfg.side == "input":
            self.derived("P", self.U.T @ dense(layer, self.U.dtype).to(self.U.device))
        elif b is not None:
            self.derived("Ub", self.U.T @ b.to(self.U))

    def change(self, x: Input, y: Output, layer: nn.Module, c: Tensor) -> LowRank:
        offset = None if self.Ub is None else -self.Ub
        h = read(x, self.P) if self.P is not None else read(y, self.U.T, offset)
        return self.delta(h, c), self.U

    def delta(self, h: Coordinates, c: Tensor) -> Coordinates:
        """The change of the coordinates h (*b, r) at coefficient c, 0-dim or broadcasting over h."""
        raise NotImplementedError

    @property
    def inverse_S(self) -> Float[Tensor, " r"]:
        """1/S, and 0 where S = 0: p = h / S are the coordinates with the scale taken off."""
        S = wide(self.S)  # 1/S of a weak direction is beyond fp16
        return torch.where(S > 0, 1 / S, 0.0)


def blockwise(D: Blocks, h: Coordinates) -> Coordinates:
    """D h for a block-diagonal D, given by its blocks; those of one c, or of one c a row.

    Column by column, in products of entries: a matrix product would round the two forms of c differently.
    """
    columns = wide(h).unflatten(-1, (-1, D.shape[-1]))
    D = D.to(columns.dtype)
    product = D[..., 0] * columns[..., :1]
    for k in range(1, D.shape[-1]):
        product = product + D[..., k] * columns[..., k : k + 1]
    return product.flatten(-2).to(h.dtype)


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
