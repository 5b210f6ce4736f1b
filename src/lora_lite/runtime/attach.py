"""Attach adapters to a model, and take them off again."""

import sys
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from lora_lite.adapter import Adapter, derive, full_precision
from lora_lite.calibration.collector import calibrate
from lora_lite.calibration.processes import broadcast, meet
from lora_lite.calibration.statistics import generator
from lora_lite.config import AdapterConfig
from lora_lite.errors import CalibrationError, LoraLiteWarning, TargetError
from lora_lite.frozen_basis.basis import KINDS, Basis
from lora_lite.layers.linear import execution_device
from lora_lite.layers.packing import allow_packing, forbid_packing, packing_forbidden
from lora_lite.layers.targets import Selection, Target, left_out, left_out_words, uncovered
from lora_lite.linalg import factorising
from lora_lite.methods import methods
from lora_lite.registry import method_of
from lora_lite.runtime.attach_cost import AttachCost, peak_memory_mb
from lora_lite.runtime.attachment import Attachment, described, is_adapters_key
from lora_lite.runtime.base_values import moved_buffers, moving_buffers, sampled, unwritten
from lora_lite.runtime.hooks import hook_layer, hook_root
from lora_lite.runtime.readiness import ask_layer, ready_state, refuse_not_finite, select_targets, taken_parameters
from lora_lite.runtime.settings import Coefficient
from lora_lite.runtime.state import ROOT, Attached, State, refuse_merged, root_of, trained_also
from lora_lite.runtime.train_also import find_train_also, forget_originals
from lora_lite.runtime.transaction import Transaction


def attach(
    model: nn.Module,
    cfg: AdapterConfig | Sequence[AdapterConfig],
    calibration_data: Iterable[Any] | None = None,
    name: str = "default",
    train_also: Sequence[str] = (),
) -> Attachment:
    """Add adapters to the layers that `cfg` selects, freeze everything else, and change no output (law 2).

    Args:
        model: any module. Give the same one each time; compile, shard and wrap it afterwards.
        cfg: a config, or several with disjoint targets (such as IA3 and IA3-FF), kept under one name.
        calibration_data: batches for methods that need them (`methods()[...].needs(cfg)`): mappings (called as
            `model(**batch)`, padding masked by `attention_mask`), tuples or tensors. Ignored, with a note, otherwise.
        name: the adapter's name, `[A-Za-z_][A-Za-z0-9_-]*`.
        train_also: names of modules or parameters outside the adapters (a head, an embedding) to train as well, whole
            parts or regexes as in `target_names`. They are saved in the adapter's file and put back by `detach`; the
            coefficient does not reach them.

    Returns:
        The `Attachment`.

    Raises:
        TargetError: no target, or one that cannot carry an adapter.
        StateError: the name is taken or not allowed; the model is merged, wrapped, sharded or under inference mode; or
            another process of `torch.distributed` does not attach the same within five minutes.
        CalibrationError: calibration data that is missing, empty or too short.
        ValueError: a config that does not fit a layer's shape. After any error the model is as it was.
    """
    configs = [cfg] if isinstance(cfg, AdapterConfig) else list(cfg)
    state = ready_state(model, name)
    meet(name, configs)
    with Transaction(model) as undo:
        targets, selections = select_targets(model, state, configs)
        also = find_train_also(model, state, targets, train_also)
        cost = AttachCost()
        targets = _built(model, configs, targets, calibration_data, cost, undo)
        _warn_left_out(model, selections)
        return commit(model, state, name, configs, targets, also, cost, selections)


def _built(
    model: nn.Module,
    configs: Sequence[AdapterConfig],
    targets: list[Target],
    calibration_data: Iterable[Any] | None,
    cost: AttachCost,
    undo: Transaction,
) -> list[Target]:
    """The targets that `plan` keeps, with their finished adapters."""
    with cost("calibration"), packing_forbidden(model):
        targets = _calibrated(model, targets, calibration_data, cost)
    with cost("factorisation"):
        targets = _planned(configs, targets)
        progress = tqdm(targets, desc="building", unit="layer", leave=False, delay=1)
        adapters = [_build(target, undo) for target in progress]
        broadcast(adapters)
    with cost("build"):
        for target, adapter in zip(targets, adapters, strict=True):
            derive(adapter, target.layer)
    cost.peak_memory_mb = peak_memory_mb(targets[0].layer.weight.device)  # type: ignore[union-attr, arg-type]
    return [replace(target, adapter=adapter) for target, adapter in zip(targets, adapters, strict=True)]


