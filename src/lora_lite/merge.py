"""Merging: a layer's whole stack, or one adapter of it, is folded into plain weights."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_lite.adapter import Adapter, acting_on, adapters_on
from lora_lite.attach import drop, release, reset_compiler
from lora_lite.coefficient import scale
from lora_lite.dense import AFFINE_TOLERANCE, affine, probed, twin
from lora_lite.errors import NotAffineError, StateError, TargetError
from lora_lite.linear import bias, computes_its_weight, is_conv1d, is_linear, is_quantized, is_sharded, shape
from lora_lite.packing import quant_state
from lora_lite.quantization import forget_quantization
from lora_lite.state import State, adapters_of, refuse_merged, root_of
from lora_lite.transaction import Transaction

HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_always_called",
)


@dataclass(frozen=True)
class Merged:
    """What merging one layer wrote, and how well it agrees.

    Attributes:
        rounding: ||stored W' - exact W'|| / ||exact W'||, the final rounding to the weight's dtype.
        error: ||merged(x) - adapted(x)|| / ||adapted(x)|| in the layer's dtype, on random inputs.
    """

    rounding: float
    error: float


def adapted_layers(root: nn.Module, state: State, names: list[str]) -> dict[str, nn.Module]:
    """Every layer that carries one of the adapters, by path, each target of the record checked to be there."""
    paths = dict.fromkeys(path for name in names for path in adapters_of(root, name))
    return {path: root.get_submodule(path) for path in paths}


def _refuse_unmergeable(layers: dict[str, nn.Module]) -> None:
    for path, layer in layers.items():
        if "parametrizations" in layer._modules:
            raise TargetError(f"{path}: its weight is computed (parametrized); remove the parametrization first")
        for tensor in (layer.weight, bias(layer)):
            if tensor is not None and is_sharded(tensor):  # type: ignore[arg-type]
                raise TargetError(f"{path}: its weight is sharded; gather the model before merging")


def _tied(root: nn.Module) -> set[int]:
    """The parameters that several modules hold, by identity; one module under several names holds its own."""
    owners: dict[int, int] = {}
    for module in root.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    return {key for key, count in owners.items() if count > 1}


def _places(root: nn.Module, layer: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Where the layer lies: (its path, its parent, its name there), for each of its names."""
    for path, parent in root.named_modules(remove_duplicate=False):
        for key, child in parent._modules.items():
            if child is layer:
                yield (f"{path}.{key}" if path else key), parent, key


@dataclass(frozen=True)
class _Fold:
    """One layer's merged weights: W in the layer's own layout and the dtype it is to have, b or None; and what the
    adapted layer makes y of random x, to compare with."""

    W: Tensor
    b: Tensor | None
    rounding: float
    x: Tensor
    y: Tensor


def _fold(root: nn.Module, state: State, name: str | None) -> dict[str, _Fold]:
    names = list(state.adapters) if name is None else [name]
    layers = adapted_layers(root, state, names)
    _refuse_unmergeable(layers)
    others = [each for each in state.adapters if each not in names]
    folds: dict[str, _Fold] = {}
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
        rounding = _relative(W.double(), exact)
        W = W.T if is_conv1d(layer) else W
        b_or_none = b.to(dtype) if bias(layer) is not None or b.any() else None
        folds[path] = _Fold(W.contiguous(), b_or_none, rounding, x, _eval_output(layer, x))
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
            found = probed(rest, *shape(layer), path)
    if any(_relative(now, before) > AFFINE_TOLERANCE for now, before in zip(found, whole, strict=True)):
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


def merged_weights(model: nn.Module, name: str | None = None) -> dict[str, Tensor]:
    """The weights that `merge` would write, by state-dict key, without writing them.

    They have the base's dtype (for a quantised layer the one it computes in) and layout, on the CPU. A layer's bias is
    listed if it has one or needs one; one that has several names, under each. Raises as `merge` does.
    """
    root, state = root_of(model, name)
    refuse_merged(state, "merged_weights")
    found: dict[str, Tensor] = {}
    with Transaction(root):  # measuring runs layers in eval mode
        folds = _fold(root, state, name)
    for path, fold in folds.items():
        for place, _, _ in list(_places(root, root.get_submodule(path))) or [(path, root, "")]:
            found[f"{place}.weight"] = fold.W
            if fold.b is not None:
                found[f"{place}.bias"] = fold.b
    return found


