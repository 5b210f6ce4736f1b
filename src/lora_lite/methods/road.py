"""RoAd. Liao and Monz 2024, arXiv:2409.00119, eqs. 2-4.

    y' = y + c (R y - y)        R rotates and scales pairs (y_j, y_k): [[a cos t, -a sin t], [a sin t, a cos t]]

road_1 has one (t, a) for each pair, road_2 one for each of its rows, road_4 one for each of its four entries. The pairs
are (j, j + group_size/2) within each group: group_size = 2 gives the paper's adjacent pairs, larger groups (64, as in
peft) compute the same with fewer, longer copies. t (theta) = 0, a (alpha) = 1.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lora_lite.adapter import Adapter, Input, Output
from lora_lite.config import AdapterConfig, is_int, require
from lora_lite.facts import Facts
from lora_lite.numerics import cast, scaled
from lora_lite.registry import register

VARIANTS = {"road_1": 1, "road_2": 2, "road_4": 4}


@dataclass(frozen=True)
class RoadConfig(AdapterConfig):
    """RoAd.

    Args:
        road_variant: "road_1", "road_2" or "road_4": pairs of trained values for each rotated pair of features.
        group_size: features that are paired up among themselves. Even; divides the layer's o.
    """

    road_variant: str = "road_1"
    group_size: int = 64
    unused = ("r", "alpha")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.road_variant in list(VARIANTS), self, "road_variant", f"one of {', '.join(VARIANTS)}")
        ok = is_int(self.group_size, 2) and self.group_size % 2 == 0
        require(ok, self, "group_size", "an even integer >= 2 that divides the layer's out_features")


@register(
    RoadConfig,
    Facts(
        "road",
        title="3-in-1: 2D Rotary Adaptation for Efficient Finetuning, Efficient Batching and Composability",
        arxiv="2409.00119",
        lr=3e-3,
        lr_range=(1e-3, 7e-3),
        decay=("theta",),
    ),
)
class Road(Adapter):
    """Rotations and gains of pairs of output features, bias included. c multiplies R y - y."""

    reads_weight = False

    def __init__(self, cfg: RoadConfig, i: int, o: int) -> None:
        super().__init__(cfg)
        if o % cfg.group_size:
            raise ValueError(f"group_size = {cfg.group_size} does not divide this layer's out_features = {o}")
        groups, half = o // cfg.group_size, cfg.group_size // 2
        self.theta = self.parameter(groups, VARIANTS[cfg.road_variant], half)
        self.alpha = self.parameter(groups, VARIANTS[cfg.road_variant], half, fill=1.0)

    @classmethod
    def tiny(cls) -> RoadConfig:
        return RoadConfig(group_size=8)

    def change(self, x: Input, y: Output, layer: nn.Module, c: Tensor) -> Output:
        # (groups, 2, half): the two rows of each pair's cosine and sine terms; road_4 has them in this order, road_1
        # and road_2 use the same values for both terms.
        cos_theta, sin_theta = self._terms(self.theta)
        cos_alpha, sin_alpha = self._terms(self.alpha)
        cosine, sine = cos_alpha * cos_theta.cos() - 1, sin_alpha * sin_theta.sin()
        first, second = y.unflatten(-1, (-1, 2, self.cfg.group_size // 2)).unbind(-2)
        turned = torch.stack((-second, first), dim=-2).flatten(-3)
        gain, mix = (cast(scaled(term.expand(-1, 2, -1).flatten(), c), y) for term in (cosine, sine))
        return torch.addcmul(y * gain, turned, mix)

    def _terms(self, values: Tensor) -> tuple[Tensor, Tensor]:
        return (values[:, :2], values[:, 2:]) if self.cfg.road_variant == "road_4" else (values, values)