def _calibrated(model: nn.Module, targets: list[Target], data: Iterable[Any] | None, cost: AttachCost) -> list[Target]:
    """The targets, each found fit to be read, with what their methods need to know of the data."""
    for target in targets:
        refuse_not_finite(target.path, target.layer)
        if method_of(target.cfg).reads_weight:
            ask_layer(target.path, target.layer)
    needs = {target.path: need for target in targets if (need := method_of(target.cfg).needs(target.cfg))}
    if data is not None and not needs:
        warnings.warn(_unused(), LoraLiteWarning, stacklevel=4)
    layers = {target.path: target.layer for target in targets if target.path in needs}
    stats, (cost.tokens, cost.statistics_bytes) = calibrate(model, layers, needs, data)
    return [replace(target, stats=stats.get(target.path)) for target in targets]


def _unused() -> str:
    needy = [name for name, cls in methods().items() if cls.needs(cls.Config())]
    bases = [kind for kind in KINDS if Basis(kind).needs]
    return (
        f"calibration_data was given, but nothing here uses it; methods that do: {', '.join(needy)}; S-space methods "
        f"do with basis= one of {', '.join(bases)}"
    )


def _warn_left_out(model: nn.Module, selections: Sequence[Selection]) -> None:
    """Warn of what gets no adapter though nobody said so."""
    if names := list(uncovered(model)):
        warnings.warn(
            f"fused 3-D weights stay without an adapter, since no layer is called for them: {', '.join(names[:4])}"
            f"{f' and {len(names) - 4} more' if len(names) > 4 else ''}",
            LoraLiteWarning,
            stacklevel=3,
        )
    if words := left_out_words(selections):
        warnings.warn(words, LoraLiteWarning, stacklevel=3)


def _planned(configs: Sequence[AdapterConfig], targets: Sequence[Target]) -> list[Target]:
    """The targets that their methods' `plan` keeps, with their own configs."""
    planned: dict[str, AdapterConfig] = {}
    for index, cfg in enumerate(configs):
        shapes = {target.path: target.shape for target in targets if target.index == index}
        stats = {target.path: target.stats for target in targets if target.index == index and target.stats is not None}
        part = method_of(cfg).plan(cfg, shapes, stats)
        if not part or not part.keys() <= shapes.keys():
            raise TargetError(
                f"{method_of(cfg).__name__}.plan must give configs to some of its {len(shapes)} layers and to no "
                f"others, but gave them to {sorted(part)[:3] or 'none'}"
            )
        planned |= part
    return [replace(target, cfg=planned[target.path]) for target in targets if target.path in planned]


def _build(target: Target, undo: Transaction) -> Adapter:
    """The adapter of a target, with its initial values; nothing is derived yet."""
    path, layer, method = target.path, target.layer, method_of(target.cfg)
    full = full_precision(layer.weight.device)  # type: ignore[union-attr, arg-type]
    with unwritten(f"{path}: {method.__name__}.init", layer, undo):
        try:
            with torch.no_grad(), torch.device("cpu"), full, factorising(path):
                adapter = method(target.cfg, *target.shape)  # type: ignore[call-arg]
                adapter.init(layer, target.stats, generator(target.cfg.seed, path))
                adapter.to(execution_device(layer))
        except CalibrationError as error:
            raise CalibrationError(f"{path}: {error}") from error
        except ValueError as error:
            raise TargetError(f"{path}: {error}") from error
    values = {key: value for key, value in adapter.state_dict().items() if not value.is_meta}
    if bad := [key for key, value in values.items() if not torch.isfinite(value).all()]:
        raise TargetError(
            f"{path}: {adapter.facts.name} got values of {bad[0]} that are not finite ({adapter.cfg.dtype}); look for "
            "NaN or infinite values in this layer's weight"
        )
    return adapter


