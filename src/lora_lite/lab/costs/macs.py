"""Multiply-accumulates of an adapter's forward pass, and of a model's, counted by running them, not by a formula.

They run on tensors that have shapes but no memory and no values, so that any size takes moments.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from lora_lite.adapter import Adapter
from lora_lite.config import AdapterConfig
from lora_lite.registry import method_of

TEXT = 128  # tokens of the "short text" that a model's products are counted on


@dataclass(frozen=True)
class Macs:
    """Multiply-accumulates that a layer's adapter adds to a forward pass.

    Attributes:
        token: for each token.
        step: once a forward pass, whatever the number of tokens (a rotation built from its parameters).
    """

    token: int
    step: int


@functools.cache
def added_macs(cfg: AdapterConfig, i: int, o: int, bias: bool = False) -> Macs:
    """Count the matrix products of an adapter on a layer of i inputs and o outputs, while gradients are on.

    What is counted is what torch's `FlopCounterMode` knows: dense and batched matrix products. Not counted:
    element-wise work (the gains of IA3 and RoAd are 0), and the solves and factorisations of small matrices that are
    done once a pass: of r / block_size blocks of block_size (antipasto_rot), of an (r, r) triangle (hra), a QR of
    (r, k) (antipasto_ablate). S-space's "auto" side is chosen by shape; a bias larger than the weight could turn it.

    Raises:
        ValueError: a config that does not fit the shape.
    """
    try:
        with FakeTensorMode():
            return _added(cfg, i, o, bias)
    except RuntimeError:  # a method that looks at values, which these tensors lack: run with real zeros
        return _added(cfg, i, o, bias)


def _added(cfg: AdapterConfig, i: int, o: int, bias: bool) -> Macs:
    layer = nn.Linear(i, o, bias=bias)
    with torch.no_grad():
        for p in layer.parameters():
            p.zero_()
        adapter: Any = method_of(cfg)(cfg, i, o)  # type: ignore[call-arg]
        if getattr(adapter.cfg, "side", None) == "auto":
            adapter.cfg = adapter.cfg.replace(side="input" if o > i else "output")
        adapter.derive(layer)
        one, two = (_count(adapter, layer, tokens, i, o) for tokens in (1, 2))
    return Macs(two - one, 2 * one - two)


def _count(adapter: Adapter, layer: nn.Linear, tokens: int, i: int, o: int) -> int:
    x, y, c = torch.zeros(tokens, i), torch.zeros(tokens, o), torch.ones((), dtype=torch.float64)
    with FlopCounterMode(display=False) as counter:
        if adapter.acts() == "before":
            adapter.act_before(x, layer, c)
        adapter.act_after(y, x, y, layer, c)
    return counter.get_total_flops() // 2


def base_macs(model: PreTrainedModel) -> int | None:
    """Multiply-accumulates of one token's forward pass: the mean over a text of TEXT tokens, the output layer included.

    model: on the meta device, with `attn_implementation="eager"`, whose products are countable; attention is counted
    as computed, that is without leaving out what a causal mask hides. None where the model's code asks for values
    (which a shape does not have), such as a routing that is written with `nonzero`.
    """
    ids = torch.zeros(1, TEXT, dtype=torch.long, device="meta")
    # A mask of the final form saves the model from looking at the values of another. Some models take none such.
    masks: list[dict[str, Tensor]] = [{"attention_mask": torch.zeros(1, 1, TEXT, TEXT, device="meta")}, {}]
    for mask in masks:
        try:
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                model(input_ids=ids, use_cache=False, **mask)
        except (RuntimeError, ValueError, TypeError):
            continue
        return counter.get_total_flops() // 2 // TEXT
    return None
