"""Kinds of linear layer, behind four functions: `is_linear`, `shape`, `dense`, `bias`.

A layer is anything with `in_features`, `out_features` and a 2-D `weight`: `nn.Linear`, the linears of bitsandbytes and
torchao; or transformers' `Conv1D`, whose weight is stored as (i, o).
"""

import ast
import functools
import inspect
import textwrap
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor, nn

from lora_lite.errors import TargetError
from lora_lite.layers.packing import quant_state, unpacked


def is_conv1d(layer: nn.Module) -> bool:
    """transformers' `Conv1D`, known by name so that the core does not import transformers."""
    return any(cls.__name__ == "Conv1D" and cls.__module__.startswith("transformers.") for cls in type(layer).__mro__)


def is_linear(module: nn.Module) -> bool:
    """Whether `module` is a linear layer that returns a tensor.

    A router that subclasses a linear layer and whose `forward` returns a tuple is none.
    """
    if not isinstance(getattr(module, "weight", None), Tensor):
        return False
    if is_conv1d(module):
        return True
    if not all(isinstance(getattr(module, name, None), int) for name in ("in_features", "out_features")):
        return False
    return not _returns_tuple(type(module).forward)


def is_read_uncalled(layer: nn.Module) -> bool:
    """Whether it is the `out_proj` of an `nn.MultiheadAttention`, which reads its weight and never calls it."""
    return any(cls.__name__ == "NonDynamicallyQuantizableLinear" for cls in type(layer).__mro__)


def unknown_kinds(model: nn.Module) -> dict[str, int]:
    """Kinds of module that have numbers of input and output features but no weight that is understood, with counts."""
    sizes = (("in_features", "out_features"), ("infeatures", "outfeatures"))
    found = [
        type(module).__name__
        for module in model.modules()
        if not is_linear(module) and any(all(hasattr(module, name) for name in pair) for pair in sizes)
    ]
    return dict(Counter(found))


@functools.cache
def _returns_tuple(forward: Callable[..., object]) -> bool:
    """Whether a `forward` says, in its annotation or in a return statement, that it returns a tuple."""
    if "tuple" in str(getattr(forward, "__annotations__", {}).get("return", "")).lower():
        return True
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(forward)))
    except (OSError, TypeError, SyntaxError):  # no source to read: taken at its base class's word
        return False
    return any(isinstance(node, ast.Return) and isinstance(node.value, ast.Tuple) for node in ast.walk(tree))


def shape(layer: nn.Module) -> tuple[int, int]:
    """(i, o): the numbers of input and output features."""
    if is_conv1d(layer):
        i, o = layer.weight.shape  # type: ignore[union-attr]
        return int(i), int(o)
    return int(layer.in_features), int(layer.out_features)  # type: ignore[arg-type]


def is_quantized(layer: nn.Module) -> bool:
    """Whether the stored weight is not simply the matrix, or the layer rounds it as it computes."""
    weight: Tensor = layer.weight  # type: ignore[assignment]
    own = type(weight.data) is Tensor or type(weight.data).__name__ == "FakeTensor"  # the latter has shapes alone
    plain = weight.is_floating_point() and own and type(weight).__name__ != "Int8Params"
    return not plain or is_4bit(layer)


def is_4bit(layer: nn.Module) -> bool:
    """Whether it is bitsandbytes' `Linear4bit`, whose weight may lose its class to a wrapper."""
    return type(layer.weight).__name__ == "Params4bit" or quant_state(layer) is not None


def is_plain(parameter: Tensor) -> bool:
    """Whether a parameter holds its own values, here and in 16 bits or more: no quantised, sharded or offloaded one."""
    wide = parameter.is_floating_point() and parameter.dtype.itemsize > 1
    return wide and type(parameter.data) is Tensor and not (parameter.is_meta or is_sharded(parameter))


def is_sharded(tensor: Tensor) -> bool:
    """Whether the tensor is one process's part of a larger one (a DTensor)."""
    return hasattr(tensor, "device_mesh") or hasattr(tensor.data, "device_mesh")


