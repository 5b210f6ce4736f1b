"""Adapters that peft wrote, attached as ours."""

import difflib
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from lora_lite.adapter import Adapter, derive
from lora_lite.calibration.statistics import generator
from lora_lite.errors import CheckpointError, LoraLiteError
from lora_lite.files.base_check import warn_other_name
from lora_lite.files.checkpoint import room_for
from lora_lite.interop.peft_folder import PeftFolder, read_folder
from lora_lite.interop.peft_types import PeftType, config_of, refuse_unknown, types_of
from lora_lite.layers.linear import execution_device, is_linear, shape
from lora_lite.layers.targets import Target
from lora_lite.numerics import full_precision
from lora_lite.registry import method_of
from lora_lite.runtime.attach import commit
from lora_lite.runtime.attachment import Attachment
from lora_lite.runtime.readiness import check_layer, ready_state, taken_parameters
from lora_lite.runtime.state import State
from lora_lite.runtime.train_also import find_train_also
from lora_lite.runtime.transaction import Transaction

OLD_MAGNITUDE = ".lora_magnitude_vector.weight"


def import_peft(model: nn.Module, folder: str | os.PathLike[str], name: str = "default") -> Attachment:
    """Attach the adapter in a folder that peft's `save_pretrained` wrote: the same function, and it trains on.

    LoRA (rank and alpha patterns, rsLoRA, lora_bias, converted PiSSA and OLoRA), DoRA, IA3, HRA, RoAd and DeLoRA come
    in as the methods of those names; whole modules (`modules_to_save`) as `train_also`. Only safetensors are read.

    Args:
        model: the base it was trained on. peft writes no fingerprint of it, so only its name is compared.
        folder: holds adapter_config.json and adapter_model.safetensors.
        name: the name to attach it under.

    Returns:
        The `Attachment`. `ll.save` writes it as a file of ours.

    Raises:
        FileNotFoundError: no such folder, or a file is missing in it.
        CheckpointError: a type or setting that is not understood, a pickle, tensors that do not fit the model.
        TargetError, StateError: as `attach`. After any error the model is as it was.
    """
    state = ready_state(model, name)
    with Transaction(model) as undo:
        given = read_folder(folder, room_for(model))
        try:
            refuse_unknown(given.settings)
            layers, values = _parts(given)
            targets = _targets(model, state, layers, given)
            _check_values(model, values, targets, given)
        except CheckpointError as error:
            raise given.error(error) from error
        also = find_train_also(model, state, targets, [rf"\A{re.escape(key)}\Z" for key in values])
        for target in targets:
            derive(target.adapter, target.layer)
        warn_other_name(model, str(given.settings.get("base_model_name_or_path") or ""))
        configs = list(dict.fromkeys(target.cfg for target in targets))
        targets = [replace(target, index=configs.index(target.cfg)) for target in targets]
        att = commit(model, state, name, configs, targets, also)
        for key, value in values.items():
            undo.write(model.get_parameter(key), value)
    return att


def _parts(given: PeftFolder) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """The tensors of each layer's adapter, by path and by the end of their key; and the values of whole parameters."""
    ends = {key for kind in types_of(given.settings["peft_type"]) for key, _ in kind.tensors.values()}
    layers: dict[str, dict[str, Tensor]] = {}
    values: dict[str, Tensor] = {}
    seen: set[str] = set()
    for key, value in given.tensors.items():
        key = key.removesuffix(".weight") if key.endswith(OLD_MAGNITUDE) else key
        end = next((end for end in ends if key.endswith(f".{end}")), None)
        if key in seen:
            raise CheckpointError(f"holds {key} twice, under two spellings")
        seen.add(key)
        if end is None:
            values[key] = value
        else:
            layers.setdefault(key.removesuffix(f".{end}"), {})[end] = value
    if not layers:
        raise CheckpointError(f"holds no tensor of a {given.settings['peft_type']}, but {', '.join(list(values)[:3])}")
    return layers, values


def _targets(
    model: nn.Module, state: State, layers: Mapping[str, dict[str, Tensor]], given: PeftFolder
) -> list[Target]:
    modules, taken = dict(model.named_modules()), taken_parameters(model, state)
    if strange := [path for path in layers if path not in modules]:
        raise CheckpointError(
            f"{len(strange)} of {len(layers)} layers are not in this {type(model).__name__}, such as {strange[0]}; "
            f"{_nearest(strange[0], modules)}{_shifted(strange[0], modules)}"
        )
    targets = []
    for path, tensors in layers.items():
        layer = modules[path]
        if not is_linear(layer):
            raise CheckpointError(f"{path} is a {type(layer).__name__}; only linear layers carry adapters here")
        check_layer(path, layer, taken)
        adapter = _adapter(path, layer, tensors, given)
        targets.append(Target(path, layer, shape(layer), 0, adapter.cfg, adapter=adapter))
    return targets


