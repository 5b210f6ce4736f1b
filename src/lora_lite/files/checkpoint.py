"""Save adapters, and load them: what a file holds against the model at hand."""

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from lora_lite.adapter import Adapter, derive, full_precision
from lora_lite.errors import CheckpointError, NotAFileError, StateError, TargetError
from lora_lite.files.atomic import expanded, file_status, write_atomically
from lora_lite.files.base_check import base_name, refuse_another_base, refuse_lost, samples, sketch
from lora_lite.files.file_targets import targets_of
from lora_lite.files.format import FORMAT, METADATA_KEY, File, Room, checksum, read
from lora_lite.files.hub import is_hub, local, publish
from lora_lite.frozen_basis import rebuild
from lora_lite.layers.linear import dense, is_linear, shape
from lora_lite.layers.targets import Target
from lora_lite.registry import method_of
from lora_lite.runtime.attach import commit
from lora_lite.runtime.attachment import Attachment, described, is_adapters_key
from lora_lite.runtime.base_values import moved_buffers, moving_buffers, same_bits
from lora_lite.runtime.readiness import ready_state
from lora_lite.runtime.state import State, adapters_of, find_root, refuse_merged, root_of, trained_also
from lora_lite.runtime.train_also import find_train_also
from lora_lite.runtime.transaction import Transaction
from lora_lite.version import __version__


def save(model: nn.Module, path: str | os.PathLike[str], name: str = "default", basis: bool = True) -> Path:
    """Write an adapter to one file: tensors (trained and frozen), `train_also` weights, running averages that training
    moved (of batch norms), configs, a sketch of the base.

    The file appears whole or not at all; an existing one is replaced and keeps its mode. Missing folders are made.

    Args:
        model: the model.
        path: the file, by custom `....safetensors`; "~" is the home folder, and a link's target is what is replaced.
            "hf://user/name": a repository on the hub, with a card; a new one is private.
        name: the adapter.
        basis: False leaves out frozen bases that are singular directions of the base's weights (svd, wanda; most of
            the file). `load` then rebuilds and verifies them, and refuses where it finds others: in another base,
            another dtype or quantisation, or where singular values are too close to tell their directions apart.

    Returns:
        The path, which `load` takes.

    Raises:
        StateError: no such adapter, a target that was replaced since attach, or merged; or a parameter that requires a
            gradient and belongs to no adapter, so that what it learns would be lost.
        CheckpointError: a tensor that is not finite, more than `load` would read, a path that is a folder, a device or
            a pipe, `basis=False` for a basis that the weights do not determine; or what stands in the hub's way.
    """
    if is_hub(path):
        return publish(path, lambda file: save(model, file, name, basis))
    (root, state), where = root_of(model, name), expanded(path)
    refuse_merged(state, "save")
    if where.is_dir():
        raise CheckpointError(f"{where} is a folder; give a file, e.g. {where / 'adapter.safetensors'}")
    try:
        file_status(where)
    except NotAFileError as error:
        raise CheckpointError(f"save: {error}") from error
    refuse_lost(root, state)
    header, tensors = _contents(root, state, name, basis)
    if bad := [key for key in tensors if not torch.isfinite(tensors[key]).all()]:
        raise CheckpointError(f"save: {bad[0]} is not finite (of {len(bad)} such tensors); nothing was written")
    header["checksum"] = checksum(header, tensors)
    # One metadata key: safetensors does not keep the order of several, and equal adapters should give equal files.
    data = to_bytes(tensors, {METADATA_KEY: json.dumps(header)})
    room_for(root).check(where, data, header, tensors)
    write_atomically(where, data)
    return where


