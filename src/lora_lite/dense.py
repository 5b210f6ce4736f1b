"""Adapters as plain weights: the fp64 twin of a layer, and merging, which writes what the twin computes.

For an affine stack f, b' = f(0) and W' = (f(I) - f(0))^T. The twin evaluates the very modules that the forward pass
uses, in fp64, so no method needs merging code of its own.
"""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lora_lite.adapter import Adapter, adapters_on
from lora_lite.attach import drop, release, reset_compiler
from lora_lite.errors import NotAffineError, StateError, TargetError
from lora_lite.hooks import hook_layer, hook_root, unhook_layer
from lora_lite.linear import bias, computes_its_weight, dense, is_conv1d, is_linear, is_quantized, is_sharded, shape
from lora_lite.packing import quant_state
from lora_lite.quantization import forget_quantization
from lora_lite.state import State, adapters_of, refuse_merged, root_of

CHUNK = 1024  # columns of the identity per pass
AFFINE_TOLERANCE = 1e-8


@dataclass(frozen=True)
class Merged:
    """What merging one layer wrote, and how well it agrees.

    Attributes:
        rounding: ||stored W' - exact W'|| / ||exact W'||, the final rounding to the weight's dtype.
        error: ||merged(x) - adapted(x)|| / ||adapted(x)|| in the layer's dtype, on random inputs.
    """

    rounding: float
    error: float


def twin(layer: nn.Module) -> nn.Linear:
    """A copy of an adapted layer as an `nn.Linear` in fp64 on the CPU, with copies of its adapters.

    The copies share the coefficients of the originals. Only the CPU is sure to have fp64.
    """
    i, o = shape(layer)
    b = bias(layer)
    with torch.device("meta"):
        plain = nn.Linear(i, o, bias=b is not None, dtype=torch.float64)
    plain.weight = nn.Parameter(dense(layer).to("cpu", torch.float64), requires_grad=False)
    if b is not None:
        plain.bias = nn.Parameter(b.to("cpu", torch.float64), requires_grad=False)
    plain.lora = nn.ModuleDict()
    for name, adapter in layer.lora.items():  # type: ignore[union-attr, operator]
        plain.lora[name] = _in_fp64(adapter)
    with torch.no_grad():
        for adapter in adapters_on(plain):
            adapter.derive(plain)
    hook_layer(plain)
    return plain.eval()


def _in_fp64(adapter: Adapter) -> Adapter:
    shared = {id(adapter.dial): adapter.dial, id(adapter.cfg): adapter.cfg}
    twin_adapter = copy.deepcopy(adapter, shared)
    # Adapter._apply keeps the dtype on purpose; here it is to change.
    return nn.Module._apply(twin_adapter, lambda t: t.to("cpu", torch.float64 if t.is_floating_point() else t.dtype))  # type: ignore[return-value]


@torch.no_grad()
def affine(layer: nn.Module, path: str) -> tuple[Tensor, Tensor]:
    """(W' (o, i), b' (o)) in fp64 of an adapted layer: the plain weights that equal its whole stack.

    Raises:
        NotAffineError: a method of the stack says so, or it is found by measurement.
        StateError: a coefficient in force has one value per row.
    """
    for adapter in adapters_on(layer):
        if not adapter.affine:
            raise NotAffineError(f"{path}: {adapter.name} is not affine, so no plain weight equals it; detach it first")
        if adapter.dial.value.ndim:
            raise StateError(f"{path}: the coefficient has one value per row; leave that `scale` before merging")
    with torch.device("cpu"):
        return _probed(twin(layer), *shape(layer), path)


