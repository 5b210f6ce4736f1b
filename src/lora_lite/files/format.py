"""The file itself: safetensors with JSON metadata, checked whole before a model is touched."""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lora_lite.adapter import Adapter
from lora_lite.config import AdapterConfig, is_int
from lora_lite.errors import CheckpointError
from lora_lite.files.base_check import SKETCH_ROWS
from lora_lite.frozen_basis.rebuild import PROBES
from lora_lite.methods import methods
from lora_lite.patterns import LONGEST, is_plain
from lora_lite.registry import method_of
from lora_lite.runtime.base_values import SAMPLES, Samples

FORMAT = 2
METADATA_KEY = "lora_lite"
SAFETENSORS_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@dataclass(frozen=True)
class File:
    """An adapter file, read and checked in itself, but not yet against a model."""

    where: Path
    configs: list[AdapterConfig]
    targets: dict[str, tuple[int, AdapterConfig, tuple[int, int]]]
    also: list[str]
    buffers: list[str]
    sampled: dict[str, tuple[int, ...]]
    basis: bool
    tensors: dict[str, Tensor]

    @property
    def base(self) -> tuple[dict[str, Tensor], Samples]:
        """What the file remembers of its base: sketches by path of the layer, samples by name of the parameter."""
        parts = self.tensors["base"].split(_counts(self.sampled)) if self.sampled else ()
        samples = {key: (part, dims) for (key, dims), part in zip(self.sampled.items(), parts, strict=True)}
        return {path: self.tensors[f"{path}.sketch"] for path in self.targets}, samples

    def error(self, message: str) -> CheckpointError:
        return CheckpointError(f"{self.where}: {message}")


