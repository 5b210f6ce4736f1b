"""A bounded gain on directions oriented by the data. Basis: Yang et al. 2024 (CorDA), arXiv:2406.05223.

    y' = y + U diag(elu(c g)) U^T (y - b)        U (o, r): leading eigenvectors of W C W^T, C = E[x x^T] + eps I

C^1/2 makes U U^T W the best rank-r part of W under the data, in least squares; `basis="corda:power=1.0"` is the paper's
printed SVD(W C).
"""

from dataclasses import dataclass

from lora_lite.facts import Facts
from lora_lite.frozen_basis.basis import Basis
from lora_lite.methods.antipasto import AntiPaSTO, AntiPaSTOConfig
from lora_lite.registry import register


@dataclass(frozen=True)
class AntiPaSTOCorDAConfig(AntiPaSTOConfig):
    """`AntiPaSTOConfig(basis="corda")` under its known name."""

    basis: str | Basis = "corda"


@register(
    AntiPaSTOCorDAConfig,
    Facts(
        "antipasto_corda",
        title="CorDA: Context-Oriented Decomposition Adaptation of Large Language Models for Task-Aware "
        "Parameter-Efficient Fine-tuning",
        arxiv="2406.05223",
        lr=AntiPaSTO.facts.lr,
        lr_range=AntiPaSTO.facts.lr_range,
        linear_in_c=False,
        decay=("g",),
    ),
)
class AntiPaSTOCorDA(AntiPaSTO):
    """Bounded gains on CorDA-oriented directions. c multiplies g, within the elu."""
