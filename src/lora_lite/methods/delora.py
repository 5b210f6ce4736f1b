"""DeLoRA. Bini, Girrbach and Akata 2025, arXiv:2503.18225, eqs. 8, 9 and 15.

    y' = y + c (lam N(B) N(A) - lam0 N(B0) N(A0)) x / r        N(B): columns of B over their norms
                                                               N(A): rows of A over their norms, times w
    A (r, i), B (o, r) kaiming, A0 = A, B0 = B frozen; lam (1) = lambda0; w (i) = norms of W's columns

The angle of the update is learnt apart from its strength lam, which bounds it. W stays untouched: the initial update is
subtracted here, as (b - b0) a + b0 (a - a0), with the normalised factors a and b; it is exactly 0 at first.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_lite.adapter import Adapter, Input, LowRank, Output, kaiming_uniform_
from lora_lite.config import AdapterConfig, is_number, require
from lora_lite.facts import Facts
from lora_lite.layers.linear import dense
from lora_lite.numerics import read, scaled
from lora_lite.registry import register

SMALLEST_NORM = 1e-4  # keeps the normalised factors defined at 0


@dataclass(frozen=True)
class DeLoRAConfig(AdapterConfig):
    """DeLoRA.

    Args:
        lambda0: where lam starts. Above 0. The paper uses 4 to 12.
    """

    lambda0: float = 15.0
    unused = ("alpha",)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(is_number(self.lambda0) and self.lambda0 > 0, self, "lambda0", "a finite number > 0")


@register(
    DeLoRAConfig,
    Facts(
        "delora",
        title="Decoupling Angles and Strength in Low-rank Adaptation",
        arxiv="2503.18225",
        lr=1e-3,
        lr_range=(2e-4, 1e-2),
    ),
)
class DeLoRA(Adapter):
    """Normalised low-rank directions and one trained strength. c multiplies the change."""

    A0: Tensor
    B0: Tensor
    w: Tensor

    def __init__(self, cfg: DeLoRAConfig, i: int, o: int) -> None:
        super().__init__(cfg)
        self.A = self.parameter(cfg.r, i)
        self.B = self.parameter(o, cfg.r)
        self.lam = self.parameter(1, fill=cfg.lambda0)
        self.frozen("A0", cfg.r, i)
        self.frozen("B0", o, cfg.r)
        self.frozen("w", i)

    def init(self, layer: nn.Module, stats: Any, rng: torch.Generator) -> None:
        self.A0.copy_(kaiming_uniform_(self.A, rng))
        self.B0.copy_(kaiming_uniform_(self.B, rng))
        self.w.copy_(dense(layer, torch.float64).norm(dim=0))

    def change(self, x: Input, y: Output, layer: nn.Module, c: Tensor) -> LowRank:
        a, a0 = (A * self.w / A.norm(dim=1, keepdim=True).clamp(min=SMALLEST_NORM) for A in (self.A, self.A0))
        b, b0 = (
            B * (lam / self.cfg.r / B.norm(dim=0).clamp(min=SMALLEST_NORM))
            for B, lam in ((self.B, self.lam), (self.B0, torch.full_like(self.lam, self.cfg.lambda0)))
        )
        return scaled(read(x, torch.cat([a, a - a0])), c), torch.cat([b - b0, b0], dim=1)
