"""DoRA. Liu et al. 2024, arXiv:2402.09353, eqs. 5 and 11.

    y' = y + c [ (m/n - 1)(y - b) + (m/n) s B A x ]        n (o) = ||W + s B A|| by row, held constant in backward
                                                           A (r, i) kaiming, B (o, r) = 0, m (o) = ||W||

The paper's columns are the rows of an (o, i) weight. n^2 expands to ||W||^2 + 2 s (W A^T) * B + s^2 (B A A^T) * B,
summed over r, so that the (o, i) product B A is never formed.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_lite.adapter import Adapter, Input, Output, dropout, kaiming_uniform_
from lora_lite.facts import Facts
from lora_lite.layers.linear import bias, dense, is_quantized
from lora_lite.methods.lora import LoRAConfig
from lora_lite.numerics import add_lowrank, cast, double, full_precision, read, scaled, wide
from lora_lite.registry import register


@dataclass(frozen=True)
class DoRAConfig(LoRAConfig):
    """DoRA: a LoRA and the magnitudes of W's rows. Dropout acts on the low-rank path alone, so that W runs only once;
    the authors' code drops the input of the (m/n - 1) term too."""

    unused = ("bias",)


@register(
    DoRAConfig,
    Facts(
        "dora",
        title="DoRA: Weight-Decomposed Low-Rank Adaptation",
        arxiv="2402.09353",
        lr=2e-4,
        lr_range=(5e-5, 6e-4),
        decay=("A", "B"),
        lora_plus=("B",),
    ),
)
class DoRA(Adapter):
    """Magnitude and direction of W's rows, trained apart. c multiplies the whole change; the bias is not scaled."""

    W_norm: Tensor
    inexact = ("A", "B")  # the paper holds the norm constant in backward (its section 4.3)

    def __init__(self, cfg: DoRAConfig, i: int, o: int) -> None:
        super().__init__(cfg)
        self.A = self.parameter(cfg.r, i)
        self.B = self.parameter(o, cfg.r)
        self.m = self.parameter(o)
        self.frozen("W_norm", o)

    def init(self, layer: nn.Module, stats: Any, rng: torch.Generator) -> None:
        kaiming_uniform_(self.A, rng)
        self.W_norm.copy_(dense(layer, torch.float64).norm(dim=1))
        self.m.copy_(self.W_norm)

    @torch.no_grad()
    def norm(self, layer: nn.Module) -> Tensor:
        """n (o), from the stored ||W||, so that m / n is exactly 1 at first: fp64 squares fp32 without rounding."""
        s, A, B = self.cfg.scaling, wide(self.A), wide(self.B)
        with full_precision(A.device):
            W = dense(layer, A.dtype if is_quantized(layer) or A.dtype == torch.float64 else None)
            cross = ((W @ A.T.to(W.dtype)).to(A.dtype) * B).sum(1)
            square = ((B @ (A @ A.T)) * B).sum(1)
            n = (double(self.W_norm).square() + 2 * s * cross + s**2 * square).clamp(min=0).sqrt().to(A.dtype)
            return torch.where(n > 0, n, 1.0)  # m / n stays defined for a row of zeros, where m is 0 too

    def change(self, x: Input, y: Output, layer: nn.Module, c: Tensor) -> Output:
        gain = wide(self.m) / self.norm(layer)
        b = bias(layer)
        linear = y if b is None else y - cast(b, y)
        h = read(dropout(x, self.cfg.dropout, self.training), self.A)
        h = scaled(h, c * self.cfg.scaling)
        return add_lowrank(linear * cast(scaled(gain - 1, c), y), h, gain.unsqueeze(1) * self.B)
