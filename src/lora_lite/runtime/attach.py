"""Attach adapters to a model, and take them off again."""

import sys
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lora_lite.adapter import Adapter, derive, full_precision
from lora_lite.calibration.collector import calibrate
from lora_lite.calibration.processes import broadcast, meet
from lora_lite.calibration.statistics import Statistics, generator
from lora_lite.config import AdapterConfig
from lora_lite.errors import CalibrationError, LoraLiteWarning, TargetError
from lora_lite.frozen_basis.basis import KINDS, Basis
from lora_lite.layers.linear import execution_device, shape
from lora_lite.layers.packing import allow_packing, forbid_packing, packing_forbidden
from lora_lite.layers.targets import Selection, left_out, left_out_words, selection, uncovered
from lora_lite.linalg import factorising
from lora_lite.registry import method_of, methods
from lora_lite.runtime.attach_cost import AttachCost, peak_memory_mb
from lora_lite.runtime.attachment import Attachment, attachment, is_adapters_key
from lora_lite.runtime.base_values import moved_buffers, moving_buffers, same_bits, sampled
from lora_lite.runtime.hooks import hook_layer, hook_root
from lora_lite.runtime.readiness import ask_layer, check_layer, refuse_not_finite, refuse_unready, taken_parameters
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
    refuse_unready(model, name)
    meet(name, configs)
    with Transaction(model) as undo:
        return _attach(model, configs, calibration_data, name, train_also, undo)


def _attach(
    model: nn.Module,
    configs: list[AdapterConfig],
    calibration_data: Iterable[Any] | None,
    name: str,
    train_also: Sequence[str],
    undo: Transaction,
) -> Attachment:
    targets, selections = select_all(model, configs)
    also = find_train_also(model, targets, train_also)
    layers = {path: layer for path, (layer, _) in targets.items()}
    needs = {path: method_of(configs[index]).needs(configs[index]) for path, (_, index) in targets.items()}
    cost = AttachCost()
    with cost("calibration"), packing_forbidden(model):
        for path, (layer, index) in targets.items():
            refuse_not_finite(path, layer)
            if method_of(configs[index]).reads_weight:
                ask_layer(path, layer)
        needy = {path: layers[path] for path, need in needs.items() if need}
        if calibration_data is not None and not needy:
            warnings.warn(_unused(), LoraLiteWarning, stacklevel=3)
        stats, (cost.tokens, cost.statistics_bytes) = calibrate(model, needy, needs, calibration_data)
    with cost("factorisation"):
        planned = _plan(configs, targets, stats)
        paths = tqdm(planned, desc="building", unit="layer", leave=False, delay=1)
        built = {path: _build(planned[path], path, layers[path], stats.get(path), undo) for path in paths}
        broadcast(built)
    with cost("build"):
        for path, adapter in built.items():
            derive(adapter, layers[path])
    cost.peak_memory_mb = peak_memory_mb(next(iter(layers.values())).weight.device)  # type: ignore[union-attr, arg-type]
    indices = {path: index for path, (_, index) in targets.items() if path in built}
    if missing := uncovered(model):
        _warn_uncovered(missing)
    if words := left_out_words(selections):
        warnings.warn(words, LoraLiteWarning, stacklevel=2)
    pairs = {path: (layers[path], adapter) for path, adapter in built.items()}
    commit(model, configs, name, pairs, indices, also, cost)
    attached = model.__dict__[ROOT].adapters[name]
    attached.matched = {pattern: count for each in selections for pattern, count in each.matched.items()}
    attached.left_out = list(left_out(selections))
    return attachment(model, name)


def _unused() -> str:
    needy = [name for name, cls in methods().items() if cls.needs(cls.Config())]
    bases = [kind for kind in KINDS if Basis(kind).needs]
    return (
        f"calibration_data was given, but nothing here uses it; methods that do: {', '.join(needy)}; S-space methods "
        f"do with basis= one of {', '.join(bases)}"
    )


def _warn_uncovered(missing: dict[str, int]) -> None:
    names = list(missing)
    warnings.warn(
        f"fused 3-D weights stay without an adapter, since no layer is called for them: {', '.join(names[:4])}"
        f"{f' and {len(names) - 4} more' if len(names) > 4 else ''}",
        LoraLiteWarning,
        stacklevel=3,
    )


