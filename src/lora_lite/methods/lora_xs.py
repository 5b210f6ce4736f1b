"""LoRA-XS. Balazy et al. 2024, arXiv:2405.17604.

    y' = y + c (alpha/r) U R S V^T x = y + c (alpha/r) U R h        W ~ U S V^T of rank r, frozen; R (r, r) = 0

Only R is trained. S stands on the input side of R, as in the authors' code, so R reads h = U^T (y - b).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lora_lite.config import is_number, require
from lora_lite.facts import Facts
from lora_lite.frozen_basis.adapter import Coordinates, FrozenBasisAdapter, FrozenBasisConfig
from lora_lite.numerics import cast, scaled
from lora_lite.registry import register


@dataclass(frozen=True)
class LoRAXSConfig(FrozenBasisConfig):
    """LoRA-XS.

    Args:
        alpha: numerator of the scaling alpha / r. None: r.
        init_std: standard deviation of R at first (the paper: 1e-5); 0 starts exactly at the base.
    """

    r: int | None = 16
    alpha: float | None = None  # type: ignore[assignment]
    init_std: float = 0.0

    optional = ("r", "alpha")
    unused = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        require(is_number(self.init_std, 0.0), self, "init_std", "a number >= 0")


@register(
    LoRAXSConfig,
    Facts(
        "lora_xs",
        title="LoRA-XS: Low-Rank Adaptation with Extremely Small Number of Parameters",
        arxiv="2405.17604",
        lr=4e-3,
        lr_range=(5e-4, 5e-3),
        decay=("R",),
    ),
)
class LoRAXS(FrozenBasisAdapter):
    """A small trained matrix between frozen directions. c multiplies the change."""

    def __init__(self, cfg: LoRAXSConfig, i: int, o: int) -> None:
        super().__init__(cfg, i, o)
        self.R = self.parameter(self.r, self.r)

    def init_core(self, rng: torch.Generator) -> None:
        self.R.normal_(0.0, self.cfg.init_std, generator=rng)

    @classmethod
    def identity_bound(cls, cfg: LoRAXSConfig, dtype: torch.dtype = torch.float32) -> float:
        return 10 * cfg.init_std * (1.0 if cfg.alpha is None else cfg.alpha / (cfg.r or 1))

    def delta(self, h: Coordinates, c: Tensor) -> Coordinates:
        scaling = 1.0 if self.cfg.alpha is None else self.cfg.alpha / self.r
        return scaled(h @ cast(self.R, h).T, c * scaling)
