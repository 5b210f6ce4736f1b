"""Do quantised layers pass back the gradient of their own weight?"""

from typing import Any

import torch
from torch import Tensor, nn

from lora_lite.calibration.statistics import generator
from lora_lite.errors import TargetError
from lora_lite.layers.linear import dense, execution_device, is_linear, is_quantized, is_sharded, shape
from lora_lite.layers.packing import is_packed
from lora_lite.numerics import double

COSINE = 0.97  # of what a quantised layer passes back with what its weight would; rounding to 8 bits leaves 0.9999


def cut_layers(model: nn.Module) -> dict[str, float]:
    """Quantised layers that pass back another gradient than their weight would: path -> cosine with it.

    One layer of each kind is asked, with random rows: its weight is dequantised once, nothing else of the model runs.
    """
    seen, cut = set(), dict[str, float]()
    for path, layer in model.named_modules():
        if not (is_linear(layer) and is_quantized(layer)):
            continue
        weight: Any = layer.weight
        kind = (type(layer), type(weight), type(weight.data), weight.dtype, is_packed(layer))
        if kind in seen or weight.is_meta or is_sharded(weight) or hasattr(layer, "_hf_hook"):
            continue
        seen.add(kind)
        cosine = _cosine(layer, _dtype_of(model))
        if cosine is not None and not cosine >= COSINE:
            cut[path] = cosine
    return cut


def _dtype_of(model: nn.Module) -> torch.dtype:
    """That of the model's activations, as far as its parameters show."""
    dtypes = [p.dtype for p in model.parameters() if p.is_floating_point() and p.dtype.itemsize > 1]
    return next((dtype for dtype in dtypes if dtype.itemsize == 2), torch.float32)


@torch.enable_grad()
def _cosine(layer: nn.Module, dtype: torch.dtype) -> float | None:
    """Cosine of the gradient of a bare layer's input with W^T g, for 4 random rows; None where W cannot be read."""
    try:
        W = dense(layer, torch.float32)
    except TargetError:
        return None
    i, o = shape(layer)
    rows = torch.randn(4, i + o, generator=generator(0, "rows"), dtype=torch.float32, device="cpu")
    x, g = rows.to(execution_device(layer), dtype).split([i, o], dim=1)
    x = x.clone().requires_grad_()
    y = layer.forward(x)
    if not isinstance(y, Tensor) or y.shape != g.shape:
        return None
    if not y.requires_grad:
        return 0.0
    (back,) = torch.autograd.grad(y, x, g.to(y.dtype), allow_unused=True)
    if back is None:
        return 0.0
    return float(torch.cosine_similarity(double(back).flatten(), double(g.float() @ W).flatten(), dim=0))