def _probed(f: nn.Linear, i: int, o: int, path: str) -> tuple[Tensor, Tensor]:
    zero = f(torch.zeros(1, i, dtype=torch.float64))
    columns = torch.empty(i, o, dtype=torch.float64)
    for start in range(0, i, CHUNK):
        stop = min(start + CHUNK, i)
        rows = torch.zeros(stop - start, i, dtype=torch.float64)
        rows[:, start:stop].fill_diagonal_(1.0)
        columns[start:stop] = f(rows) - zero
    x = torch.randn(4, i, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    exact, linear = f(x), x @ columns + zero
    if (exact - linear).norm() > AFFINE_TOLERANCE * exact.norm().clamp(min=torch.finfo(torch.float64).tiny):
        raise NotAffineError(
            f"{path}: its stack is not affine (measured on random inputs), so no plain weight equals it"
        )
    return columns.T.contiguous(), zero[0]


def adapted_layers(root: nn.Module, state: State) -> dict[str, nn.Module]:
    """Every layer that carries an adapter, by path, each target of the record checked to be there."""
    paths = dict.fromkeys(path for name in state.adapters for path in adapters_of(root, name))
    return {path: root.get_submodule(path) for path in paths}


def _refuse_unmergeable(root: nn.Module, layers: dict[str, nn.Module]) -> None:
    owners: dict[int, list[str]] = {}
    for key, parameter in root.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(key)
    for path, layer in layers.items():
        for tensor in (layer.weight, bias(layer) if layer.bias is None else layer.bias):
            if tensor is not None and len(names := owners.get(id(tensor), [])) > 1:
                raise TargetError(f"{path}: its weight is shared ({', '.join(names)}), so merging would change both")
            if "parametrizations" in layer._modules:
                raise TargetError(f"{path}: its weight is computed (parametrized); remove the parametrization first")
            if tensor is not None and is_sharded(tensor):  # type: ignore[arg-type]
                raise TargetError(f"{path}: its weight is sharded; gather the model before merging")


@dataclass(frozen=True)
class _Fold:
    """One layer's merged weights: W in the layer's own layout and the dtype it is to have, b or None; and what the
    adapted layer makes y of random x, to compare with."""

    W: Tensor
    b: Tensor | None
    rounding: float
    x: Tensor
    y: Tensor


def _fold(root: nn.Module, state: State) -> dict[str, _Fold]:
    layers = adapted_layers(root, state)
    _refuse_unmergeable(root, layers)
    folds: dict[str, _Fold] = {}
    for path, layer in layers.items():
        exact, b = affine(layer, path)
        dtype = merged_dtype(root, layer)
        x = _probe(layer, dtype)
        if not computes_its_weight(layer, x):
            raise TargetError(
                f"{path}: a {type(layer).__name__}, which computes something else than W x + b; detach it"
            )
        W = exact.to(dtype)
        if not (torch.isfinite(W).all() and torch.isfinite(b.to(dtype)).all()):
            raise StateError(f"{path}: its merged weights are not finite in {dtype}; look at the adapter's tensors")
        rounding = _relative(W.double(), exact)
        W = W.T if is_conv1d(layer) else W
        b_or_none = b.to(dtype) if bias(layer) is not None or b.any() else None
        folds[path] = _Fold(W.contiguous(), b_or_none, rounding, x, _eval_output(layer, x))
    return folds


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


def merged_weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights that `merge` would write, by state-dict key, without writing them.

    They have the base's dtype (for a quantised layer the one it computes in) and layout, on the CPU. A layer's bias is
    listed if it has one or needs one. Raises as `merge` does.
    """
    root, state = root_of(model)
    refuse_merged(state, "merged_weights")
    found: dict[str, Tensor] = {}
    for path, fold in _fold(root, state).items():
        found[f"{path}.weight"] = fold.W
        if fold.b is not None:
            found[f"{path}.bias"] = fold.b
    return found


@torch.no_grad()
def merge(model: nn.Module, keep: bool = True) -> dict[str, Merged]:
    """Fold each layer's whole stack, at the coefficients in force, into plain weights (the only writing to the base).

    A quantised layer is replaced by a plain `nn.Linear`; it is never quantised again.

    Args:
        model: the model.
        keep: keep the originals on the CPU for `unmerge`. False: drop them and the adapters for good; `train_also`
            weights stay as trained.
    Returns:
        path -> `Merged`, the measured rounding and disagreement.
    Raises:
        NotAffineError, TargetError, StateError: before anything is written.
    """
    root, state = root_of(model)
    refuse_merged(state, "merge")
    report: dict[str, Merged] = {}
    folds = _fold(root, state)
    try:
        for path, fold in folds.items():
            state.merged[path] = _write(root, path, root.get_submodule(path), fold)
            merged = _eval_output(root.get_submodule(path), fold.x)
            report[path] = Merged(fold.rounding, _relative(merged.double(), fold.y.double()))
    finally:
        if len(report) < len(folds):
            _restore(root, state)
    hook_root(root, False)
    if not keep:
        for name in list(state.adapters):
            del state.adapters[name]
            for module in list(root.modules()):
                drop(module, name)
        release(root, state)
        forget_quantization(root)
    reset_compiler()
    return report


@torch.no_grad()
def unmerge(model: nn.Module) -> None:
    """Restore the exact bits that `merge(keep=True)` replaced, and let the adapters act again.

    Raises `StateError` where nothing is merged.
    """
    root, state = root_of(model)
    if not state.merged:
        raise StateError("unmerge: nothing is merged (merge(keep=False) cannot be undone)")
    _restore(root, state)
    hook_root(root, True)
    reset_compiler()


def _restore(root: nn.Module, state: State) -> None:
    """Put back what `_write` replaced."""
    for path, (layer, W, b) in state.merged.items():
        if W is None:
            root.set_submodule(path, layer)
        else:
            layer.weight.copy_(W)
            if b is None:
                layer.bias = None
            else:
                layer.bias.copy_(b)
        hook_layer(layer)
    state.merged = {}


def _write(root: nn.Module, path: str, layer: nn.Module, fold: _Fold) -> tuple[nn.Module, Tensor | None, Tensor | None]:
    """Put the merged weights in place; returns (layer, its W, its b), or (layer, None, None) where it was replaced."""
    weight: nn.Parameter = layer.weight  # type: ignore[assignment]
    unhook_layer(layer)
    if is_quantized(layer):
        i, o = shape(layer)
        plain = nn.Linear(i, o, fold.b is not None, device=weight.device, dtype=fold.W.dtype)
        plain.weight.copy_(fold.W)
        if fold.b is not None:
            plain.bias.copy_(fold.b)
        root.set_submodule(path, plain.requires_grad_(False).train(layer.training))
        return layer, None, None
    W, b = weight.detach().to("cpu", copy=True), bias(layer)
    b = None if b is None else b.to("cpu", copy=True)
    weight.copy_(fold.W)
    if b is not None:
        layer.bias.copy_(fold.b)  # type: ignore[union-attr, operator]
    elif fold.b is not None:
        layer.bias = nn.Parameter(fold.b.to(weight.device), requires_grad=False)
    return layer, W, b


def _probe(layer: nn.Module, dtype: torch.dtype) -> Tensor:
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(8, shape(layer)[0], generator=rng, dtype=torch.float32, device="cpu")
    return x.to(layer.weight.device, dtype)  # type: ignore[arg-type, union-attr]


def _eval_output(layer: nn.Module, x: Tensor) -> Tensor:
    training = {module: module.training for module in layer.modules()}
    layer.eval()
    try:
        return layer(x).cpu()
    finally:
        for module, mode in training.items():
            module.training = mode


def _relative(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).norm() / exact.norm().clamp(min=torch.finfo(torch.float64).tiny))
