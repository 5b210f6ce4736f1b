"""AntiPaSTO: a frozen basis rotated, its scale changed by addition. Clark 2026, arXiv:2601.07473, eqs. 4, 7, 8.

    y' = y + U delta(h)        h = U^T (y - b), p = h / S; with R = R(c):
    V:     delta = S (R - I) p + c d (R p)
    U:     delta = (R^T - I) (1 + c d/S) h + c (d/S) h
    both:  z = h + V's delta; delta = (R_u^T - I) z + (z - h)
    none:  delta = c (d/S) h
    R = (I - X)^-1 (I + X) block by block, X = L/2 tanh(c (T - T^T) / (2 L)), L = 2 tan(max_rotation_angle / 2)

d (r) ~ N(0, init_std^2), by default 0; T: strictly upper triangular, from rot_T (r/bs, bs (bs - 1)/2) = 0, row by row.
V rotates what each direction reads, U what it writes. R(-c) = R(c)^T. A plane turns by at most max_rotation_angle at bs
= 2; larger blocks bound each entry of X alike and can turn further. The r coordinates are rotated, not the basis.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_lite.config import is_int, is_number, require
from lora_lite.facts import Facts
from lora_lite.frozen_basis.adapter import Blocks, Coordinates, FrozenBasisAdapter, FrozenBasisConfig, blockwise
from lora_lite.numerics import double, full_precision
from lora_lite.registry import register

ROTATE = ("V", "U", "both", "none")


@dataclass(frozen=True)
class AntiPaSTORotConfig(FrozenBasisConfig):
    """Rotations of small blocks of neighbouring directions.

    Args:
        block_size: directions that rotate together; r must be divisible by it (None and "auto" are lowered to fit).
        max_rotation_angle: bound of the rotation, in radians; in (0, pi).
        rotate_basis: "V" (what directions read), "U" (what they write), "both", or "none" (only d is trained).
        init_std: standard deviation of d at first (the author's code: 4e-4); 0 starts exactly at the base.
    """

    block_size: int = 4
    max_rotation_angle: float = 0.5
    rotate_basis: str = "V"
    init_std: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(is_int(self.block_size, 2), self, "block_size", "an integer >= 2")
        angle = self.max_rotation_angle
        require(is_number(angle, 0.0) and 0 < angle < math.pi, self, "max_rotation_angle", "radians in (0, pi)")
        require(self.rotate_basis in ROTATE, self, "rotate_basis", f"one of {ROTATE}")
        require(is_number(self.init_std, 0.0), self, "init_std", "a number >= 0")

    def rank(self, i: int, o: int) -> int:
        r = super().rank(i, o)
        if self.r in (None, "auto"):
            r -= r % self.block_size
        if r == 0 or r % self.block_size:
            raise ValueError(f"r = {r} (of min(i, o) = {min(i, o)}) is not divisible by block_size = {self.block_size}")
        return r


@register(
    AntiPaSTORotConfig,
    Facts(
        "antipasto_rot",
        title="AntiPaSTO: Self-Supervised Honesty Steering via Anti-Parallel Representations",
        arxiv="2601.07473",
        lr=5e-3,
        lr_range=(1e-3, 2e-2),
        linear_in_c=False,
        decay=("rot_T", "rot_T_u", "d"),
    ),
)
class AntiPaSTORot(FrozenBasisAdapter):
    """Rotated directions and an additive change of their scales. c multiplies T, within the tanh, and d."""

    divides_by_S = True

    @classmethod
    def tiny(cls) -> AntiPaSTORotConfig:
        return AntiPaSTORotConfig(r=8, rotate_basis="both")

    def __init__(self, cfg: AntiPaSTORotConfig, i: int, o: int) -> None:
        super().__init__(cfg, i, o)
        bs, sides = cfg.block_size, {"V": ["rot_T"], "U": ["rot_T"], "both": ["rot_T", "rot_T_u"], "none": []}
        for name in sides[cfg.rotate_basis]:
            self.register_parameter(name, self.parameter(self.r // bs, bs * (bs - 1) // 2))
        self.d = self.parameter(self.r)

    @classmethod
    def identity_bound(cls, cfg: AntiPaSTORotConfig, dtype: torch.dtype = torch.float32) -> float:
        return math.inf if cfg.init_std else 0.0  # d is added to S, whose size only W determines

    def init_core(self, rng: torch.Generator) -> None:
        self.d.normal_(0.0, self.cfg.init_std, generator=rng)

    def delta(self, h: Coordinates, c: Tensor) -> Coordinates:
        with full_precision(h.device):
            return blockwise(self._blocks(c.to(h.device)[..., None, None]), h)

    def _blocks(self, c: Tensor) -> Blocks:
        """The blocks on the diagonal of D in delta(h) = D h."""
        bs, kind = self.cfg.block_size, self.cfg.rotate_basis
        S, d, inverse_S = (double(t).reshape(-1, bs, 1) for t in (self.S, self.d, self.inverse_S))
        eye = torch.eye(bs, dtype=S.dtype, device=S.device)
        D = c * d * inverse_S * eye
        if kind in ("V", "both"):
            turn = self.turn(self.rot_T, c)  # type: ignore[arg-type]
            D = (S * turn + c * d * (eye + turn)) * inverse_S.mT
        if kind in ("U", "both"):
            turn = self.turn(self.rot_T if kind == "U" else self.rot_T_u, -c)  # type: ignore[arg-type]
            D = turn @ (eye + D) + D
        return D

    def turn(self, rot_T: Tensor, c: Tensor) -> Blocks:
        """R(c) - I, block by block; R(-c) = R(c)^T. Exactly 0 at rot_T = 0."""
        bs, L = self.cfg.block_size, 2 * math.tan(self.cfg.max_rotation_angle / 2)
        T = double(rot_T).new_zeros(rot_T.shape[0], bs, bs)
        T[(slice(None), *torch.triu_indices(bs, bs, 1, device=rot_T.device))] = double(rot_T)
        X = L / 2 * torch.tanh(c * (T - T.mT) / (2 * L))
        return 2 * torch.linalg.solve(torch.eye(bs, dtype=X.dtype, device=X.device) - X, X)
