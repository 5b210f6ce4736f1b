"""A bounded gain on directions oriented by the data. Basis: Yang et al. 2024 (CorDA), arXiv:2406.05223.

    y' = y + U diag(elu(c g)) U^T (y - b)        U (o, r): leading eigenvectors of W C W^T, C = E[x x^T] + eps I

C^1/2 makes U U^T W the best rank-r part of W under the data, in least squares; `basis="corda:power=1.0"` is the paper's
printed SVD(W C).
"""

from dataclasses import dataclass

from lora_lite.adapter import register
from lora_lite.frozen_basis import Basis
from lora_lite.variants.antipasto import AntiPaSTO, AntiPaSTOConfig


@dataclass(frozen=True)
class AntiPaSTOCorDAConfig(AntiPaSTOConfig):
    """`AntiPaSTOConfig(basis="corda")` under its known name."""

    basis: str | Basis = "corda"


@register(
    "antipasto_corda",
    AntiPaSTOCorDAConfig,
    title="CorDA: Context-Oriented Decomposition Adaptation of Large Language Models for Task-Aware "
    "Parameter-Efficient Fine-tuning",
    arxiv="2406.05223",
    lr=AntiPaSTO.lr,
    lr_range=AntiPaSTO.lr_range,
    linear_in_c=False,
    decay=("g",),
)
class AntiPaSTOCorDA(AntiPaSTO):
    """Bounded gains on CorDA-oriented directions. c multiplies g, within the elu."""
