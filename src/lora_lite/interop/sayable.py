"""What a peft folder can say of a model: what cannot be said is refused before anything is written."""

import torch
from torch import nn

from lora_lite.errors import CheckpointError, StateError
from lora_lite.files.base_check import refuse_lost
from lora_lite.merging.fold import adapted_layers
from lora_lite.runtime.base_values import moved_buffers
from lora_lite.runtime.state import State, adapters_of, trained_also

WRAPPERS = {"module", "_orig_mod"}  # of data parallelism and torch.compile


def refuse_unsayable(model: nn.Module, root: nn.Module, state: State, names: list[str]) -> None:
    """Raise `StateError` or `CheckpointError` where the folder would load as another function than the model's."""
    refuse_lost(root, state)
    inside = next(path for path, module in model.named_modules() if module is root)
    if set(inside.split(".")) - WRAPPERS - {""}:
        raise StateError(
            f"export_peft: the adapters are attached to {inside} within this {type(model).__name__}, and peft names "
            f"layers from the outermost model on; attach to the {type(model).__name__}, or export its {inside}"
        )
    if moved := list(moved_buffers(root, state)):
        raise StateError(
            f"export_peft: training moved running averages ({moved[0]}), which a peft folder has no place for; merge "
            "(ll.merge) and save the whole model"
        )
    for other in state.adapters.keys() - set(names):
        originals = state.adapters[other].originals
        changed = [
            key for key, p in trained_also(root, other).items() if not torch.equal(p.detach().cpu(), originals[key])
        ]
        if changed:
            raise StateError(
                f"export_peft: adapter {other!r} trained {changed[0]} as well (train_also), so {names[0]!r} alone is "
                "not what this model computes; detach the other, or export all (name=None)"
            )
    layers = adapted_layers(root, state, names)
    known: dict[int, list[str]] = {}
    for path, module in root.named_modules(remove_duplicate=False):
        known.setdefault(id(module), []).append(path)
    for path, layer in layers.items():
        if len(known[id(layer)]) > 1:
            raise CheckpointError(
                f"export_peft: the layer {path} is used under {len(known[id(layer)])} names "
                f"({', '.join(known[id(layer)][:3])}), which peft would adapt apart; merge (ll.merge) instead"
            )


def whole_modules(root: nn.Module, names: list[str]) -> tuple[list[str], list[str]]:
    """The modules that hold `train_also` weights, and those that hold the same (tied) weights under another name.

    Raises `CheckpointError` for one that peft cannot save: the model itself, or one around adapted layers.
    """
    holders: dict[int, list[str]] = {}
    for key, parameter in root.named_parameters(remove_duplicate=False):
        holders.setdefault(id(parameter), []).append(key.rpartition(".")[0])
    modules: dict[str, None] = {}
    tied: dict[str, None] = {}
    for name in names:
        for key, parameter in trained_also(root, name).items():
            modules[key.rpartition(".")[0]] = None
            tied |= dict.fromkeys(holders[id(parameter)])
    paths = {path for name in names for path in adapters_of(root, name)}
    for path in modules:
        if not path or any(each == path or each.startswith(f"{path}.") for each in paths):
            raise CheckpointError(
                f"export_peft: {path or 'the model'} holds weights that are trained as well, and adapted layers; peft "
                "saves whole modules alone (train the parameters of a module without adapters, or merge)"
            )
    return list(modules), [path for path in tied if path not in modules]
