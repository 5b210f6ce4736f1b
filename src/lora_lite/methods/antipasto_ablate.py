"""Learnt directional ablation within a frozen basis. Arditi et al. 2024 (for one given direction), arXiv:2406.11717.

    y' = y - c U Q diag(alpha) Q^T U^T (y - b)        Q: orthonormal columns of C (r, k); alpha (k) = init_alpha

C ~ N(0, 1/r), so that its columns have about norm 1, and steps of one size turn Q alike whatever r. alpha is held in
[0, 1]: for c in [0, 1] a contraction, which removes and never amplifies.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lora_lite.config import is_int, is_number, require
from lora_lite.facts import Facts
from lora_lite.frozen_basis.adapter import Coordinates, FrozenBasisAdapter, FrozenBasisConfig, projected
from lora_lite.numerics import cast, full_precision, scaled, wide
from lora_lite.registry import register


@dataclass(frozen=True)
class AntiPaSTOAblateConfig(FrozenBasisConfig):
    """k directions to remove, found by training. `basis="corda"` orients the space that they are sought in by the data.

    Args:
        k: number of directions; at most r.
        init_alpha: how much of each is removed at first. Not 0, for C would get no gradient.
    """

    k: int = 1
    init_alpha: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        require(is_int(self.k, 1), self, "k", "an integer >= 1")
        require(is_number(self.init_alpha, 0.0, 1.0) and self.init_alpha > 0, self, "init_alpha", "a number in (0, 1]")


@register(
    AntiPaSTOAblateConfig,
    Facts(
        "antipasto_ablate",
        title="Refusal in Language Models Is Mediated by a Single Direction",
        arxiv="2406.11717",
        lr=1e-2,
        lr_range=(2e-3, 5e-2),
    ),
)
class AntiPaSTOAblate(FrozenBasisAdapter):
    """Removes a part alpha of k learnt directions. c multiplies the change."""

    def __init__(self, cfg: AntiPaSTOAblateConfig, i: int, o: int) -> None:
        super().__init__(cfg, i, o)
        if cfg.k > self.r:
            raise ValueError(f"k = {cfg.k} is larger than the number of directions r = {self.r} of this layer")
        self.C = self.parameter(self.r, cfg.k)
        self.alpha = self.parameter(cfg.k, fill=cfg.init_alpha)

    @classmethod
    def tiny(cls) -> AntiPaSTOAblateConfig:
        return AntiPaSTOAblateConfig(r=8, k=2, init_alpha=0.3)

    def init_core(self, rng: torch.Generator) -> None:
        self.C.normal_(0.0, self.r**-0.5, generator=rng)

    @classmethod
    def identity_bound(cls, cfg: AntiPaSTOAblateConfig, dtype: torch.dtype = torch.float32) -> float:
        # A part init_alpha of W x along k directions, which h and the change round in the base's dtype.
        return cfg.init_alpha * (1 + 4 * torch.finfo(dtype).eps)

    def delta(self, h: Coordinates, c: Tensor) -> Coordinates:
        with full_precision(h.device):
            Q = torch.linalg.qr(wide(self.C)).Q
            removed = Q * projected(wide(self.alpha), 0.0, 1.0)
        return -scaled(h @ cast(Q, h), c) @ cast(removed, h).T
