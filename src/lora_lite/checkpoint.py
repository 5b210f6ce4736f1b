"""Adapter files: one safetensors file with JSON metadata, written atomically, and checked whole before it is used."""

import hashlib
import json
import os
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from lora_lite.adapter import Adapter, variant_of, variants
from lora_lite.attach import check_layer, commit, find_train_also, refuse_unready
from lora_lite.attachment import Attachment, attachment
from lora_lite.config import AdapterConfig, is_int
from lora_lite.errors import BaseMismatchError, CheckpointError, StateError, TargetError
from lora_lite.linear import dense, execution_device, is_linear, shape
from lora_lite.state import adapters_of, find_root, refuse_merged, root_of
from lora_lite.stats import generator

FORMAT = 1
METADATA_KEY = "lora_lite"
SKETCH_ROWS = 64
SKETCH_COSINE = 0.8  # other models score near 0; fine-tunes, 4-bit copies and other dtypes above 0.95
SAFETENSORS_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@dataclass(frozen=True)
class File:
    """An adapter file, read and checked in itself, but not yet against a model."""

    where: Path
    configs: list[AdapterConfig]
    targets: dict[str, tuple[int, AdapterConfig, tuple[int, int]]]
    also: list[str]
    tensors: dict[str, Tensor]

    def error(self, message: str) -> CheckpointError:
        return CheckpointError(f"{self.where}: {message}")


