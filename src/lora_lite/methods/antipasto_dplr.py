"""A bounded gain plus a low-rank mixing of the directions. After Clark 2026, arXiv:2601.07473.

    y' = y + U [diag(elu(c g)) h + c B A p]        h = U^T (y - b), p = h / S; g (r) = 0, A (k, r) kaiming, B (r, k) = 0

A diagonal core scales directions; B A moves what one direction reads to another. It reads p, so that S does not amplify
it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lora_lite.adapter import kaiming_uniform_
from lora_lite.config import is_int, require
from lora_lite.facts import Facts
from lora_lite.frozen_basis.adapter import Coordinates
from lora_lite.methods.antipasto import AntiPaSTO, AntiPaSTOConfig
from lora_lite.numerics import cast, scaled
from lora_lite.registry import register


@dataclass(frozen=True)
class AntiPaSTODPLRConfig(AntiPaSTOConfig):
    """Diagonal plus low rank.

    Args:
        lora_rank: k, the rank of the mixing; at most r.
    """

    lora_rank: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        require(is_int(self.lora_rank, 1), self, "lora_rank", "an integer >= 1")


@register(
    AntiPaSTODPLRConfig,
    Facts(
        "antipasto_dplr",
        title="AntiPaSTO: Self-Supervised Honesty Steering via Anti-Parallel Representations",
        arxiv="2601.07473",
        lr=5e-3,
        lr_range=(1e-3, 2e-2),
        linear_in_c=False,
        decay=("g", "A", "B"),
        lora_plus=("B",),
    ),
)
class AntiPaSTODPLR(AntiPaSTO):
    """A diagonal and a low-rank core. c multiplies g, within the elu, and B A."""

    divides_by_S = True

    @classmethod
    def tiny(cls) -> AntiPaSTODPLRConfig:
        return AntiPaSTODPLRConfig(r=8, lora_rank=2)

    def __init__(self, cfg: AntiPaSTODPLRConfig, i: int, o: int) -> None:
        super().__init__(cfg, i, o)
        k = cfg.lora_rank
        if k > self.r:
            raise ValueError(f"lora_rank = {k} is larger than the number of directions r = {self.r} of this layer")
        self.A = self.parameter(k, self.r)
        self.B = self.parameter(self.r, k)

    def init_core(self, rng: torch.Generator) -> None:
        kaiming_uniform_(self.A, rng)

    def delta(self, h: Coordinates, c: Tensor) -> Coordinates:
        low = h @ cast(self.A * self.inverse_S, h).T @ cast(self.B, h).T
        return super().delta(h, c) + scaled(low, c)
