"""Multiply-accumulates of an adapter's forward pass, counted by running it, not by a formula."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lora_lite.adapter import Adapter, variant_of
from lora_lite.config import AdapterConfig


@dataclass(frozen=True)
class Macs:
    """Multiply-accumulates that a layer's adapter adds to a forward pass.

    Attributes:
        token: for each token.
        step: once a forward pass, whatever the number of tokens (a rotation built from its parameters).
    """

    token: int
    step: int


def added_macs(cfg: AdapterConfig, i: int, o: int, bias: bool = False) -> Macs:
    """Count the matrix products of an adapter on a layer of i inputs and o outputs.

    Element-wise work is not counted. Runs on the layer's real shapes with zero weights, about 4 i o bytes of memory.
    """
    layer = nn.Linear(i, o, bias=bias)
    with torch.no_grad():
        for p in layer.parameters():
            p.zero_()
        adapter: Any = variant_of(cfg)(cfg, i, o)  # type: ignore[call-arg]
        if getattr(adapter.cfg, "side", None) == "auto":
            adapter.cfg = adapter.cfg.replace(side="input" if o > i else "output")
        adapter.derive(layer)
        one, two = (_count(adapter, layer, tokens, i, o) for tokens in (1, 2))
    return Macs(two - one, 2 * one - two)


def _count(adapter: Adapter, layer: nn.Linear, tokens: int, i: int, o: int) -> int:
    x, y, c = torch.zeros(tokens, i), torch.zeros(tokens, o), torch.ones((), dtype=torch.float64)
    with FlopCounterMode(display=False) as counter:
        if adapter.before is not None:
            adapter(x, None, layer, c)
        adapter(x, y, layer, c, y)
    return counter.get_total_flops() // 2