def commit(
    model: nn.Module,
    state: State,
    name: str,
    configs: Sequence[AdapterConfig],
    targets: Sequence[Target],
    also: dict[str, nn.Parameter],
    cost: AttachCost | None = None,
    selections: Sequence[Selection] = (),
) -> Attachment:
    """Add finished adapters to their layers, within the caller's transaction."""
    originals = {key: parameter.detach().to("cpu", copy=True) for key, parameter in also.items()}
    if not state.adapters:
        _remember(model, state)
    trained = taken_parameters(model, state)  # by identity, for a tied parameter has several names
    for key, parameter in model.named_parameters():
        if not is_adapters_key(key, model) and id(parameter) not in trained:
            parameter.requires_grad_(False)
    for parameter in also.values():
        parameter.requires_grad_(True)
    coefficient = Coefficient(name, state)
    for target in targets:
        _add(target, name, coefficient)
    hook_root(model, True)
    indices = {target.path: target.index for target in targets}
    matched = {pattern: count for each in selections for pattern, count in each.matched.items()}
    state.adapters[name] = Attached(
        list(configs), coefficient, indices, originals, cost, matched, list(left_out(selections))
    )
    reset_compiler()
    return described(model, state, name)


def _remember(model: nn.Module, state: State) -> None:
    """Note how the model is before its first adapter."""
    model.__dict__[ROOT] = state
    state.requires_grad = {key: p.requires_grad for key, p in model.named_parameters()}
    state.packing = forbid_packing(model)
    state.samples = sampled(model)
    state.buffers = {key: b.detach().to("cpu", copy=True) for key, b in moving_buffers(model).items()}


def _add(target: Target, name: str, coefficient: Coefficient) -> None:
    layer, adapter = target.layer, target.adapter
    adapter.coefficient, adapter.path = coefficient, target.path
    adapter.train(layer.training)
    if "lora" not in layer._modules:
        layer.lora = nn.ModuleDict()
    layer.lora[name] = adapter  # type: ignore[operator, index]
    hook_layer(layer)


def detach(model: nn.Module, name: str | None = None) -> None:
    """Take off an adapter, or all (None): hooks, tensors and `train_also` changes.

    The last one restores every parameter's `requires_grad`. Raises `StateError` where there is nothing of that name, or
    while merged.
    """
    root, state = root_of(model, name)
    refuse_merged(state, "detach")
    with Transaction(root) as undo:
        for each in [name] if name is not None else list(state.adapters):
            parameters = trained_also(root, each)
            for key, original in state.adapters[each].originals.items():
                undo.write(parameters[key], original)
                parameters[key].requires_grad_(False)
            for module in list(root.modules()):
                drop(module, each)
            del state.adapters[each]
        if not state.adapters:
            for key, buffer in moved_buffers(root, state).items():
                undo.write(buffer, state.buffers[key])
            release(root, state)
        reset_compiler()


def drop(layer: nn.Module, name: str) -> None:
    """Remove the adapter `name` from a layer, if it has it."""
    store = layer._modules.get("lora")
    if isinstance(store, nn.ModuleDict) and name in store and isinstance(store[name], Adapter):
        del store[name]
        if len(store) == 0:
            del layer._modules["lora"]
        hook_layer(layer)


def release(root: nn.Module, state: State) -> None:
    """Forget the state of a root without adapters, and restore the flags of its parameters and 4-bit layers."""
    hook_root(root, False)
    allow_packing(root, state.packing)
    forget_originals(root)
    for key, parameter in root.named_parameters():
        if key in state.requires_grad and (parameter.is_floating_point() or parameter.is_complex()):
            parameter.requires_grad_(state.requires_grad[key])
    del root.__dict__[ROOT]


def reset_compiler() -> None:
    """Let compiled code see the change: torch ignores hooks that come or go after compilation."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
