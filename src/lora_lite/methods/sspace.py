"""Contrastive steering in S-space, without training. After Rimsky et al. 2024, arXiv:2312.06681.

    y' = y + c |d| |cos(s, d)| U (S^1/2 * d/|d|)      s = S^-1/2 U^T (y - b), restricted to the modes chosen by |d|

d (r) = mean s over the positive prompts less that over the negative ones. The cosine is the gate: tokens that do not
point along d or against it are left alone. With its sign kept (`gate="signed"`) the push turns round where s does, so
that c = -1 does not steer to the opposite side.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_lite.config import Default, is_number, require
from lora_lite.errors import CalibrationError
from lora_lite.facts import Facts
from lora_lite.frozen_basis.adapter import Coordinates, FrozenBasisAdapter, FrozenBasisConfig
from lora_lite.layers.linear import shape
from lora_lite.numerics import wide
from lora_lite.registry import register

GATES = ("absolute", "signed")
ROWS = ("last", "mean")
SMALL = 1e-4  # of the largest S: S^-1/2 would raise the rounding of y along weaker modes above what they carry


@dataclass(frozen=True)
class SSpaceConfig(FrozenBasisConfig):
    """Steering along the difference of two sets of prompts: `calibration_data=ll.Contrast(positive, negative)`.

    Args:
        tokens: what represents a prompt: its "last" token, or the "mean" of its tokens.
        gate: "absolute": |cos(s, d)|, which pushes every token along d for c > 0 and against it for c < 0; "signed":
            cos(s, d), which pushes each token further to the side where it is.
        unit: length of a full push in units of S^1/2. None: |d|, as measured.
    """

    target_roles: tuple[str, ...] = Default(("writer",))
    tokens: str = "last"
    gate: str = "absolute"
    unit: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.tokens in ROWS, self, "tokens", f"one of {ROWS}")
        require(self.gate in GATES, self, "gate", f"one of {GATES}")
        require(self.unit is None or is_number(self.unit), self, "unit", "a finite number, or None")


@register(
    SSpaceConfig,
    Facts(
        "sspace",
        title="Steering Llama 2 via Contrastive Activation Addition",
        arxiv="2312.06681",
        affine=False,
        trained=False,
    ),
)
class SSpace(FrozenBasisAdapter):
    """A gated push along a measured direction. c multiplies the change."""

    d: Tensor
    divides_by_S = True

    def __init__(self, cfg: SSpaceConfig, i: int, o: int) -> None:
        super().__init__(cfg, i, o)
        self.frozen("d", self.r)

    @classmethod
    def needs(cls, cfg: SSpaceConfig) -> frozenset[str]:
        return super().needs(cfg) | {f"contrast_{cfg.tokens}"}

    @classmethod
    def plan(cls, cfg: Any, shapes: Mapping[str, tuple[int, int]], stats: Mapping[str, Any]) -> dict[str, Any]:
        if not any(stats[path].mean(f"contrast_{cfg.tokens}").any() for path in shapes):
            raise CalibrationError(
                "Contrast: the positive and the negative prompts give the same outputs in every layer"
            )
        return super().plan(cfg, shapes, stats)

    def init(self, layer: nn.Module, stats: Any, rng: torch.Generator) -> None:
        """Take d over all of the layer's directions, and keep the r where it is largest."""
        U, S = self.cfg.basis.of(layer, stats, min(shape(layer)))
        S = torch.where(S / S.max() >= SMALL, S, 0.0)
        d = _root(S, -1) * (U.T @ stats.mean(f"contrast_{self.cfg.tokens}").to(U))
        kept = d.abs().argsort(descending=True, stable=True)[: self.r]
        self.U.copy_(U[:, kept])
        self.S.copy_(S[kept])
        self.d.copy_(d[kept])
        self.cfg = self.cfg.replace(side=self._side(layer))

    def delta(self, h: Coordinates, c: Tensor) -> Coordinates:
        S = wide(self.S, h)
        s, d = wide(h) * _root(S, -1), wide(self.d, h)
        size = d.norm()
        d = d / size.clamp(min=torch.finfo(d.dtype).tiny)
        gate = (s * d).sum(-1, keepdim=True) / s.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(s.dtype).tiny)
        gate = gate.abs() if self.cfg.gate == "absolute" else gate
        push = _root(S, 1) * d * (size if self.cfg.unit is None else self.cfg.unit)
        return (gate * wide(c, s) * push).to(h.dtype)


def _root(S: Tensor, sign: int) -> Tensor:
    """S^1/2 or S^-1/2; 0 where S = 0."""
    return torch.where(S > 0, S.abs() ** (sign / 2), 0.0)