@torch.no_grad()
def merge(model: nn.Module, keep: bool = True, name: str | None = None) -> dict[str, Merged]:
    """Fold each layer's whole stack, at the coefficients in force, into plain weights (the only writing to the base).

    A quantised layer is replaced by a plain `nn.Linear`; it is never quantised again. A weight that is tied to another
    module's (a head and an embedding) gets values of its own, and a config's `tie_word_embeddings` becomes False.

    Args:
        model: the model.
        keep: keep the originals on the CPU for `unmerge`. False: drop them and the adapters for good; `train_also`
            weights stay as trained.
        name: merge this adapter alone, where the others act the same on the merged weights. None: all.
    Returns:
        path -> `Merged`, the measured rounding and disagreement; a layer that has several names, under each.
    Raises:
        NotAffineError, TargetError, StateError: before anything is written. After any error (Ctrl-C among them) the
        model is as it was.
    """
    root, state = root_of(model, name)
    refuse_merged(state, "merge")
    names = list(state.adapters) if name is None else [name]
    with Transaction(root) as undo:
        folds, tied = _fold(root, state, name), _tied(root)
        report: dict[str, Merged] = {}
        for path, fold in folds.items():
            layer = root.get_submodule(path)
            state.merged[path] = _write(root, layer, fold, tied, undo)
            for each in names:
                if each in layer.lora:  # type: ignore[operator]
                    layer.lora[each].merged = True  # type: ignore[union-attr, operator, index]
            written = root.get_submodule(path)
            for adapter in acting_on(written):
                adapter.derive(written)
            error = _relative(_eval_output(written, fold.x).double(), fold.y.double())
            report |= {place: Merged(fold.rounding, error) for place, _, _ in _places(root, written)}
        if any(each.untied for each in state.merged.values()):
            _untie_configs(root, state, undo)
        if not keep:
            _forget(root, state, names)
        reset_compiler()
    return report


def _forget(root: nn.Module, state: State, names: list[str]) -> None:
    for name in names:
        del state.adapters[name]
        for module in list(root.modules()):
            drop(module, name)
    state.merged, state.untied = {}, []
    if not state.adapters:
        release(root, state)
    forget_quantization(root)


@torch.no_grad()
def unmerge(model: nn.Module) -> None:
    """Restore the exact bits that `merge(keep=True)` replaced, and let the adapters act again.

    Raises `StateError` where nothing is merged.
    """
    root, state = root_of(model)
    if not state.merged:
        raise StateError("unmerge: nothing is merged (merge(keep=False) cannot be undone)")
    with Transaction(root) as undo:
        for path, original in state.merged.items():
            _put_back(root, root.get_submodule(path), original, undo)
        for config in state.untied:
            undo.assign(config, "tie_word_embeddings", True)
        state.merged, state.untied = {}, []
        reset_compiler()


@dataclass
class Original:
    """What merging replaced of one layer: the layer itself, its parameters, and the bits of those written in place."""

    layer: nn.Module
    parameters: dict[str, nn.Parameter | None]
    values: dict[str, Tensor]
    untied: bool = False


def _put_back(root: nn.Module, written: nn.Module, original: Original, undo: Transaction) -> None:
    layer = original.layer
    if written is not layer:
        for _, parent, key in list(_places(root, written)):
            parent._modules[key] = layer
    layer._parameters.update(original.parameters)
    for key, value in original.values.items():
        undo.write(getattr(layer, key), value)
    for adapter in adapters_on(layer):
        inert, adapter.merged = adapter.merged, False
        if not inert:  # it acted on the merged weights
            adapter.derive(layer)


def _write(root: nn.Module, layer: nn.Module, fold: _Fold, tied: set[int], undo: Transaction) -> Original:
    """Put the merged weights in place; returns what they replaced."""
    weight: nn.Parameter = layer.weight  # type: ignore[assignment]
    if is_quantized(layer):
        _replace(root, layer, fold)
        return Original(layer, {}, {})
    parameters = {key: layer._parameters.get(key) for key in ("weight", "bias")}
    original = Original(layer, parameters, {})
    for key, value in (("weight", fold.W), ("bias", fold.b)):
        own = parameters[key]
        if value is None:
            continue
        if own is None or id(own) in tied:
            layer._parameters[key] = nn.Parameter(value.to(weight.device), requires_grad=False)
            original.untied |= own is not None
        else:
            original.values[key] = undo.write(own, value)
    return original


def _replace(root: nn.Module, layer: nn.Module, fold: _Fold) -> None:
    """Put a plain layer in the place of a quantised one, with its adapters and hooks (other tools' among them)."""
    i, o = shape(layer)
    plain = nn.Linear(i, o, fold.b is not None, device=layer.weight.device, dtype=fold.W.dtype)
    plain.weight.copy_(fold.W)
    if fold.b is not None:
        plain.bias.copy_(fold.b)
    plain.requires_grad_(False).train(layer.training)
    plain._modules["lora"] = layer._modules["lora"]
    for key in HOOKS:
        vars(plain)[key] = vars(layer)[key]
    for _, parent, key in list(_places(root, layer)):
        parent._modules[key] = plain


def _untie_configs(root: nn.Module, state: State, undo: Transaction) -> None:
    """Say in the configs that the weights are no longer tied, so that the model is saved and loaded with both."""
    for config in _configs(root):
        if getattr(config, "tie_word_embeddings", False) is True:
            undo.assign(config, "tie_word_embeddings", False)
            state.untied.append(config)


def _configs(root: nn.Module) -> list[Any]:
    own = [vars(module)["config"] for module in root.modules() if "config" in vars(module)]
    nested = [each for config in own for each in vars(config).values() if hasattr(each, "tie_word_embeddings")]
    return list({id(config): config for config in [*own, *nested]}.values())


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
