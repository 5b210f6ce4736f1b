"""LoRA-XS. Balazy et al. 2024, arXiv:2405.17604.

    y' = y + c (alpha/r) U R S V^T x        W ~ U S V^T truncated to rank r, frozen; R (r, r) = 0

Only R is trained. V^T is not stored: S V^T = U^T W is one matmul away. S stands on the input side of R, as in the
authors' code.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_lite.adapter import Adapter, Input, LowRank, Output, cast, register, scaled
from lora_lite.basis import singular_directions
from lora_lite.config import AdapterConfig, is_number, require
from lora_lite.linear import dense


@dataclass(frozen=True)
class LoRAXSConfig(AdapterConfig):
    """LoRA-XS. r is at most the layer's rank min(i, o).

    Args:
        init_std: standard deviation of R at first (the paper: 1e-5); 0 starts exactly at the base.
    """

    r: int = 16
    init_std: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(is_number(self.init_std, 0.0), self, "init_std", "a number >= 0")


@register(
    "lora_xs",
    LoRAXSConfig,
    title="LoRA-XS: Low-Rank Adaptation with Extremely Small Number of Parameters",
    arxiv="2405.17604",
    lr=4e-3,
    lr_range=(5e-4, 5e-3),
    decay=("R",),
)
class LoRAXS(Adapter):
    """A small trained matrix between frozen singular directions. c multiplies the change."""

    U: Tensor
    P: Tensor

    def __init__(self, cfg: LoRAXSConfig, i: int, o: int) -> None:
        super().__init__(cfg)
        if cfg.r > min(i, o):
            raise ValueError(f"r = {cfg.r} is larger than the rank min(i, o) = {min(i, o)} of this layer")
        self.R = self.parameter(cfg.r, cfg.r)
        self.frozen("U", o, cfg.r)
        self.derived("P")

    def init(self, layer: nn.Module, stats: Any, rng: torch.Generator) -> None:
        self.U.copy_(singular_directions(dense(layer), self.cfg.r)[0])
        self.R.normal_(0.0, self.cfg.init_std, generator=rng)

    def derive(self, layer: nn.Module) -> None:
        """P (r, i) = U^T W = S V^T."""
        self.derived("P", self.U.T @ dense(layer, self.U.dtype))

    @classmethod
    def identity_bound(cls, cfg: LoRAXSConfig, dtype: torch.dtype = torch.float32) -> float:
        return 10 * cfg.init_std * cfg.alpha / cfg.r

    def change(self, x: Input, y: Output, layer: nn.Module, c: Tensor) -> LowRank:
        h = x @ cast(self.P, x).T @ cast(self.R, x).T
        return scaled(h, c * self.cfg.alpha / self.cfg.r), self.U
