"""HRA. Yuan et al. 2024, arXiv:2405.17484, eqs. 1, 3 and 4.

    x' = x + c (H_1 H_2 ... H_r x - x)        H_k = I - 2 u_k u_k^T, u_k = U_k / ||U_k||
                                              U (r, i) kaiming, in equal pairs

W reads x', so W' = W H_1 ... H_r. The product of reflections is I - u^T T u with T upper triangular and T^-1 = I/2 +
the strict upper part of u u^T (the compact WY form; Schreiber and Van Loan 1989): two thin matmuls, not r reflections.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_lite.adapter import Adapter, Input, kaiming_uniform_
from lora_lite.config import AdapterConfig, require
from lora_lite.facts import Facts
from lora_lite.numerics import add_lowrank, full_precision, read, scaled, wide
from lora_lite.registry import register


@dataclass(frozen=True)
class HRAConfig(AdapterConfig):
    """HRA: r reflections, an even number, so that each pair starts as the identity."""

    unused = ("alpha",)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.r % 2 == 0, self, "r", "even, so that reflections start in pairs that cancel")


@register(
    HRAConfig,
    Facts(
        "hra",
        title="Bridging The Gap between Low-rank and Orthogonal Adaptation via Householder Reflection Adaptation",
        arxiv="2405.17484",
        lr=1e-3,
        lr_range=(1e-4, 1e-2),
    ),
)
class HRA(Adapter):
    """A chain of Householder reflections of the input. c multiplies x' - x, so c = -1 is no inverse rotation."""

    reads_weight = False

    def __init__(self, cfg: HRAConfig, i: int, o: int) -> None:
        super().__init__(cfg)
        self.U = self.parameter(cfg.r, i)

    @classmethod
    def identity_bound(cls, cfg: HRAConfig, dtype: torch.dtype = torch.float32) -> float:
        # A pair cancels up to the rounding of u . u and of the two thin matmuls; a base in 16 bits may round that once.
        return max(torch.finfo(dtype).eps, 8 * torch.finfo(cfg.dtype).eps)

    def init(self, layer: nn.Module, stats: Any, rng: torch.Generator) -> None:
        half = kaiming_uniform_(self.U[: self.cfg.r // 2].clone(), rng)
        self.U.copy_(half.repeat_interleave(2, dim=0))

    def before(self, x: Input, layer: nn.Module, c: Tensor) -> Input:
        with full_precision(x.device):
            u = F.normalize(wide(self.U), dim=1)
            half = 0.5 * torch.eye(self.cfg.r, dtype=u.dtype, device=u.device)
            T = torch.linalg.solve_triangular((u @ u.T).triu(1) + half, 2 * half, upper=True)
        h = wide(read(x, u))
        return add_lowrank(x, scaled(-h @ T.T.to(h.dtype), c), u.T)