def save(model: nn.Module, path: str | os.PathLike[str], name: str = "default") -> Path:
    """Write an adapter to one file: tensors (trained and frozen), `train_also` weights, configs, a sketch of the base.

    The file appears whole or not at all; an existing one is replaced. Missing folders are made.

    Args:
        model: the model.
        path: the file, by custom `....safetensors`.
        name: the adapter.
    Returns:
        The path.
    Raises:
        StateError: no such adapter, a target that was replaced since attach, or merged.
        CheckpointError: a tensor that is not finite, or a path that is a folder.
    """
    root, state = root_of(model, name)
    refuse_merged(state, "save")
    where = Path(path)
    if where.is_dir():
        raise CheckpointError(f"{where} is a folder; give a file, e.g. {where / 'adapter.safetensors'}")
    attached, adapters = state.adapters[name], adapters_of(root, name)
    tensors: dict[str, Tensor] = {}
    targets: dict[str, Any] = {}
    for target, adapter in adapters.items():
        layer = root.get_submodule(target)
        shared = attached.configs[attached.targets[target]].to_dict()
        changes = {key: value for key, value in adapter.cfg.to_dict().items() if value != shared[key]}
        targets[target] = {"config": attached.targets[target], "changes": changes, "shape": list(shape(layer))}
        tensors |= {f"{target}.lora.{key}": value for key, value in adapter.state_dict().items()}
        tensors[f"{target}.sketch"] = sketch(layer, target)
    tensors |= {f"also.{key}": root.get_parameter(key) for key in attached.originals}
    tensors = {key: value.detach().to("cpu").contiguous().clone() for key, value in tensors.items()}
    if bad := [key for key, value in tensors.items() if not torch.isfinite(value).all()]:
        raise CheckpointError(f"save: {bad[0]} is not finite (of {len(bad)} such tensors); nothing was written")
    configs = [{"variant": variant_of(cfg).name, "config": cfg.to_dict()} for cfg in attached.configs]
    header = {
        "format": FORMAT,
        "version": version("lora-lite"),
        "name": name,
        "configs": configs,
        "targets": targets,
        "train_also": list(attached.originals),
    }
    header["checksum"] = checksum(header, tensors)
    # One metadata key: safetensors does not keep the order of several, and equal adapters should give equal files.
    write_atomically(where, to_bytes(tensors, {METADATA_KEY: json.dumps(header)}))
    return where


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
        path: the file.
        name: the name to attach it under.
        overwrite: if an adapter of that name with the same configs and targets is attached, set its tensors in place,
            so that optimisers and compiled code stay valid.
        base: "same" refuses a model whose weights differ from those it was trained on; "any" skips that check.
    Raises:
        FileNotFoundError: no such file.
        CheckpointError: a file that is damaged, or does not fit the model. BaseMismatchError: another base model.
        StateError: the name is taken (and not `overwrite`), or the model is not ready for `attach` either.
        After any error the model is as it was.
    """
    if base not in ("same", "any"):
        raise ValueError(f"load: base = {base!r} must be 'same' or 'any'")
    live = find_root(model)
    taken = live is not None and name in live[1].adapters
    if live is not None and taken and overwrite:
        refuse_merged(live[1], "load")
    else:
        refuse_unready(model, name)
    root = live[0] if live is not None else model
    file = read(Path(path))
    layers = {target: _layer(root, file, target) for target in file.targets}
    built = {target: _build(file, target, layers[target]) for target in file.targets}
    _check_keys(file, built)
    if base == "same":
        _check_base(file, layers)
    if taken:
        return _overwrite(root, file, name, built)
    also = _find_also(root, file, layers)
    _check_also(file, also)
    with torch.no_grad():
        for target, adapter in built.items():
            adapter.derive(layers[target])
    indices = {target: index for target, (index, _, _) in file.targets.items()}
    commit(root, file.configs, name, {target: (layers[target], built[target]) for target in built}, indices, also)
    with torch.no_grad():
        for key, parameter in also.items():
            parameter.copy_(file.tensors[f"also.{key}"])
    return attachment(root, name)


def _find_also(root: nn.Module, file: File, layers: Mapping[str, nn.Module]) -> dict[str, nn.Parameter]:
    """The base parameters that the file holds trained values of."""
    patterns = [rf"\A{re.escape(key)}\Z" for key in file.also]
    try:
        also = find_train_also(root, {target: (layer, 0) for target, layer in layers.items()}, patterns)
    except TargetError as error:
        raise file.error(f"does not fit the model: {error}") from error
    if tied := [key for key in file.also if key not in also]:
        raise file.error(f"has values of {tied[0]} and of a parameter that is the same one in this model")
    return also


def _check_also(file: File, also: Mapping[str, nn.Parameter]) -> None:
    for key, parameter in also.items():
        if parameter.shape != (found := file.tensors[f"also.{key}"].shape):
            raise file.error(f"{key} has shape {tuple(parameter.shape)} in the model, but {tuple(found)} in the file")


def _overwrite(root: nn.Module, file: File, name: str, built: dict[str, Adapter]) -> Attachment:
    _, state = root_of(root, name)
    attached, adapters = state.adapters[name], adapters_of(root, name)
    indices = {target: index for target, (index, _, _) in file.targets.items()}
    same = attached.configs == file.configs and attached.targets == indices and list(attached.originals) == file.also
    if not same or any(adapters[target].cfg != built[target].cfg for target in built):
        raise StateError(
            f"{file.where}: has other configs, targets or train_also than the attached {name!r}; detach that one first"
        )
    _check_also(file, {key: root.get_parameter(key) for key in file.also})
    with torch.no_grad():
        for target, adapter in adapters.items():
            for key, value in built[target].state_dict().items():
                adapter.state_dict()[key].copy_(value)
            adapter.derive(root.get_submodule(target))
        for key in file.also:
            root.get_parameter(key).copy_(file.tensors[f"also.{key}"])
    return attachment(root, name)


def read(where: Path) -> File:
    """Read a file and check it in itself: format, configs, shapes (before tensors are read), checksum, finiteness."""
    if not where.is_file():
        raise FileNotFoundError(f"no adapter file at {where}")
    try:
        with safe_open(where, framework="pt") as handle:
            header = _header(where, handle.metadata())
            checked = header.pop("checksum")
            file = _parse(where, header)
            keys = list(handle.keys())
            _check_shapes(file, {key: handle.get_slice(key) for key in keys})
            # Cloned, for the tensors that safetensors gives are views of the file and change when it is written to.
            file.tensors.update({key: handle.get_tensor(key).clone() for key in keys})
    except SafetensorError as error:
        raise CheckpointError(f"{where}: is no whole safetensors file ({error}); copy it again") from error
    if checksum(header, file.tensors) != checked:
        raise file.error("its checksum does not match: the file was damaged or edited; copy it again")
    if bad := [key for key, value in file.tensors.items() if not torch.isfinite(value).all()]:
        raise file.error(f"{bad[0]} is not finite ({len(bad)} such tensors)")
    return file


def _header(where: Path, metadata: Mapping[str, str] | None) -> dict[str, Any]:
    if METADATA_KEY not in (metadata or {}):
        raise CheckpointError(f"{where}: was not written by lora-lite (no {METADATA_KEY!r} in its metadata)")
    try:
        header = json.loads((metadata or {})[METADATA_KEY])
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: its metadata is no JSON ({error}); copy the file again") from error
    expected = {"format", "version", "name", "configs", "targets", "train_also", "checksum"}
    if not isinstance(header, dict) or set(header) != expected:
        raise CheckpointError(f"{where}: its metadata must have just the keys {sorted(expected)}; copy the file again")
    if header["format"] != FORMAT:
        raise CheckpointError(
            f"{where}: has format {header['format']!r}, this version reads {FORMAT}; update lora-lite"
        )
    return header


def _parse(where: Path, header: dict[str, Any]) -> File:
    known = variants()
    try:
        configs = [known[each["variant"]].Config.from_dict(each["config"]) for each in header["configs"]]
        targets = {}
        for path, entry in header["targets"].items():
            index, (i, o) = entry["config"], entry["shape"]
            if not (is_int(index, 0) and is_int(i, 1) and is_int(o, 1)):
                raise ValueError(f"{path} has config {index!r} and shape {entry['shape']!r}")
            shared = configs[index]
            own = type(shared).from_dict({**shared.to_dict(), **entry["changes"]}) if entry["changes"] else shared
            targets[str(path)] = (index, own, (i, o))
        also = [str(key) for key in header["train_also"]]
    except KeyError as error:
        raise CheckpointError(
            f"{where}: unknown method or missing metadata {error}; methods here: {', '.join(known)}"
        ) from error
    except (TypeError, ValueError, AttributeError, IndexError) as error:
        raise CheckpointError(f"{where}: its metadata is not valid: {error}") from error
    return File(where, configs, targets, also, {})


def _check_shapes(file: File, slices: Mapping[str, Any]) -> None:
    """Compare names, shapes and dtypes with what the configs ask for, before any tensor is read."""
    expected: dict[str, tuple[list[int] | None, torch.dtype | None]] = {
        f"also.{key}": (None, None) for key in file.also
    }
    for path, (_, cfg, (i, o)) in file.targets.items():
        expected[f"{path}.sketch"] = ([min(o, SKETCH_ROWS)], torch.float32)
        for key, value in _empty(file, path, cfg, i, o).state_dict().items():
            expected[f"{path}.lora.{key}"] = (list(value.shape), value.dtype)
    if missing := sorted(set(expected) - set(slices)):
        raise file.error(f"misses {len(missing)} tensors, such as {missing[0]}")
    if unexpected := sorted(set(slices) - set(expected)):
        raise file.error(f"has {len(unexpected)} tensors that nothing asks for, such as {unexpected[0]}")
    for key, (dims, dtype) in expected.items():
        found, kind = slices[key].get_shape(), SAFETENSORS_DTYPES.get(slices[key].get_dtype())
        if (dims is not None and found != dims) or kind is None or (dtype is not None and kind != dtype):
            raise file.error(f"{key} is {slices[key].get_dtype()} {found}, expected {dtype or 'a float'} {dims or ''}")


def _empty(file: File, path: str, cfg: AdapterConfig, i: int, o: int) -> Adapter:
    try:
        with torch.device("meta"):
            return variant_of(cfg)(cfg, i, o)  # type: ignore[call-arg]
    except (ValueError, RuntimeError, TypeError) as error:  # the latter two: sizes beyond what torch can count
        raise file.error(f"{path}: {str(error).splitlines()[0]}") from error


def _layer(root: nn.Module, file: File, path: str) -> nn.Module:
    layer = dict(root.named_modules()).get(path)
    if layer is None or not is_linear(layer):
        raise file.error(f"the model has no linear layer {path}; the file fits another architecture")
    if shape(layer) != file.targets[path][2]:
        raise file.error(
            f"{path} maps {shape(layer)} here, but {file.targets[path][2]} in the file: another architecture"
        )
    check_layer(path, layer)
    return layer


def _build(file: File, path: str, layer: nn.Module) -> Adapter:
    adapter = _empty(file, path, file.targets[path][1], *shape(layer))
    own = {key: file.tensors[f"{path}.lora.{key}"] for key in adapter.state_dict()}
    adapter.load_state_dict(own, assign=True)
    return adapter.to(execution_device(layer))


def _check_keys(file: File, built: Mapping[str, Adapter]) -> None:
    if not built:
        raise file.error("has no targets")


def sketch(layer: nn.Module, path: str) -> Tensor:
    """W z on up to 64 evenly spaced rows, for one z seeded by the path: what tells base models apart."""
    i, o = shape(layer)
    rows = torch.linspace(0, o - 1, min(o, SKETCH_ROWS)).round().long()
    z = torch.randn(i, generator=generator(0, path))
    return dense(layer)[rows.to(layer.weight.device)].to("cpu", torch.float32) @ z  # type: ignore[union-attr, arg-type]


def _check_base(file: File, layers: Mapping[str, nn.Module]) -> None:
    cosines = {}
    for path, layer in layers.items():
        here, there = sketch(layer, path), file.tensors[f"{path}.sketch"]
        same = torch.equal(here, there)  # also covers weights that are zero
        cosine = torch.cosine_similarity(here, there, dim=0).nan_to_num(nan=-1.0)  # NaN is below nothing
        cosines[path] = 1.0 if same else float(cosine)
    worst = min(cosines, key=lambda path: cosines[path])
    if not cosines[worst] >= SKETCH_COSINE:
        raise BaseMismatchError(
            f"{file.where}: was trained on another base model; worst layer {worst}, cosine {cosines[worst]:.2f} < "
            f"{SKETCH_COSINE} (load(..., base='any') skips this check)"
        )


def checksum(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over the metadata and every tensor's name, dtype, shape and bytes."""
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for key in sorted(tensors):
        value = tensors[key].contiguous()
        digest.update(f"{key}:{value.dtype}:{tuple(value.shape)}".encode())
        digest.update(value.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def write_atomically(where: Path, data: bytes) -> None:
    """Replace the file `where` by `data`: at any moment it holds the old content or the new, even after a crash."""
    where.parent.mkdir(parents=True, exist_ok=True)
    ours = re.compile(rf"\.{re.escape(where.name)}\.(\d{{1,9}})\.[0-9a-f]{{8}}\.tmp")
    for stale in where.parent.iterdir():
        if (found := ours.fullmatch(stale.name)) and not _alive(int(found[1])):
            stale.unlink(missing_ok=True)
    temporary = where.parent / f".{where.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp"
    try:
        with open(temporary, "xb") as handle:
            handle.write(data)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(temporary, where)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(where.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
