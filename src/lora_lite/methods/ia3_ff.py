"""IA3 on the feed-forward block. Liu et al. 2022, arXiv:2205.05638, section 3.3.

x' = x + c (l - 1) * x        l (i) = 1, where x is the intermediate activation that the second MLP layer reads
"""

from dataclasses import dataclass

from torch import Tensor, nn

from lora_lite.adapter import Adapter, Input
from lora_lite.config import AdapterConfig, Default
from lora_lite.facts import Facts
from lora_lite.numerics import cast, scaled
from lora_lite.registry import register


@dataclass(frozen=True)
class IA3FFConfig(AdapterConfig):
    """IA3 rescales the inputs of the second MLP layer, under its usual names."""

    target_names: tuple[str, ...] = Default(
        [r"(^|[._])(down_proj|fc2|w2|wo|lin2|linear2|dense_4h_to_h)$|mlp\.c_proj$|(?<!attention\.)output\.dense$"]
    )
    target_roles: tuple[str, ...] = Default()
    unused = ("r", "alpha")


@register(
    IA3FFConfig,
    Facts(
        "ia3_ff",
        title="Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning",
        arxiv="2205.05638",
        lr=3e-3,
        lr_range=(1e-3, 1e-2),
    ),
)
class IA3FF(Adapter):
    """One gain for each input feature. c multiplies the gain's distance from 1."""

    reads_weight = False

    def __init__(self, cfg: IA3FFConfig, i: int, o: int) -> None:
        super().__init__(cfg)
        self.l = self.parameter(i, fill=1.0)

    def before(self, x: Input, layer: nn.Module, c: Tensor) -> Input:
        return x + x * cast(scaled(self.l - 1, c), x)
