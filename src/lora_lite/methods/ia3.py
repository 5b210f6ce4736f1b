"""IA3 on keys and values. Liu et al. 2022, arXiv:2205.05638, section 3.3.

y' = y + c (l - 1) * y        l (o) = 1
"""

from dataclasses import dataclass

from torch import Tensor, nn

from lora_lite.adapter import Adapter, Input, Output
from lora_lite.config import AdapterConfig, Default
from lora_lite.facts import Facts
from lora_lite.numerics import cast, scaled
from lora_lite.registry import register


@dataclass(frozen=True)
class IA3Config(AdapterConfig):
    """IA3 rescales the outputs of the key and value projections, under their usual names. Fused ones are left to you:
    a gain on all of them would rescale queries as well."""

    target_names: tuple[str, ...] = Default((r"(^|(?<!feed_forward)\.)(k|v|key|value)(_proj|_lin)?$",))
    target_roles: tuple[str, ...] = Default()
    unused = ("r", "alpha")


@register(
    IA3Config,
    Facts(
        "ia3",
        title="Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning",
        arxiv="2205.05638",
        lr=3e-3,
        lr_range=(1e-3, 1e-2),
    ),
)
class IA3(Adapter):
    """One gain for each output feature, bias included. c multiplies the gain's distance from 1."""

    reads_weight = False

    def __init__(self, cfg: IA3Config, i: int, o: int) -> None:
        super().__init__(cfg)
        self.l = self.parameter(o, fill=1.0)

    def change(self, x: Input, y: Output, layer: nn.Module, c: Tensor) -> Output:
        return y * cast(scaled(self.l - 1, c), y)
