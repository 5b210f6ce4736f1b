"""Which layers get an adapter, and what stands in its way: each reason is an error before anything is done."""

import re
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from lora_lite.adapter import Adapter, adapters_on
from lora_lite.calibration.statistics import generator
from lora_lite.config import AdapterConfig
from lora_lite.errors import LoraLiteError, StateError, TargetError
from lora_lite.layers.linear import (
    computes_its_weight,
    dense,
    execution_device,
    is_plain,
    is_read_uncalled,
    is_sharded,
    shape,
)
from lora_lite.layers.targets import Selection, Target, selection
from lora_lite.registry import method_of
from lora_lite.runtime.state import State, find_root, refuse_merged, trained_also

ADAPTER_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*")
WRAPPERS = ("OptimizedModule", "DistributedDataParallel", "DataParallel", "FullyShardedDataParallel", "FSDPModule")


def ready_state(model: nn.Module, name: str) -> State:
    """What a model remembers that can take an adapter of that name; a new state where nothing is attached yet.

    Raises:
        StateError: it cannot take one; the message says why.
    """
    if not ADAPTER_NAME.fullmatch(name) or hasattr(nn.ModuleDict(), name):
        raise StateError(
            f"adapter name {name!r}: must match {ADAPTER_NAME.pattern} and be no attribute of nn.ModuleDict"
        )
    if torch.is_inference_mode_enabled() or any(p.is_inference() for p in model.parameters()):
        raise StateError("the model is under torch.inference_mode, where nothing can be trained; leave it first")
    for path, module in model.named_modules():
        if any(cls.__name__ in WRAPPERS for cls in type(module).__mro__):
            raise StateError(
                f"{path or 'the model'} is a {type(module).__name__}: attach first, then wrap or shard (or compile) it"
            )
    if sharded := next((key for key, p in model.named_parameters() if is_sharded(p)), None):
        raise StateError(f"{sharded} is sharded: attach first, then shard (gradients would not be reduced)")
    found = find_root(model)
    if found is None:
        if any(isinstance(module, Adapter) for module in model.modules()):
            raise StateError("this module lies within one that has adapters: attach to that one")
        return State()
    root, state = found
    if root is not model:
        raise StateError(
            f"adapters are attached to the {type(root).__name__} within this model: pass the same module each time"
        )
    refuse_merged(state, "attach")
    if name in state.adapters:
        raise StateError(f"an adapter named {name!r} is attached already; detach it or choose another name")
    return state


def select_targets(
    model: nn.Module, state: State, configs: Sequence[AdapterConfig]
) -> tuple[list[Target], list[Selection]]:
    """The targets of all configs, and what each config selects. Raises `TargetError` where they overlap."""
    if not configs:
        raise ValueError("attach needs at least one config")
    for cfg in configs:
        method_of(cfg)
    targets: dict[str, Target] = {}
    taken = taken_parameters(model, state)
    selections = [selection(model, cfg) for cfg in configs]
    for index, (cfg, each) in enumerate(zip(configs, selections, strict=True)):
        for path, layer in each.layers.items():
            if path in targets:
                raise TargetError(
                    f"{path} is selected by configs {targets[path].index} and {index}; make them disjoint"
                )
            check_layer(path, layer, taken)
            targets[path] = Target(path, layer, shape(layer), index, cfg)
    for path in targets:
        parts = path.split(".")
        above = [parent for n in range(1, len(parts)) if (parent := ".".join(parts[:n])) in targets]
        if above:
            raise TargetError(
                f"{path} lies within {above[0]}, so one weight would be adapted twice (is the model wrapped by peft? "
                "then unload it first); leave one out with exclude_names"
            )
    return list(targets.values()), selections


def taken_parameters(root: nn.Module, state: State) -> dict[int, tuple[str, str]]:
    """The base parameters that adapters train (`train_also`), by identity: (adapter, parameter name)."""
    return {id(p): (name, key) for name in state.adapters for key, p in trained_also(root, name).items()}


def check_layer(path: str, layer: nn.Module, taken: Mapping[int, tuple[str, str]]) -> None:
    """Refuse a layer that cannot carry an adapter; `taken` as `taken_parameters` gives it."""
    if layer.weight.is_meta:
        raise TargetError(
            f"{path}: its weight is on the meta device (offloaded, or never loaded); keep targets in memory, or leave "
            "this layer out with layers or exclude_names"
        )
    if is_read_uncalled(layer):
        raise TargetError(
            f"{path}: nn.MultiheadAttention reads its weight without calling it, so an adapter on it would never act; "
            "leave it out with exclude_names"
        )
    for parameter in layer.parameters(recurse=False):
        if id(parameter) in taken:
            name, key = taken[id(parameter)]
            raise TargetError(f"{path}: adapter {name!r} trains {key} (train_also), so nothing can be built on it")
    store = layer._modules.get("lora", getattr(layer, "lora", None))
    if store is not None and not (isinstance(store, nn.ModuleDict) and len(adapters_on(layer)) == len(store)):
        raise TargetError(f"{path}: has an attribute 'lora' of its own; leave it out with exclude_names")


def refuse_not_finite(path: str, layer: nn.Module) -> None:
    """Refuse a layer whose weight or bias holds NaN or infinite values; quantised weights are not looked into."""
    for key, p in layer.named_parameters(recurse=False):
        if is_plain(p) and not torch.isfinite(p.detach().sum(dtype=torch.promote_types(p.dtype, torch.float32))):
            raise TargetError(f"{path}: its {key} holds NaN or infinite values, so no adapter can be trained on it")


def ask_layer(path: str, layer: nn.Module) -> None:
    """Refuse a layer whose output is not that of the weight that a method would read; asked with one random row."""
    weight: torch.Tensor = layer.weight  # type: ignore[assignment]
    device = execution_device(layer)
    if hasattr(layer, "_hf_hook") or device != weight.device:
        return  # its own forward is wrapped, or its weight is elsewhere
    dtype = weight.dtype if weight.dtype.is_floating_point and weight.dtype.itemsize > 1 else torch.float32
    x = torch.randn(1, shape(layer)[0], generator=generator(0, path), dtype=torch.float32, device="cpu")
    try:
        computes = computes_its_weight(layer, x.to(device, dtype))
    except LoraLiteError:  # some are a RuntimeError or ValueError as well
        raise
    except (RuntimeError, ValueError, TypeError, IndexError, AssertionError, ImportError):
        return  # it takes other inputs than one row, or its kernel is not here
    if not computes:
        if not torch.isfinite(dense(layer, torch.promote_types(dtype, torch.float32))).all():  # 8 bits have no isfinite
            raise TargetError(f"{path}: its weight holds NaN or infinite values, so no method that reads it can start")
        raise TargetError(
            f"{path}: this {type(layer).__name__} computes something else than W x + b for the weight that it holds, "
            "so a method that reads W is wrong here; leave it out with exclude_names, or use one that does not (lora)"
        )
