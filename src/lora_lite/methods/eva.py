"""EVA. Paischer et al. 2024, arXiv:2410.07170.

    y' = y + c s B A x        A (r, i) = the leading eigenvectors of E[x x^T] over the calibration data, B (o, r) = 0

With rho > 1 the ranks are redistributed: of every layer's first rho r directions, those that explain the largest share
of their layer's input are kept, r for each layer on average.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lora_lite.config import is_number, require
from lora_lite.errors import CalibrationError
from lora_lite.facts import Facts
from lora_lite.methods.lora import LoRA, LoRAConfig
from lora_lite.registry import register


@dataclass(frozen=True)
class EVAConfig(LoRAConfig):
    """EVA: a LoRA that starts from the data.

    Args:
        centered: take the eigenvectors of the covariance instead, as a principal component analysis does.
        rho: a layer's rank is at most rho r after redistribution; 1: every layer has rank r. At least 1.
    """

    rho: float = 1.0
    centered: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require(is_number(self.rho, 1.0), self, "rho", "a number >= 1")
        require(isinstance(self.centered, bool), self, "centered", "True or False")

    @property
    def statistic(self) -> str:
        """The statistic whose eigenvectors A takes."""
        return "input_covariance" if self.centered else "input_moment"


@register(
    EVAConfig,
    Facts(
        "eva",
        title="Parameter Efficient Fine-tuning via Explained Variance Adaptation",
        arxiv="2410.07170",
        lr=5e-4,
        lr_range=(1e-4, 1e-3),
        decay=("A", "B"),
        lora_plus=("B",),
    ),
)
class EVA(LoRA):
    """LoRA along the directions in which the inputs vary most. c multiplies the change."""

    @classmethod
    def needs(cls, cfg: EVAConfig) -> frozenset[str]:
        return frozenset({cfg.statistic})

    @classmethod
    def plan(cls, cfg: EVAConfig, shapes: Mapping[str, tuple[int, int]], stats: Mapping[str, Any]) -> dict[str, Any]:
        if cfg.rho == 1:
            return super().plan(cfg, shapes, stats)
        shares: list[tuple[float, str]] = []
        for path, (i, _) in shapes.items():
            values = stats[path].eigen(cfg.statistic)[1]
            if not values.sum() > 0:
                raise CalibrationError(f"{path}: its inputs do not vary on the calibration data; give more data")
            shares += [(float(value), path) for value in values[: min(int(cfg.rho * cfg.r), i)] / values.sum()]
        kept = [path for _, path in sorted(shares, key=lambda pair: -pair[0])[: cfg.r * len(shapes)]]
        # alpha moves with r, so that every layer keeps the scaling that the config asks for.
        ranks = {path: kept.count(path) for path in shapes if path in kept}
        units = {r: dataclasses.replace(cfg, r=r, alpha=1.0).scaling for r in set(ranks.values())}
        return {path: cfg.replace(r=r, alpha=cfg.scaling / units[r]) for path, r in ranks.items()}

    def init(self, layer: nn.Module, stats: Any, rng: torch.Generator) -> None:
        if stats.tokens < self.cfg.r:
            raise CalibrationError(
                f"{stats.tokens} calibration tokens cannot give r = {self.cfg.r} directions; give more data"
            )
        if self.cfg.r > self.A.shape[1]:
            raise ValueError(f"r = {self.cfg.r} is larger than this layer's in_features = {self.A.shape[1]}")
        self.A.copy_(stats.eigen(self.cfg.statistic)[0][:, : self.cfg.r].T)
