"""A bounded gain on directions of the activation-weighed W. Basis: Yuan et al. 2023 (ASVD), arXiv:2312.05821.

y' = y + U diag(elu(c g)) U^T (y - b)        U (o, r): left singular vectors of W diag(E x_j^2 + eps)^1/2

The paper weighs by a power of the mean |x_j|; the root of E x_j^2 is the diagonal of what `antipasto_corda` weighs by.
"""

from dataclasses import dataclass

from lora_lite.adapter import register
from lora_lite.frozen_basis import Basis
from lora_lite.variants.antipasto import AntiPaSTO, AntiPaSTOConfig


@dataclass(frozen=True)
class AntiPaSTOASVDConfig(AntiPaSTOConfig):
    """`AntiPaSTOConfig(basis="asvd")` under its known name."""

    basis: str | Basis = "asvd"


@register(
    "antipasto_asvd",
    AntiPaSTOASVDConfig,
    title="ASVD: Activation-aware Singular Value Decomposition for Compressing Large Language Models",
    arxiv="2312.05821",
    lr=AntiPaSTO.lr,
    lr_range=AntiPaSTO.lr_range,
    linear_in_c=False,
    decay=("g",),
)
class AntiPaSTOASVD(AntiPaSTO):
    """Bounded gains on ASVD-oriented directions. c multiplies g, within the elu."""
