"""The layers that a file has adapters for, and these adapters, built from the file's tensors."""

from collections.abc import Mapping
from dataclasses import replace

from torch import nn

from lora_lite.adapter import Adapter, derive, full_precision
from lora_lite.errors import BaseMismatchError
from lora_lite.files.format import File, empty_adapter
from lora_lite.frozen_basis import rebuild
from lora_lite.layers.linear import dense, execution_device, is_linear, shape
from lora_lite.layers.targets import Target
from lora_lite.runtime.attach import commit
from lora_lite.runtime.readiness import check_layer, ready_state, taken_parameters
from lora_lite.runtime.state import State
from lora_lite.runtime.transaction import Transaction


def targets_of(root: nn.Module, state: State, file: File) -> list[Target]:
    """The layers that the file has adapters for, with these adapters; nothing is derived yet."""
    if not file.targets:
        raise file.error("has no targets")
    modules, taken = dict(root.named_modules()), taken_parameters(root, state)
    targets = [
        Target(path, _layer(modules.get(path), file, path, taken), dims, index, cfg)
        for path, (index, cfg, dims) in file.targets.items()
    ]
    return [replace(target, adapter=_build(file, target)) for target in targets]


def add_to_layer(root: nn.Module, file: File, path: str, name: str = "default") -> State:
    """Attach a file's adapter of one layer to a module that holds that layer alone; what the module then remembers.

    The base is not compared, and the file's `train_also` weights and running averages are left alone. Raises as `load`.
    """
    part, state = replace(file, targets={path: file.targets[path]}), ready_state(root, name)
    with Transaction(root):
        [target] = targets_of(root, state, part)
        derive(target.adapter, target.layer)
        commit(root, state, name, part.configs, [target], {})
    return state


def _layer(layer: nn.Module | None, file: File, path: str, taken: Mapping[int, tuple[str, str]]) -> nn.Module:
    if layer is None or not is_linear(layer):
        raise file.error(f"the model has no linear layer {path}; the file fits another architecture")
    if shape(layer) != file.targets[path][2]:
        raise file.error(
            f"{path} maps {shape(layer)} here, but {file.targets[path][2]} in the file: another architecture"
        )
    check_layer(path, layer, taken)
    return layer


def _build(file: File, target: Target) -> Adapter:
    path, layer = target.path, target.layer
    adapter = empty_adapter(file, path, target.cfg, *target.shape)
    own = {key: file.tensors.get(f"{path}.lora.{key}") for key in adapter.state_dict()}
    for key in () if file.basis else adapter.rebuildable:
        index, expected = (file.tensors[f"{path}.lora.{key}.{part}"] for part in ("index", "sketch"))
        try:
            with full_precision(layer.weight.device):  # type: ignore[union-attr, arg-type]
                own[key] = rebuild.rebuilt(dense(layer), index, expected).to(adapter.get_buffer(key).dtype)
        except ValueError as error:
            raise BaseMismatchError(f"{file.where}: {path}: {error}") from error
    adapter.load_state_dict(own, assign=True)
    return adapter.to(execution_device(layer))