@dataclass(frozen=True)
class Room:
    """What a model has room for: a file that asks for much more is refused before it is read.

    Attributes:
        layers: (i, o) of each linear layer.
        parameters: number of values of each parameter.
        buffers: number of buffers that training may move.
    """

    layers: list[tuple[int, int]]
    parameters: list[int]
    buffers: int

    @property
    def header_bytes(self) -> int:
        """Of the names, shapes and settings of tensors."""
        return 2**20 + 2**11 * (len(self.layers) + len(self.parameters) + self.buffers)

    @property
    def values(self) -> int:
        """Of all tensors: adapters of four times the full rank everywhere, and every parameter trained as well."""
        return 2**24 + sum(self.parameters) + sum(4 * (i + o) * min(i, o) for i, o in self.layers)

    def check(self, where: Path, data: bytes, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Refuse to write a file that `read` would refuse for its size."""
        _check_counts(where, header, self)
        size = int.from_bytes(data[:8], "little")
        if size > self.header_bytes or sum(tensor.numel() for tensor in tensors.values()) > self.values:
            raise CheckpointError(
                f"{where}: was not written, for `load` would refuse it: {size:,} bytes of metadata, or its values, are "
                "more than any adapter of this model can need (custom configs with long names?)"
            )


# Of a file that is looked at without a model: more layers and parameters than any has.
ALONE = Room([(1, 1)] * 20_000, [1] * 20_000, 1_000)


def read(where: Path, room: Room) -> File:
    """Read a file and check it in itself: size, format, configs, shapes (before tensors are read), checksum,
    finiteness."""
    with _opened(where, room, "this model's layers can need") as (handle, header):
        file, slices = _outline(where, header, room, handle)
        if (values := sum(math.prod(each.get_shape()) for each in slices.values())) > room.values:
            raise file.error(f"holds {values:,} values, more than any adapter of this model can have")
        # Cloned, for the tensors that safetensors gives are views of the file and change when it is written to.
        file.tensors.update({key: handle.get_tensor(key).clone() for key in slices})
    verify(file, header, file.tensors)
    return file


@contextmanager
def opened_alone(where: Path) -> Iterator[tuple[File, dict[str, Any], dict[str, list[int]], Any]]:
    """A file without a model and without its tensors: what it says, its header, the shape of each tensor, and the
    handle to read some of them.

    The limits are those of no model in particular; shapes are compared with what the configs ask for, as in `read`.
    """
    with _opened(where, ALONE, "adapters have") as (handle, header):
        file, slices = _outline(where, header, ALONE, handle)
        yield file, header, {key: each.get_shape() for key, each in slices.items()}, handle


@contextmanager
def _opened(where: Path, room: Room, most: str) -> Iterator[tuple[Any, dict[str, Any]]]:
    """The handle of a file, and its header. `most`: whose metadata are as long as there is room for, for the error."""
    if not where.is_file():
        raise FileNotFoundError(f"no adapter file at {where}")
    with open(where, "rb") as opened:
        header_bytes = int.from_bytes(opened.read(8), "little")
    if room.header_bytes < header_bytes <= where.stat().st_size:
        raise CheckpointError(f"{where}: has {header_bytes:,} bytes of metadata, more than {most}")
    try:
        with safe_open(where, framework="pt") as handle:
            yield handle, _header(where, handle.metadata())
    except SafetensorError as error:
        raise CheckpointError(f"{where}: is no whole safetensors file ({error}); copy it again") from error


def _outline(where: Path, header: dict[str, Any], room: Room, handle: Any) -> tuple[File, dict[str, Any]]:
    """What a file says, without tensors, and its tensors unread, by name, compared with what the configs ask for."""
    _check_counts(where, header, room)
    file = _parse(where, header)
    slices = {key: handle.get_slice(key) for key in handle.keys()}  # noqa: SIM118 (it is no dict)
    _check_shapes(file, slices)
    return file, slices


def verify(file: File, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Raise `CheckpointError` unless the header's checksum is that of the rest of it and the tensors, all finite."""
    if checksum({key: value for key, value in header.items() if key != "checksum"}, tensors) != header["checksum"]:
        raise file.error("its checksum does not match: the file was damaged or edited; copy it again")
    if bad := [key for key in tensors if not torch.isfinite(tensors[key]).all()]:
        raise file.error(f"{bad[0]} is not finite ({len(bad)} such tensors)")


def _header(where: Path, metadata: Mapping[str, str] | None) -> dict[str, Any]:
    if METADATA_KEY not in (metadata or {}):
        raise CheckpointError(f"{where}: was not written by lora-lite (no {METADATA_KEY!r} in its metadata)")
    try:
        header = json.loads((metadata or {})[METADATA_KEY])
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: its metadata is no JSON ({error}); copy the file again") from error
    if isinstance(header, dict) and header.get("format", FORMAT) != FORMAT:
        raise CheckpointError(
            f"{where}: has format {header['format']!r}, this version reads {FORMAT}; use the version that wrote it"
        )
    expected = {
        "format",
        "version",
        "name",
        "base_name",
        "configs",
        "targets",
        "train_also",
        "buffers",
        "base",
        "basis",
        "checksum",
    }
    if not isinstance(header, dict) or set(header) != expected:
        raise CheckpointError(f"{where}: its metadata must have just the keys {sorted(expected)}; copy the file again")
    return header


def _check_counts(where: Path, header: Mapping[str, Any], room: Room) -> None:
    layers = 100 + 2 * len(room.layers)
    parameters, buffers = 100 + 2 * len(room.parameters), 100 + 2 * room.buffers
    most = {"targets": layers, "configs": layers, "train_also": parameters, "base": parameters, "buffers": buffers}
    for key, limit in most.items():
        if isinstance(header[key], list | dict) and len(header[key]) > limit:
            raise CheckpointError(
                f"{where}: lists {len(header[key]):,} {key}, but the model has {len(room.layers)} linear layers and "
                f"{len(room.parameters)} parameters; the file fits another architecture"
            )


def _check_patterns(configs: Any, targets: Any) -> None:
    """Refuse more regexes than are compiled in a moment; layers are listed by path, so that none is searched for."""
    fields = ("target_names", "exclude_names")
    patterns = [pattern for each in configs for field in fields for pattern in each["config"].get(field, ())]
    size = sum(len(pattern) for pattern in patterns if isinstance(pattern, str) and not is_plain(pattern))
    if size > 5 * LONGEST:
        raise ValueError(f"{size:,} characters of regular expressions")
    if changed := [path for path, entry in targets.items() if entry["changes"] and set(fields) & set(entry["changes"])]:
        raise ValueError(f"{changed[0]} has names of its own")


def _parse(where: Path, header: dict[str, Any]) -> File:
    known = methods()
    try:
        _check_patterns(header["configs"], header["targets"])
        configs = [known[each["method"]].Config.from_dict(each["config"]) for each in header["configs"]]
        targets = {}
        for path, entry in header["targets"].items():
            index, (i, o) = entry["config"], entry["shape"]
            if not (is_int(index, 0) and is_int(i, 1) and is_int(o, 1)):
                raise ValueError(f"{path} has config {index!r} and shape {entry['shape']!r}")
            shared = configs[index]
            own = type(shared).from_dict({**shared.to_dict(), **entry["changes"]}) if entry["changes"] else shared
            targets[str(path)] = (index, own, (i, o))
        also, buffers = ([str(key) for key in header[field]] for field in ("train_also", "buffers"))
        sampled = {str(key): tuple(dims) for key, dims in header["base"].items()}
        if bad := [key for key, dims in sampled.items() if not all(is_int(size, 1) for size in dims)]:
            raise ValueError(f"{bad[0]} has shape {sampled[bad[0]]!r}")
        basis = bool(header["basis"])
        if not (isinstance(header["base_name"], str) and len(header["base_name"]) <= LONGEST):
            raise ValueError("base_name is no short text")
    except KeyError as error:
        raise CheckpointError(
            f"{where}: unknown method or missing metadata {error}; methods here: {', '.join(known)}"
        ) from error
    except (TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
        raise CheckpointError(f"{where}: its metadata is not valid: {error}") from error
    return File(where, configs, targets, also, buffers, sampled, basis, {})


def _counts(sampled: Mapping[str, tuple[int, ...]]) -> list[int]:
    """How many values of each parameter a file holds."""
    return [min(SAMPLES, math.prod(dims)) for dims in sampled.values()]


def _check_shapes(file: File, slices: Mapping[str, Any]) -> None:
    """Compare names, shapes and dtypes with what the configs ask for, before any tensor is read."""
    expected: dict[str, tuple[list[int] | None, torch.dtype | None]] = {
        f"{kind}.{key}": (None, None) for kind, keys in (("also", file.also), ("buffer", file.buffers)) for key in keys
    }
    if file.sampled:
        expected["base"] = ([sum(_counts(file.sampled))], torch.float32)
    for path, (_, cfg, (i, o)) in file.targets.items():
        expected[f"{path}.sketch"] = ([min(o, SKETCH_ROWS)], torch.float32)
        adapter = empty_adapter(file, path, cfg, i, o)
        for key, value in adapter.state_dict().items():
            if key in adapter.rebuildable and not file.basis:
                expected[f"{path}.lora.{key}.index"] = ([value.shape[1]], torch.float32)
                expected[f"{path}.lora.{key}.sketch"] = ([PROBES, value.shape[1]], torch.float32)
            else:
                expected[f"{path}.lora.{key}"] = (list(value.shape), value.dtype)
    if missing := sorted(set(expected) - set(slices)):
        raise file.error(f"misses {len(missing)} tensors, such as {missing[0]}")
    if unexpected := sorted(set(slices) - set(expected)):
        raise file.error(f"has {len(unexpected)} tensors that nothing asks for, such as {unexpected[0]}")
    for key, (dims, dtype) in expected.items():
        shape, kind = slices[key].get_shape(), SAFETENSORS_DTYPES.get(slices[key].get_dtype())
        if (dims is not None and shape != dims) or kind is None or (dtype is not None and kind != dtype):
            raise file.error(f"{key} is {slices[key].get_dtype()} {shape}, expected {dtype or 'a float'} {dims or ''}")


def empty_adapter(file: File, path: str, cfg: AdapterConfig, i: int, o: int) -> Adapter:
    """The adapter of a target on the meta device: its shapes, without memory."""
    try:
        with torch.device("meta"):
            return method_of(cfg)(cfg, i, o)  # type: ignore[call-arg]
    except (
        ValueError,
        RuntimeError,
        TypeError,
        OverflowError,
    ) as error:  # the last three: sizes beyond what torch can count
        raise file.error(f"{path}: {str(error).splitlines()[0]}") from error


def checksum(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over the metadata and every tensor's name, dtype, shape and bytes."""
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for key in sorted(tensors):
        value = tensors[key].contiguous()
        digest.update(f"{key}:{value.dtype}:{tuple(value.shape)}".encode())
        digest.update(value.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