def _nearest(name: str, names: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(names), n=3, cutoff=0.0)
    return f"nearest here: {', '.join(close)}"


def _shifted(path: str, modules: Mapping[str, nn.Module]) -> str:
    """A hint where the model is the inner or outer one of that which the folder was made for."""
    _, _, inner = path.partition(".")
    if inner in modules:
        return f". (It has {inner}: pass the model around this one.)"
    outer = next((each for each in modules if each.endswith(f".{path}")), None)
    return f". (It has {outer}: pass the part of it that holds {path}.)" if outer else ""


def _adapter(path: str, layer: nn.Module, tensors: dict[str, Tensor], given: PeftFolder) -> Adapter:
    dtype = torch.float64 if any(value.dtype == torch.float64 for value in tensors.values()) else torch.float32
    kind = _kind(path, layer, tensors, given, dtype)
    full = full_precision(layer.weight.device)  # type: ignore[union-attr, arg-type]
    try:
        with torch.no_grad(), torch.device("cpu"), full:
            adapter = _empty(kind, path, layer, given, dtype)
            adapter.init(layer, None, generator(0, path))
            for name, (end, _) in kind.keys(adapter).items():
                if end in tensors:
                    adapter.state_dict()[name].copy_(kind.read(adapter, name, tensors[end]))
            if kind.start is not None:
                kind.start(adapter)
    except LoraLiteError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    return adapter.to(execution_device(layer))


def _empty(kind: PeftType, path: str, layer: nn.Module, given: PeftFolder, dtype: torch.dtype) -> Adapter:
    cfg = config_of(kind, given.settings, path, dtype)
    return method_of(cfg)(cfg, *shape(layer))  # type: ignore[call-arg]


def _kind(path: str, layer: nn.Module, tensors: dict[str, Tensor], given: PeftFolder, dtype: torch.dtype) -> PeftType:
    """The method whose tensors, by name and shape, are just those of the folder; shapes are compared without memory."""
    shapes = {end: tuple(value.shape) for end, value in tensors.items()}
    wanted: list[dict[str, tuple[int, ...]]] = []
    for kind in types_of(given.settings["peft_type"]):
        try:
            with torch.device("meta"):
                adapter = _empty(kind, path, layer, given, dtype)
        except CheckpointError:
            raise
        except (ValueError, RuntimeError, TypeError, OverflowError) as error:  # the last three: sizes beyond torch's
            raise CheckpointError(f"{path}: {str(error).splitlines()[0]}") from error
        if kind.peft_type == "LORA" and (kind.method == "dora") != bool(given.settings.get("use_dora")):
            continue
        trained = dict(adapter.named_parameters())
        own = adapter.state_dict()
        expected = {end: (tuple(layout(own[name]).shape), name) for name, (end, layout) in kind.keys(adapter).items()}
        wanted.append({end: dims for end, (dims, _) in expected.items()})
        required = {end for end, (_, name) in expected.items() if name in trained}
        if required <= shapes.keys() <= expected.keys() and all(shapes[end] == expected[end][0] for end in shapes):
            return kind
    choices = " or ".join(str(each) for each in wanted)
    raise CheckpointError(f"{path}: has the tensors {shapes}, where its settings and this layer ask for {choices}")


def _check_values(model: nn.Module, values: Mapping[str, Tensor], targets: Sequence[Target], given: PeftFolder) -> None:
    """Refuse whole parameters that are not the model's, or that belong to an adapted layer."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    adapted = {target.path for target in targets}
    for key, value in values.items():
        if key.rpartition(".")[0] in adapted:
            raise CheckpointError(
                f"holds {key}, which is of an adapted layer (bias = {given.settings.get('bias')!r}); only lora_bias "
                "and modules_to_save are understood"
            )
        if key not in parameters:
            raise CheckpointError(f"holds {key}, which the model has not; {_nearest(key, parameters)}")
        others = [name for name, p in parameters.items() if p is parameters[key] and name != key]
        saved = given.settings.get("modules_to_save") or []
        apart = any(key.rpartition(".")[0].endswith(str(each)) for each in saved)
        if others and apart and not given.settings.get("ensure_weight_tying"):
            raise CheckpointError(
                f"holds {key}, which peft trained apart from {others[0]}; the two are one parameter in this model: "
                "untie them first (tie_word_embeddings = False)"
            )
        if parameters[key].shape != value.shape:
            raise CheckpointError(
                f"holds {key} {tuple(value.shape)}; it is {tuple(parameters[key].shape)} in the model"
            )
