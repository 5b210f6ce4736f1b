"""AntiPaSTO: a frozen basis rotated, its scale changed by addition. Clark 2026, arXiv:2601.07473, eqs. 4, 7, 8.

    y' = y + U delta(h)        h = U^T (y - b), p = h / S; with R = R(c):
    V:     delta = S (R - I) p + c d (R p)
    U:     delta = (R^T - I) (1 + c d/S) h + c (d/S) h
    both:  z = h + V's delta; delta = (R_u^T - I) z + (z - h)
    none:  delta = c (d/S) h
    R = (I - X)^-1 (I + X) block by block, X = L/2 tanh(c (T - T^T) / (2 L)), L = 2 tan(max_rotation_angle / 2)

d (r) = 0; T: strictly upper triangular, from rot_T (r/bs, bs (bs - 1)/2) = 0, row by row. V rotates what each direction
reads, U what it writes. R(-c) = R(c)^T. A plane turns by at most max_rotation_angle at bs = 2; larger blocks bound each
entry of X alike and can turn further. The r coordinates are rotated, not the basis.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from lora_lite.adapter import cast, double, full_precision, register
from lora_lite.config import is_int, is_number, require
from lora_lite.sspace import DEFAULT_R, Coordinates, FrozenBasisAdapter, FrozenBasisConfig

ROTATE = ("V", "U", "both", "none")
Blocks = Float[Tensor, "*c n bs bs"]


@dataclass(frozen=True)
class AntiPaSTORotConfig(FrozenBasisConfig):
    """Rotations of small blocks of neighbouring directions.

    Args:
        block_size: directions that rotate together; r must be divisible by it (the default r is lowered to fit).
        max_rotation_angle: bound of the rotation, in radians; in (0, pi).
        rotate_basis: "V" (what directions read), "U" (what they write), "both", or "none" (only d is trained).
    """

    block_size: int = 4
    max_rotation_angle: float = 0.5
    rotate_basis: str = "V"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(is_int(self.block_size, 2), self, "block_size", "an integer >= 2")
        angle = self.max_rotation_angle
        require(is_number(angle, 0.0) and 0 < angle < math.pi, self, "max_rotation_angle", "radians in (0, pi)")
        require(self.rotate_basis in ROTATE, self, "rotate_basis", f"one of {ROTATE}")

    def rank(self, i: int, o: int) -> int:
        r = super().rank(i, o)
        if self.r in (None, DEFAULT_R):
            r -= r % self.block_size
        if r == 0 or r % self.block_size:
            raise ValueError(f"r = {r} (of min(i, o) = {min(i, o)}) is not divisible by block_size = {self.block_size}")
        return r


@register(
    "antipasto_rot",
    AntiPaSTORotConfig,
    title="AntiPaSTO: Self-Supervised Honesty Steering via Anti-Parallel Representations",
    arxiv="2601.07473",
    lr=5e-3,
    lr_range=(1e-3, 2e-2),
    linear_in_c=False,
    decay=("rot_T", "rot_T_u", "d"),
)
class AntiPaSTORot(FrozenBasisAdapter):
    """Rotated directions and an additive change of their scales. c multiplies T, within the tanh, and d."""

    @classmethod
    def tiny(cls) -> AntiPaSTORotConfig:
        return AntiPaSTORotConfig(r=8, rotate_basis="both")

    def __init__(self, cfg: AntiPaSTORotConfig, i: int, o: int) -> None:
        super().__init__(cfg, i, o)
        bs, sides = cfg.block_size, {"V": ["rot_T"], "U": ["rot_T"], "both": ["rot_T", "rot_T_u"], "none": []}
        for name in sides[cfg.rotate_basis]:
            self.register_parameter(name, self.parameter(self.r // bs, bs * (bs - 1) // 2))
        self.d = self.parameter(self.r)

    def delta(self, h: Coordinates, c: Tensor) -> Coordinates:
        with full_precision(h.device):
            D = self._core(c.to(h.device))
        lead = c.shape[:1] if c.ndim else ()
        return (h.reshape(*lead, -1, self.r) @ cast(D, h).mT).reshape(h.shape)

    def _core(self, c: Tensor) -> Float[Tensor, "*c r r"]:
        """The matrix D of delta(h) = D h, made of the blocks on its diagonal."""
        bs, kind = self.cfg.block_size, self.cfg.rotate_basis
        c = c.reshape(*c.shape[:1], 1, 1, 1) if c.ndim else c
        S, d, inverse_S = (double(t).reshape(-1, bs, 1) for t in (self.S, self.d, self.inverse_S))
        eye = torch.eye(bs, dtype=S.dtype, device=S.device)
        D = c * d * inverse_S * eye
        if kind in ("V", "both"):
            turn = self.turn(self.rot_T, c)  # type: ignore[arg-type]
            D = (S * turn + c * d * (eye + turn)) * inverse_S.mT
        if kind in ("U", "both"):
            turn = self.turn(self.rot_T if kind == "U" else self.rot_T_u, -c)  # type: ignore[arg-type]
            D = turn @ (eye + D) + D
        n = D.shape[-3]
        apart = torch.eye(n, dtype=D.dtype, device=D.device)[:, None, :, None]  # block k in rows and columns k
        return (D.unsqueeze(-2) * apart).reshape(*D.shape[:-3], self.r, self.r)

    def turn(self, rot_T: Tensor, c: Tensor) -> Blocks:
        """R(c) - I, block by block; R(-c) = R(c)^T. Exactly 0 at rot_T = 0."""
        bs, L = self.cfg.block_size, 2 * math.tan(self.cfg.max_rotation_angle / 2)
        row, column = torch.triu_indices(bs, bs, 1, device=rot_T.device)
        entries = double(rot_T)
        T = entries.new_zeros(rot_T.shape[0], bs, bs)
        T[:, row, column] = entries
        X = L / 2 * torch.tanh(c * (T - T.mT) / (2 * L))
        eye = torch.eye(bs, dtype=X.dtype, device=X.device)
        return 2 * torch.linalg.solve(eye - X, X)
