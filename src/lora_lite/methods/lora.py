"""LoRA. Hu et al. 2021, arXiv:2106.09685, eq. 3; rsLoRA's scaling: Kalajdzievski 2023, arXiv:2312.03732.

y' = y + c s (B A x + b)        A (r, i) kaiming, B (o, r) = 0        s = alpha / r, or alpha / sqrt(r) (rslora)
                                b (o) = 0, with bias=True alone
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_lite.adapter import Adapter, Input, LowRank, Output, dropout, kaiming_uniform_
from lora_lite.config import AdapterConfig, is_number, require
from lora_lite.facts import Facts
from lora_lite.numerics import read, scaled
from lora_lite.registry import register


@dataclass(frozen=True)
class LoRAConfig(AdapterConfig):
    """LoRA.

    Args:
        rslora: scale by alpha / sqrt(r) instead of alpha / r, which keeps the size of updates independent of r.
        dropout: probability of dropping an entry of x before A, in training. In [0, 1).
        bias: train b as well, which is no part of the paper (peft's `lora_bias`).
    """

    rslora: bool = False
    dropout: float = 0.0
    bias: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require(isinstance(self.rslora, bool), self, "rslora", "True or False")
        require(is_number(self.dropout, 0.0) and self.dropout < 1, self, "dropout", "a number in [0, 1)")
        require(isinstance(self.bias, bool), self, "bias", "True or False")

    @property
    def scaling(self) -> float:
        """s."""
        return self.alpha / (math.sqrt(self.r) if self.rslora else self.r)


@register(
    LoRAConfig,
    Facts(
        "lora",
        title="LoRA: Low-Rank Adaptation of Large Language Models",
        arxiv="2106.09685",
        lr=2e-4,
        lr_range=(1e-4, 1e-3),
        decay=("A", "B"),
        lora_plus=("B",),
    ),
)
class LoRA(Adapter):
    """A low-rank change, added to the output. c multiplies it."""

    reads_weight = False

    def __init__(self, cfg: LoRAConfig, i: int, o: int) -> None:
        super().__init__(cfg)
        self.A = self.parameter(cfg.r, i)
        self.B = self.parameter(o, cfg.r)
        if cfg.bias:
            self.b = self.parameter(o)

    def init(self, layer: nn.Module, stats: Any, rng: torch.Generator) -> None:
        kaiming_uniform_(self.A, rng)

    def change(self, x: Input, y: Output, layer: nn.Module, c: Tensor) -> LowRank:
        h, B = read(dropout(x, self.cfg.dropout, self.training), self.A), self.B
        if self.cfg.bias:  # one more direction, which reads a 1
            h, B = F.pad(h, (0, 1), value=1.0), torch.column_stack([B, self.b])
        return scaled(h, c * self.cfg.scaling), B
