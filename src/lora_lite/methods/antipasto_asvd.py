"""A bounded gain on directions of the activation-weighed W. Basis: Yuan et al. 2023 (ASVD), arXiv:2312.05821.

y' = y + U diag(elu(c g)) U^T (y - b)        U (o, r): left singular vectors of W diag(E x_j^2 + eps)^1/2

The paper weighs by a power of the mean |x_j|; the root of E x_j^2 is the diagonal of what `antipasto_corda` weighs by.
"""

from dataclasses import dataclass

from lora_lite.facts import Facts
from lora_lite.frozen_basis.basis import Basis
from lora_lite.methods.antipasto import AntiPaSTO, AntiPaSTOConfig
from lora_lite.registry import register


@dataclass(frozen=True)
class AntiPaSTOASVDConfig(AntiPaSTOConfig):
    """`AntiPaSTOConfig(basis="asvd")` under its known name."""

    basis: str | Basis = "asvd"


@register(
    AntiPaSTOASVDConfig,
    Facts(
        "antipasto_asvd",
        title="ASVD: Activation-aware Singular Value Decomposition for Compressing Large Language Models",
        arxiv="2312.05821",
        lr=AntiPaSTO.facts.lr,
        lr_range=AntiPaSTO.facts.lr_range,
        linear_in_c=False,
        decay=("g",),
    ),
)
class AntiPaSTOASVD(AntiPaSTO):
    """Bounded gains on ASVD-oriented directions. c multiplies g, within the elu."""
