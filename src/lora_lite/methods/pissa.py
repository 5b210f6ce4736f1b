"""PiSSA. Meng, Wang and Zhang 2024, arXiv:2404.02948.

    y' = y + c s (B A - B0 A0) x        W ~ U S V^T, A0 = (S/s)^1/2 V^T (r, i), B0 = U (S/s)^1/2 (o, r), A = A0, B = B0

The paper subtracts s B0 A0 from W once; here W stays untouched and the difference is formed from the factors,
(B - B0) A + B0 (A - A0), which is exactly 0 at first and keeps small steps in 16 bits.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_lite.adapter import Adapter, Input, LowRank, Output
from lora_lite.config import AdapterConfig, require
from lora_lite.facts import Facts
from lora_lite.layers.linear import dense
from lora_lite.linalg import singular_directions
from lora_lite.numerics import read, scaled
from lora_lite.registry import register


@dataclass(frozen=True)
class PiSSAConfig(AdapterConfig):
    """PiSSA. r is at most the layer's rank min(i, o); the paper uses alpha = r."""

    r: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.alpha > 0, self, "alpha", "a number > 0, for the principal part is divided by it")

    @property
    def scaling(self) -> float:
        """s."""
        return self.alpha / self.r


@register(
    PiSSAConfig,
    Facts(
        "pissa",
        title="PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large Language Models",
        arxiv="2404.02948",
        lr=1e-4,
        lr_range=(2e-5, 3e-4),
    ),
)
class PiSSA(Adapter):
    """The principal singular part of W, trained; c multiplies the distance from where it started."""

    A0: Tensor
    B0: Tensor

    def __init__(self, cfg: PiSSAConfig, i: int, o: int) -> None:
        super().__init__(cfg)
        if cfg.r > min(i, o):
            raise ValueError(f"r = {cfg.r} is larger than the rank min(i, o) = {min(i, o)} of this layer")
        self.A = self.parameter(cfg.r, i)
        self.B = self.parameter(o, cfg.r)
        self.frozen("A0", cfg.r, i)
        self.frozen("B0", o, cfg.r)

    def init(self, layer: nn.Module, stats: Any, rng: torch.Generator) -> None:
        U, S, Vh = singular_directions(dense(layer), self.cfg.r)
        root = (S / self.cfg.scaling).sqrt()
        for A in (self.A, self.A0):
            A.copy_(root.unsqueeze(1) * Vh)
        for B in (self.B, self.B0):
            B.copy_(U * root)

    def change(self, x: Input, y: Output, layer: nn.Module, c: Tensor) -> LowRank:
        h = read(x, torch.cat([self.A, self.A - self.A0]))
        return scaled(h, c * self.cfg.scaling), torch.cat([self.B - self.B0, self.B0], dim=1)
