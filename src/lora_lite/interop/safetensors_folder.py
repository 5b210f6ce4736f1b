"""A folder of safetensors as transformers writes it: one file or shards, read and written a tensor at a time.

A file is 8 bytes of header length, a JSON header {key: {dtype, shape, data_offsets}}, then bytes. A tensor of the same
shape and dtype is written at its offset, so that neither the file nor its other tensors are ever in memory.
"""

import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lora_lite.errors import CheckpointError
from lora_lite.files.atomic import expanded
from lora_lite.files.format import SAFETENSORS_DTYPES

CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
DTYPES = {**SAFETENSORS_DTYPES, "I64": torch.int64}


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies: its file, dtype (None: of no kind that is known here), shape, and first byte."""

    file: str
    dtype: torch.dtype | None
    shape: tuple[int, ...]
    start: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * (self.dtype.itemsize if self.dtype else 1)


@dataclass(frozen=True)
class SafetensorsFolder:
    """A model's folder: where, and the tensors in it by key. Nothing of their values is kept."""

    where: Path
    tensors: dict[str, Stored]

    @property
    def files(self) -> list[str]:
        """The names of the files of weights."""
        return sorted({each.file for each in self.tensors.values()})

    def read(self, key: str) -> Tensor:
        """A tensor of the folder."""
        stored = self.tensors[key]
        data = bytearray(stored.nbytes)
        with open(self.where / stored.file, "rb") as file:
            file.seek(stored.start)
            if file.readinto(data) != len(data):
                raise CheckpointError(f"{self.where / stored.file}: ends within {key}; fetch the model again")
        dtype = self._dtype(key)
        return torch.frombuffer(data, dtype=dtype).reshape(stored.shape) if data else torch.empty(stored.shape)

    def values_at(self, key: str, places: Iterable[int]) -> Tensor:
        """Single values (fp32) of a tensor, by their places in its flat form, without reading the rest."""
        stored, dtype = self.tensors[key], self._dtype(key)
        with open(self.where / stored.file, "rb") as file:
            data = bytearray()
            for place in places:
                file.seek(stored.start + place * dtype.itemsize)
                data += file.read(dtype.itemsize)
        return torch.frombuffer(data, dtype=dtype).float()

    def write(self, key: str, value: Tensor) -> None:
        """Replace a tensor's values by `value`, in the dtype that it is stored in."""
        stored = self.tensors[key]
        if tuple(value.shape) != stored.shape:
            raise CheckpointError(f"{self.where}: {key} is {stored.shape} there, but {tuple(value.shape)} here")
        data = value.detach().to("cpu", self._dtype(key)).contiguous().reshape(-1).view(torch.uint8).numpy().data
        with open(self.where / stored.file, "r+b") as file:
            file.seek(stored.start)
            file.write(data)

    def _dtype(self, key: str) -> torch.dtype:
        if (dtype := self.tensors[key].dtype) is None:
            raise CheckpointError(
                f"{self.where}: {key} is stored in a dtype that nothing can be merged into (quantised?); merge into "
                "the model that it was made from"
            )
        return dtype


def open_folder(folder: str | os.PathLike[str]) -> SafetensorsFolder:
    """The tensors of a model's folder. Raises `FileNotFoundError`, `CheckpointError` for none, or one that is damaged
    or pickled."""
    where = expanded(folder)
    if not (where / CONFIG).is_file():
        raise FileNotFoundError(f"no model at {where} (no {CONFIG}); give a folder that save_pretrained wrote")
    tensors: dict[str, Stored] = {}
    index = None if (where / SINGLE).is_file() else _index(where)
    for name in [SINGLE] if index is None else sorted(set(index.values())):
        tensors |= _header(where, name)
    if lost := [key for key in index or () if key not in tensors or tensors[key].file != (index or {})[key]]:
        raise CheckpointError(f"{where}: {INDEX} names {lost[0]}, which is not there; fetch the model again")
    return SafetensorsFolder(where, tensors)


def _index(where: Path) -> dict[str, str]:
    """Which file holds which tensor."""
    if not (where / INDEX).is_file():
        pickled = sorted(each.name for each in where.iterdir() if each.suffix in (".bin", ".pt", ".pth"))
        if pickled:
            raise CheckpointError(
                f"{where / pickled[0]}: is a pickle, which can run any code when it is read; where you trust it, read "
                "it with transformers and save it again (save_pretrained writes safetensors)"
            )
        raise FileNotFoundError(f"no weights in {where}: neither {SINGLE} nor {INDEX}")
    places = read_json(where / INDEX).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(each, str) for each in places.values()):
        raise CheckpointError(f"{where / INDEX}: has no weight_map; fetch the model again")
    for name in set(places.values()):
        if Path(name).name != name or not (where / name).is_file():
            raise CheckpointError(f"{where / INDEX}: names {name!r}, which is no file beside it; fetch the model again")
    return places


def _header(where: Path, name: str) -> dict[str, Stored]:
    path = where / name
    try:
        with safe_open(path, framework="pt"):  # it checks offsets and sizes
            pass
    except SafetensorError as error:
        raise CheckpointError(f"{path}: is no whole safetensors file ({error}); fetch the model again") from error
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header: dict[str, Any] = json.loads(file.read(size))
    header.pop("__metadata__", None)
    return {
        key: Stored(name, DTYPES.get(each["dtype"]), tuple(each["shape"]), 8 + size + each["data_offsets"][0])
        for key, each in header.items()
    }


def read_json(path: Path, remedy: str = "fetch the model again") -> dict[str, Any]:
    """A JSON file that must hold an object. Raises `CheckpointError`, with the remedy for a damaged one."""
    try:
        read = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: is no JSON ({error}); {remedy}") from error
    if not isinstance(read, dict):
        raise CheckpointError(f"{path}: must hold an object, not a {type(read).__name__}")
    return read