@torch.no_grad()
def dense(layer: nn.Module, dtype: torch.dtype | None = None) -> Tensor:
    """W (o, i) as a plain tensor; dequantised where the layer is quantised.

    Args:
        layer: the layer.
        dtype: dtype of the result; None: the weight's own (fp32 for quantised weights).

    Raises:
        TargetError: the weight is on the meta device, sharded, or of a kind that cannot be dequantised.
    """
    weight: Tensor = layer.weight  # type: ignore[assignment]
    kind = f"{type(layer).__name__} with a {type(weight).__name__} of {weight.dtype}"
    if weight.is_meta:
        raise TargetError(f"{kind}: the weight is offloaded (meta device); load it before (e.g. without offloading)")
    if is_sharded(weight):
        raise TargetError(f"{kind}: the weight is sharded; do this before sharding the model")
    if not is_quantized(layer):
        matrix = weight.T if is_conv1d(layer) else weight
        return matrix.detach().to(dtype or weight.dtype)
    i, o = shape(layer)
    matrix = _dequantized(layer, weight, kind)
    if matrix.shape != (o, i):
        raise TargetError(f"{kind}: dequantises to {tuple(matrix.shape)}, expected {(o, i)}")
    return matrix.detach().to(dtype or torch.float32)


def _dequantized(layer: nn.Module, weight: Tensor, kind: str) -> Tensor:
    if is_4bit(layer):
        if quant_state(layer) is None:
            raise TargetError(f"{kind}: not quantised yet; move the model to its device first, e.g. model.to('cpu')")
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(*unpacked(layer))
    if type(weight).__name__ == "Int8Params":
        if weight.is_floating_point():  # has_fp16_weights: rounded in each forward
            return weight.data
        scales = weight.SCB if getattr(weight, "SCB", None) is not None else layer.state.SCB  # type: ignore[union-attr]
        if scales is None:
            raise TargetError(f"{kind}: not quantised yet; move the model to its device first, e.g. model.to('cpu')")
        return weight.data.float() * (scales.float() / 127.0).unsqueeze(1)  # type: ignore[union-attr, operator]
    if type(weight.data) is not Tensor and hasattr(weight, "dequantize"):
        return weight.dequantize()
    raise TargetError(
        f"{kind}: no way known to dequantise it; adapt layers of another kind (target_names, exclude_names)"
    )


@torch.no_grad()
def computes_its_weight(layer: nn.Module, x: Tensor) -> bool:
    """Whether the bare layer maps x (n, i), in its dtype and on its device, to W x + b: to the rounding of that dtype
    (and of activations, where quantised). The layer runs in eval mode, and without its hooks."""
    b, mode = bias(layer), layer.training
    layer.training = False
    try:
        with torch.autocast(x.device.type, enabled=False), torch.autocast("cpu", enabled=False):
            # Not wider than the layer itself computes: where it is plain, W is neither converted nor moved.
            expected = nn.functional.linear(x, dense(layer, x.dtype), None if b is None else b.to(x.dtype))
            y = layer.forward(x)
    finally:
        layer.training = mode
    if not isinstance(y, Tensor) or y.shape != expected.shape:
        return False
    tolerance = 0.03 if x.dtype in (torch.bfloat16, torch.float16) else 1e-3
    tolerance = 0.1 if is_quantized(layer) else tolerance
    expected, y = expected.cpu().double(), y.cpu().double()
    return bool((y - expected).norm() <= tolerance * expected.norm())


def bias(layer: nn.Module) -> Tensor | None:
    """b (o), or None."""
    value = getattr(layer, "bias", None)
    if isinstance(value, Tensor) and value.is_meta and not layer.weight.is_meta:
        raise TargetError(f"{type(layer).__name__}: the bias is offloaded (meta device); load it before")
    return value.detach() if isinstance(value, Tensor) else None


def execution_device(layer: nn.Module) -> torch.device:
    """Where the layer computes: accelerate's execution device where it spreads the model, else the weight's device."""
    hook = getattr(layer, "_hf_hook", None)
    device = getattr(hook, "execution_device", None)
    return torch.device(device) if device is not None else layer.weight.device  # type: ignore[union-attr]
