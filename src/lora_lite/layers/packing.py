"""bitsandbytes' packing of 4-bit weights on CPUs with AVX-512 bf16.

There a `Linear4bit` rearranges its weight, in its first eval forward without gradients, for a kernel that computes in
bf16 and takes only whole blocks (o a multiple of 32, i of the block size). That kernel has no backward and stays in use
in train mode, so it cuts every gradient below it. Packed weights are therefore read through `unpacked`, and none is
packed while adapters are attached.
"""

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

FLAG = "support_avx512bf16_for_cpu"


def quant_state(layer: nn.Module) -> Any:
    """bitsandbytes' record of how a layer's 4-bit weight is quantised; None where it has none (yet)."""
    own = getattr(layer.weight, "quant_state", None)
    return getattr(layer, "quant_state", None) if own is None else own


def is_packed(layer: nn.Module) -> bool:
    """Whether a layer's weight is a 4-bit one that bitsandbytes has packed."""
    return hasattr(layer, "weight") and bool(getattr(quant_state(layer), "packing_format_for_cpu", False))


def unpacked(layer: nn.Module) -> tuple[Tensor, Any]:
    """(stored tensor, quant state) of a layer's 4-bit weight as they are before any packing; the layer is not touched.

    Packing rounds the scale of each block to bf16 and forgets the second quantisation of the scales, so of a packed
    weight these are the very values that its kernel reads.
    """
    data, state = layer.weight.data, quant_state(layer)
    if not is_packed(layer):
        return data, state  # type: ignore[return-value]
    from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

    state = copy.copy(state)
    # bitsandbytes' own inverse leaves the scales transposed, or quantises them a second time with another offset.
    absmax = state.absmax.T.reshape(-1).to(torch.float32)
    state.original_nested = False
    data, state = _convert_weight_packed_for_cpu_inverse(data, state)  # type: ignore[arg-type]
    state.absmax, state.offset, state.state2, state.nested = absmax, None, None, False
    return data, state


def forbid_packing(model: nn.Module) -> list[str]:
    """Unpack every packed 4-bit weight and let none be packed; returns the paths of the layers that might have been."""
    paths = [path for path, layer in model.named_modules() if getattr(layer, FLAG, False)]
    for layer in [layer for layer in model.modules() if hasattr(layer, FLAG)]:
        setattr(layer, FLAG, False)
        if is_packed(layer):
            weight: Any = layer.weight
            data, state = unpacked(layer)
            weight.data, weight.quant_state, layer.quant_state = data, state, state
    return paths


def allow_packing(model: nn.Module, paths: Iterable[str]) -> None:
    """Undo `forbid_packing` for those of its paths that are still such layers; each packs again in its next forward."""
    modules = dict(model.named_modules())
    for path in paths:
        if hasattr(modules.get(path), FLAG):
            setattr(modules[path], FLAG, True)


@contextmanager
def packing_forbidden(model: nn.Module) -> Iterator[None]:
    """No 4-bit weight of the model is packed for as long as the context lasts."""
    paths = forbid_packing(model)
    try:
        yield
    finally:
        allow_packing(model, paths)
