"""Merging: a layer's whole stack, or one adapter of it, is folded into plain weights."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lora_lite.adapter import acting_on, adapters_on
from lora_lite.errors import StateError
from lora_lite.layers.linear import is_quantized, shape
from lora_lite.layers.quantization import forget_quantization, remember_quantization
from lora_lite.merging.fold import Fold, eval_output, fold_layers, relative
from lora_lite.runtime.attach import drop, release, reset_compiler
from lora_lite.runtime.state import State, refuse_merged, root_of
from lora_lite.runtime.transaction import Transaction

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


def merged_weights(model: nn.Module, name: str | None = None) -> dict[str, Tensor]:
    """The weights that `merge` would write, by state-dict key, without writing them.

    They have the base's dtype (for a quantised layer the one it computes in) and layout, on the CPU. A layer's bias is
    listed if it has one or needs one; one that has several names, under each. Raises as `merge` does.
    """
    root, state = root_of(model, name)
    refuse_merged(state, "merged_weights")
    weights: dict[str, Tensor] = {}
    with Transaction(root):  # measuring runs layers in eval mode
        folds = fold_layers(root, state, name)
    for path, fold in folds.items():
        for place, _, _ in list(_places(root, root.get_submodule(path))) or [(path, root, "")]:
            weights[f"{place}.weight"] = fold.W
            if fold.b is not None:
                weights[f"{place}.bias"] = fold.b
    return weights


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
        folds, tied = fold_layers(root, state, name), _tied(root)
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
            error = relative(eval_output(written, fold.x).double(), fold.y.double())
            report |= {place: Merged(fold.rounding, error) for place, _, _ in _places(root, written)}
        if any(each.untied for each in state.merged.values()):
            _untie_configs(root, state, undo)
        state.forgotten = forget_quantization(root)
        undo.call(partial(remember_quantization, root, state.forgotten))
        if not keep:
            _forget(root, state, names)
        reset_compiler()
    return report


def _forget(root: nn.Module, state: State, names: list[str]) -> None:
    for name in names:
        del state.adapters[name]
        for module in list(root.modules()):
            drop(module, name)
    state.merged, state.untied, state.forgotten = {}, [], []
    if not state.adapters:
        release(root, state)


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
        undo.call(partial(forget_quantization, root))
        remember_quantization(root, state.forgotten)
        state.merged, state.untied, state.forgotten = {}, [], []
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


def _write(root: nn.Module, layer: nn.Module, fold: Fold, tied: set[int], undo: Transaction) -> Original:
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


def _replace(root: nn.Module, layer: nn.Module, fold: Fold) -> None:
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
