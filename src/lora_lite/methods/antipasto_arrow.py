"""A small dense block on the leading directions, a bounded gain on the rest. After Clark 2026, arXiv:2601.07473.

    y' = y + U [c M h_top ; diag(elu(c g)) h_tail]        h = U^T (y - b), top: its first b entries

M (b, b) = 0 and g (r - b) = 0 at first. M[i, j] moves what direction j carries to direction i, with just that weight.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lora_lite.config import is_int, require
from lora_lite.facts import Facts
from lora_lite.frozen_basis.adapter import Coordinates
from lora_lite.methods.antipasto import AntiPaSTO, AntiPaSTOConfig
from lora_lite.numerics import cast, scaled
from lora_lite.registry import register


@dataclass(frozen=True)
class AntiPaSTOArrowConfig(AntiPaSTOConfig):
    """A dense block and a diagonal.

    Args:
        block: b, the number of leading directions that mix; less than r.
    """

    block: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        require(is_int(self.block, 1), self, "block", "an integer >= 1")


@register(
    AntiPaSTOArrowConfig,
    Facts(
        "antipasto_arrow",
        title="AntiPaSTO: Self-Supervised Honesty Steering via Anti-Parallel Representations",
        arxiv="2601.07473",
        lr=1e-2,
        lr_range=(2e-3, 5e-2),
        linear_in_c=False,
        decay=("g", "M"),
    ),
)
class AntiPaSTOArrow(AntiPaSTO):
    """A mixing block on top, bounded gains on the rest. c multiplies M, and g within the elu."""

    @classmethod
    def tiny(cls) -> AntiPaSTOArrowConfig:
        return AntiPaSTOArrowConfig(r=8, block=3)

    def __init__(self, cfg: AntiPaSTOArrowConfig, i: int, o: int) -> None:
        super().__init__(cfg, i, o)
        self.M = self.parameter(cfg.block, cfg.block)

    def gains(self) -> int:
        if self.cfg.block >= self.r:
            raise ValueError(
                f"block = {self.cfg.block} must be smaller than the number of directions r = {self.r} here"
            )
        return self.r - self.cfg.block

    def delta(self, h: Coordinates, c: Tensor) -> Coordinates:
        top, tail = h[..., : self.cfg.block], h[..., self.cfg.block :]
        return torch.cat([scaled(top @ cast(self.M, h).T, c), super().delta(tail, c)], dim=-1)