def select_all(
    model: nn.Module, configs: Sequence[AdapterConfig]
) -> tuple[dict[str, tuple[nn.Module, int]], list[Selection]]:
    """The targets of all configs, path -> (layer, index of its config), and what each config selects.

    Raises `TargetError` where they overlap.
    """
    if not configs:
        raise ValueError("attach needs at least one config")
    targets: dict[str, tuple[nn.Module, int]] = {}
    taken = taken_parameters(model)
    for cfg in configs:
        method_of(cfg)
    selections = [selection(model, cfg) for cfg in configs]
    for index, each in enumerate(selections):
        for path, layer in each.layers.items():
            if path in targets:
                raise TargetError(f"{path} is selected by configs {targets[path][1]} and {index}; make them disjoint")
            check_layer(path, layer, taken)
            targets[path] = (layer, index)
    for path in targets:
        parts = path.split(".")
        above = [parent for n in range(1, len(parts)) if (parent := ".".join(parts[:n])) in targets]
        if above:
            raise TargetError(
                f"{path} lies within {above[0]}, so one weight would be adapted twice (is the model wrapped by peft? "
                "then unload it first); leave one out with exclude_names"
            )
    return targets, selections


def _plan(
    configs: Sequence[AdapterConfig], targets: dict[str, tuple[nn.Module, int]], stats: dict[str, Statistics]
) -> dict[str, AdapterConfig]:
    planned: dict[str, AdapterConfig] = {}
    for index, cfg in enumerate(configs):
        shapes = {path: shape(layer) for path, (layer, of) in targets.items() if of == index}
        part = method_of(cfg).plan(cfg, shapes, {path: stats[path] for path in shapes if path in stats})
        if not part or not part.keys() <= shapes.keys():
            raise TargetError(
                f"{method_of(cfg).__name__}.plan must give configs to some of its {len(shapes)} layers and to no "
                f"others, but gave them to {sorted(part)[:3] or 'none'}"
            )
        planned |= part
    return {path: planned[path] for path in targets if path in planned}


def _build(cfg: AdapterConfig, path: str, layer: nn.Module, stats: Statistics | None, undo: Transaction) -> Adapter:
    method = method_of(cfg)
    own = {key: p.data for key, p in layer.named_parameters(recurse=False) if type(p.data) is Tensor and not p.is_meta}
    bits = [(key, data, data.clone()) for key, data in own.items()]
    try:
        full = full_precision(layer.weight.device)  # type: ignore[union-attr, arg-type]
        with torch.no_grad(), torch.device("cpu"), full, factorising(path):
            adapter = method_of(cfg)(cfg, *shape(layer))  # type: ignore[call-arg]
            adapter.init(layer, stats, generator(cfg.seed, path))
            adapter.to(execution_device(layer))
    except CalibrationError as error:
        raise CalibrationError(f"{path}: {error}") from error
    except ValueError as error:
        raise TargetError(f"{path}: {error}") from error
    finally:
        written = [key for key, data, before in bits if not same_bits(data, before)]
        for key, data, before in bits:
            if key in written:
                undo.write(data, before)
    if written:
        raise TargetError(f"{path}: {method.__name__}.init wrote the base's {written[0]}; it may only read the layer")
    values = {key: value for key, value in adapter.state_dict().items() if not value.is_meta}
    if bad := [key for key, value in values.items() if not torch.isfinite(value).all()]:
        raise TargetError(
            f"{path}: {adapter.facts.name} got values of {bad[0]} that are not finite ({adapter.cfg.dtype}); look for "
            "NaN or infinite values in this layer's weight"
        )
    return adapter


def commit(
    model: nn.Module,
    configs: Sequence[AdapterConfig],
    name: str,
    built: dict[str, tuple[nn.Module, Adapter]],
    indices: dict[str, int],
    also: dict[str, nn.Parameter],
    cost: AttachCost | None = None,
) -> Attachment:
    """Add finished adapters to their layers, within the caller's transaction."""
    originals = {key: parameter.detach().to("cpu", copy=True) for key, parameter in also.items()}
    state: State = model.__dict__.setdefault(ROOT, State())
    if not state.adapters:
        state.requires_grad = {key: p.requires_grad for key, p in model.named_parameters()}
        state.packing = forbid_packing(model)
        state.samples = sampled(model)
        state.buffers = {key: b.detach().to("cpu", copy=True) for key, b in moving_buffers(model).items()}
    # By identity, for a tied parameter has several names.
    trained = {id(model.get_parameter(key)) for attached in state.adapters.values() for key in attached.originals}
    for key, parameter in model.named_parameters():
        if not is_adapters_key(key, model) and id(parameter) not in trained:
            parameter.requires_grad_(False)
    for parameter in also.values():
        parameter.requires_grad_(True)
    coefficient = Coefficient(name, state)
    for path, (layer, adapter) in built.items():
        adapter.coefficient, adapter.path = coefficient, path
        adapter.train(layer.training)
        if "lora" not in layer._modules:
            layer.lora = nn.ModuleDict()
        layer.lora[name] = adapter  # type: ignore[operator, index]
        hook_layer(layer)
    hook_root(model, True)
    state.adapters[name] = Attached(list(configs), coefficient, indices, originals, cost)
    reset_compiler()
    return attachment(model, name)


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