def _contents(root: nn.Module, state: State, name: str, basis: bool) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The metadata (without checksum) and the tensors, on the CPU, of an adapter's file."""
    attached, adapters, also = state.adapters[name], adapters_of(root, name), trained_also(root, name)
    tensors: dict[str, Tensor] = {}
    targets: dict[str, Any] = {}
    for target, adapter in adapters.items():
        layer = root.get_submodule(target)
        shared = attached.configs[attached.targets[target]].to_dict()
        changes = {key: value for key, value in adapter.cfg.to_dict().items() if value != shared[key]}
        targets[target] = {"config": attached.targets[target], "changes": changes, "shape": list(shape(layer))}
        tensors |= {f"{target}.lora.{key}": value for key, value in _stored(adapter, layer, target, basis).items()}
        tensors[f"{target}.sketch"] = sketch(layer, target)
    base, moved = samples(root, state, adapters, also), moved_buffers(root, state)
    tensors |= {f"also.{key}": parameter for key, parameter in also.items()}
    # Counters too as floats: exact up to 2^53, and no other kind of tensor in a file.
    tensors |= {f"buffer.{key}": b if b.is_floating_point() else b.double() for key, b in moved.items()}
    if base:
        tensors["base"] = torch.cat([values for values, _ in base.values()])
    tensors = {key: value.detach().to("cpu").contiguous().clone() for key, value in tensors.items()}
    header = {
        "format": FORMAT,
        "version": __version__,
        "name": name,
        "base_name": base_name(root),
        "configs": [{"method": method_of(cfg).facts.name, "config": cfg.to_dict()} for cfg in attached.configs],
        "targets": targets,
        "train_also": list(attached.originals),
        "buffers": list(moved),
        "base": {key: list(dims) for key, (_, dims) in base.items()},
        "basis": basis,
    }
    return header, tensors


def _stored(adapter: Adapter, layer: nn.Module, path: str, basis: bool) -> dict[str, Tensor]:
    """What a file holds of an adapter: its state, or for a file without basis what `rebuild` needs instead of it.

    In the config's own dtypes, whatever a trainer has cast its parameters to (TRL to bf16, on a quantised base).
    """
    with torch.device("meta"):
        own = type(adapter)(adapter.cfg, *shape(layer)).state_dict()  # type: ignore[call-arg]
    tensors = {key: value.to(own[key].dtype) for key, value in adapter.state_dict().items()}
    for key in () if basis else adapter.rebuildable:
        U = tensors.pop(key)
        try:
            with full_precision(layer.weight.device):  # type: ignore[union-attr, arg-type]
                tensors[f"{key}.index"] = rebuild.indices(dense(layer), U)
        except ValueError as error:
            raise CheckpointError(f"save(..., basis=False): {path}: {error}") from error
        tensors[f"{key}.sketch"] = rebuild.sketch(U)
    return tensors


def load(
    model: nn.Module,
    path: str | os.PathLike[str],
    name: str = "default",
    overwrite: bool = False,
    base: str = "same",
) -> Attachment:
    """Attach the adapter in a file that `save` wrote. No calibration, no factorisation, no random numbers.

    Args:
        model: the base model it was trained on, in any dtype or quantisation.
        path: the file, or "hf://user/name" or "hf://user/name@revision" on the hub.
        name: the name to attach it under.
        overwrite: if an adapter of that name with the same configs and targets is attached, set its tensors in place,
            so that optimisers and compiled code stay valid.
        base: "same" refuses a model whose weights differ from those it was trained on; "any" skips that check.

    Raises:
        FileNotFoundError: no such file. BaseMismatchError: another base model.
        CheckpointError: a file that is damaged, or does not fit the model; or what stands in the hub's way.
        StateError: the name is taken (and not `overwrite`), or the model is not ready for `attach` either.
            After any error the model is as it was.
    """
    if base not in ("same", "any"):
        raise ValueError(f"load: base = {base!r} must be 'same' or 'any'")
    live = find_root(model)
    taken = live is not None and name in live[1].adapters
    if live is not None and taken and overwrite:
        root, state = live
        refuse_merged(state, "load")
    else:
        root, state = model, ready_state(model, name)
    with Transaction(root) as undo:
        file = read(local(path), room_for(root))
        targets = targets_of(root, state, file)
        if base == "same":
            refuse_another_base(file.where, root, state, targets, file.also, file.base)
        _check_buffers(root, state, file)
        att = (_overwrite if taken else _add)(root, state, file, name, targets, undo)
        _write_values(file, root, undo)
        return att


