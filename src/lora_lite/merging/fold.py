"""A layer's whole stack, or one adapter of it, as plain weights in the dtype that the layer is to have."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lora_lite.adapter import Adapter, adapters_on
from lora_lite.batches import eval_mode
from lora_lite.errors import NotAffineError, StateError, TargetError
from lora_lite.layers.linear import bias, computes_its_weight, is_conv1d, is_linear, is_quantized, is_sharded, shape
from lora_lite.layers.packing import quant_state
from lora_lite.merging.plain_weights import AFFINE_TOLERANCE, affine, probed, twin
from lora_lite.runtime.coefficient import scale
from lora_lite.runtime.state import State, adapters_of


@dataclass(frozen=True)
class Fold:
    """One layer's merged weights: W in the layer's own layout and the dtype it is to have, b or None; and what the
    adapted layer makes y of random x, to compare with."""

    W: Tensor
    b: Tensor | None
    rounding: float
    x: Tensor
    y: Tensor


def fold_layers(root: nn.Module, state: State, name: str | None) -> dict[str, Fold]:
    """The merged weights of every layer that carries an adapter (or the one of that name), by path; nothing is written.

    Raises:
        NotAffineError, TargetError, StateError: a layer that no plain weights equal, or that cannot take them.
    """
    names = list(state.adapters) if name is None else [name]
    layers = adapted_layers(root, state, names)
    _refuse_unmergeable(layers)
    others = [each for each in state.adapters if each not in names]
    folds: dict[str, Fold] = {}
    for path, layer in layers.items():
        with scale(root, dict.fromkeys(others, 0.0)):
            exact, b = affine(layer, path)
        if any(each in others for each in layer.lora):  # type: ignore[union-attr, operator]
            _refuse_other_acts(root, others, layer, path, names[0], exact, b)
        dtype = merged_dtype(root, layer)
        x = _probe(layer, dtype)
        if not computes_its_weight(layer, x):
            raise TargetError(
                f"{path}: a {type(layer).__name__}, which computes something else than W x + b; detach it"
            )
        W = exact.to(dtype)
        if not (torch.isfinite(W).all() and torch.isfinite(b.to(dtype)).all()):
            raise StateError(f"{path}: its merged weights are not finite in {dtype}; look at the adapter's tensors")
        rounding = relative(W.double(), exact)
        W = W.T if is_conv1d(layer) else W
        b_or_none = b.to(dtype) if bias(layer) is not None or b.any() else None
        folds[path] = Fold(W.contiguous(), b_or_none, rounding, x, eval_output(layer, x))
    return folds


@torch.no_grad()
def _refuse_other_acts(
    root: nn.Module, others: list[str], layer: nn.Module, path: str, name: str, W: Tensor, b: Tensor
) -> None:
    """Refuse to merge one adapter of a stack where the others would act in another way on the merged weights W, b.

    Measured in fp64 with the others at coefficient 1: one at 0 would hide it.
    """
    with scale(root, dict.fromkeys(others, 1.0)):
        whole = affine(layer, path)
        rest = twin(layer)
        del rest.lora[name]  # type: ignore[union-attr, operator]
        rest.weight = nn.Parameter(W, requires_grad=False)
        rest.bias = nn.Parameter(b, requires_grad=False)
        for adapter in adapters_on(rest):
            adapter.derive(rest)
        with torch.device("cpu"):
            merged = probed(rest, *shape(layer), path)
    if any(relative(now, before) > AFFINE_TOLERANCE for now, before in zip(merged, whole, strict=True)):
        acting = ", ".join(each for each in layer.lora if each != name)  # type: ignore[union-attr, operator]
        raise NotAffineError(
            f"{path}: {acting} would act in another way on weights that {name!r} is merged into (measured), so the "
            "outputs would change; merge the whole stack, or detach the others first"
        )


def merged_dtype(root: nn.Module, layer: nn.Module) -> torch.dtype:
    """The dtype of a layer's merged weight: its own, or for a quantised layer the one the model computes in."""
    if not is_quantized(layer):
        return layer.weight.dtype  # type: ignore[union-attr, return-value]
    # Not the layer's compute_dtype: it returns what it computes in that in the dtype of its input.
    modules = list(root.modules())
    others = [m for m in modules if not isinstance(m, Adapter) and not (is_linear(m) and is_quantized(m))]
    floating = (p.dtype for m in others for p in m.parameters(recurse=False) if p.is_floating_point())
    stored = getattr(quant_state(layer), "dtype", None) or getattr(layer, "compute_dtype", None)
    return next(floating, stored or torch.float32)


def adapted_layers(root: nn.Module, state: State, names: list[str]) -> dict[str, nn.Module]:
    """Every layer that carries one of the adapters, by path, each target of the record checked to be there."""
    paths = dict.fromkeys(path for name in names for path in adapters_of(root, name))
    return {path: root.get_submodule(path) for path in paths}


def _refuse_unmergeable(layers: dict[str, nn.Module]) -> None:
    for path, layer in layers.items():
        old = "weight" not in layer._parameters and not is_quantized(layer)  # torch.nn.utils.weight_norm
        if old or "parametrizations" in layer._modules:
            raise TargetError(f"{path}: its weight is computed (parametrized); remove the parametrization first")
        for tensor in (layer.weight, bias(layer)):
            if tensor is not None and is_sharded(tensor):  # type: ignore[arg-type]
                raise TargetError(f"{path}: its weight is sharded; gather the model before merging")


def _probe(layer: nn.Module, dtype: torch.dtype) -> Tensor:
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(8, shape(layer)[0], generator=rng, dtype=torch.float32, device="cpu")
    return x.to(layer.weight.device, dtype)  # type: ignore[arg-type, union-attr]


def eval_output(layer: nn.Module, x: Tensor) -> Tensor:
    """What the layer makes of x in eval mode, on the CPU; its mode is left as it was."""
    with eval_mode(layer):
        return layer(x).cpu()


def relative(value: Tensor, exact: Tensor) -> float:
    """||value - exact|| / ||exact||."""
    return float((value - exact).norm() / exact.norm().clamp(min=torch.finfo(torch.float64).tiny))
