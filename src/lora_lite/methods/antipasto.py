"""A bounded gain on AntiPaSTO's frozen directions. After Clark 2026, arXiv:2601.07473.

    y' = y + U diag(elu(c g)) U^T (y - b)        W ~ U S P with U (o, r), S (r) frozen; g (r) = 0

Each direction's scale becomes S (1 + elu(c g)): it grows linearly, and shrinks towards 0 without crossing it. The paper
has frozen singular directions and the coefficient, but rotates and adds (`antipasto_rot`); the gain is from the code of
its author's later adapters.
"""

import math
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from lora_lite.config import require
from lora_lite.facts import Facts
from lora_lite.frozen_basis.adapter import Coordinates, FrozenBasisAdapter, FrozenBasisConfig, projected
from lora_lite.numerics import double, scaled, wide
from lora_lite.registry import register


@dataclass(frozen=True)
class AntiPaSTOConfig(FrozenBasisConfig):
    """A gain for each direction of a frozen basis.

    Args:
        suppress_only: hold g <= 0, so that directions can only be weakened (for c >= 0).
    """

    suppress_only: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require(isinstance(self.suppress_only, bool), self, "suppress_only", "True or False")


@register(
    AntiPaSTOConfig,
    Facts(
        "antipasto",
        title="AntiPaSTO: Self-Supervised Honesty Steering via Anti-Parallel Representations",
        arxiv="2601.07473",
        lr=1e-2,
        lr_range=(2e-3, 5e-2),
        linear_in_c=False,
        decay=("g",),
    ),
)
class AntiPaSTO(FrozenBasisAdapter):
    """One bounded gain a direction. c multiplies g, within the elu: -c turns what grew into what shrinks."""

    def __init__(self, cfg: AntiPaSTOConfig, i: int, o: int) -> None:
        super().__init__(cfg, i, o)
        self.g = self.parameter(self.gains())

    def gains(self) -> int:
        """How many directions have a gain."""
        return self.r

    def gain(self, c: Tensor) -> Tensor:
        """elu(c g): the relative change of each direction's scale."""
        g = projected(self.g, -math.inf, 0.0) if self.cfg.suppress_only else self.g
        return F.elu(c.to(g.device) * double(g)).to(wide(g).dtype)

    def delta(self, h: Coordinates, c: Tensor) -> Coordinates:
        return scaled(h, self.gain(c))