def _add(
    root: nn.Module, state: State, file: File, name: str, targets: Sequence[Target], undo: Transaction
) -> Attachment:
    also = _find_also(root, state, file, targets)
    _check_also(file, also)
    for target in targets:
        derive(target.adapter, target.layer)
    return commit(root, state, name, file.configs, targets, also)


def room_for(root: nn.Module) -> Room:
    """How much an adapter's file may hold for this model."""
    layers = [shape(module) for module in root.modules() if is_linear(module)]
    own = [p.numel() for key, p in root.named_parameters() if not is_adapters_key(key, root)]
    return Room(layers, own, len(moving_buffers(root)))


def _check_buffers(root: nn.Module, state: State, file: File) -> None:
    """Refuse moved running averages that do not fit the model, or that another adapter's training moved as well."""
    there, moved = moving_buffers(root), moved_buffers(root, state)
    for key in file.buffers:
        value = file.tensors[f"buffer.{key}"]
        if key not in there or there[key].shape != value.shape:
            raise file.error(f"holds {key} {tuple(value.shape)}, which the model has not; it fits another architecture")
        _check_range(file, key, value, there[key].dtype)
        if key in moved and not same_bits(moved[key], value.to(moved[key].dtype)):
            raise StateError(
                f"{file.where}: holds {key}, which another adapter's training moved to other values; detach that one"
            )


def _find_also(root: nn.Module, state: State, file: File, targets: Sequence[Target]) -> dict[str, nn.Parameter]:
    """The base parameters that the file holds trained values of."""
    patterns = [rf"\A{re.escape(key)}\Z" for key in file.also]
    try:
        also = find_train_also(root, state, targets, patterns)
    except TargetError as error:
        raise file.error(f"does not fit the model: {error}") from error
    if tied := [key for key in file.also if key not in also]:
        raise file.error(f"has values of {tied[0]} and of a parameter that is the same one in this model")
    return also


def _check_also(file: File, also: Mapping[str, nn.Parameter]) -> None:
    for key, parameter in also.items():
        value = file.tensors[f"also.{key}"]
        _check_range(file, key, value, parameter.dtype)
        if parameter.shape != value.shape:
            raise file.error(
                f"{key} has shape {tuple(parameter.shape)} in the model, but {tuple(value.shape)} in the file"
            )


def _check_range(file: File, key: str, value: Tensor, dtype: torch.dtype) -> None:
    if not torch.isfinite(value.to(dtype)).all():
        raise file.error(
            f"{key} has values up to {float(value.abs().max()):.3g}, beyond what the model's {dtype} holds; load the "
            "model in a wider dtype"
        )


def _write_values(file: File, root: nn.Module, undo: Transaction) -> None:
    """The base's values that the file holds: `train_also` weights and running averages."""
    for key in file.also:
        undo.write(root.get_parameter(key), file.tensors[f"also.{key}"])
    for key in file.buffers:
        undo.write(root.get_buffer(key), file.tensors[f"buffer.{key}"])


def _overwrite(
    root: nn.Module, state: State, file: File, name: str, targets: Sequence[Target], undo: Transaction
) -> Attachment:
    attached, adapters = state.adapters[name], adapters_of(root, name)
    indices = {target.path: target.index for target in targets}
    same = attached.configs == file.configs and attached.targets == indices and list(attached.originals) == file.also
    if not same or any(adapters[target.path].cfg != target.cfg for target in targets):
        raise StateError(
            f"{file.where}: has other configs, targets or train_also than the attached {name!r}; detach that one first"
        )
    _check_also(file, {key: root.get_parameter(key) for key in file.also})
    for target in targets:
        adapter = adapters[target.path]
        for key, value in target.adapter.state_dict().items():
            undo.write(adapter.state_dict()[key], value)
        derive(adapter, target.layer)
    return described(root, state, name)
