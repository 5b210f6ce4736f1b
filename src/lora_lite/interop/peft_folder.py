"""A folder as peft writes it: settings as JSON, tensors as safetensors; read under limits, and written whole."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from lora_lite.errors import CheckpointError, StateError
from lora_lite.files.atomic import expanded, file_status, write_atomically
from lora_lite.files.format import Room
from lora_lite.interop.safetensors_folder import read_json

SETTINGS, TENSORS, CARD = "adapter_config.json", "adapter_model.safetensors", "README.md"
PICKLES = ("adapter_model.bin", "adapter_model.pt")
PREFIX = "base_model.model."
MARK = "tags: [lora-lite]"  # of a card that we wrote
MOST_SETTINGS = 4 * 2**20  # bytes of adapter_config.json


@dataclass(frozen=True)
class PeftFolder:
    """A folder that was read: its settings, and its tensors by key, without the prefix that all keys have."""

    where: Path
    settings: dict[str, Any]
    tensors: dict[str, Tensor]

    def error(self, message: object) -> CheckpointError:
        return CheckpointError(f"{self.where}: {message}")


def read_folder(folder: str | os.PathLike[str], room: Room) -> PeftFolder:
    """Read a folder, no more than the model has room for. Raises `CheckpointError`, `FileNotFoundError`."""
    where = expanded(folder)
    if not where.is_dir():
        raise FileNotFoundError(f"no folder at {where}; give the one that holds {SETTINGS}")
    _refuse_what_is_no_file(where)
    settings = _settings(where)
    try:
        with safe_open(where / TENSORS, framework="pt") as handle:
            slices = {key: handle.get_slice(key) for key in handle.keys()}  # noqa: SIM118 (it is no dict)
            values = sum(torch.Size(each.get_shape()).numel() for each in slices.values())
            if values > room.values or len(slices) > 100 + 8 * (len(room.layers) + len(room.parameters)):
                raise CheckpointError(
                    f"{where}: holds {values:,} values in {len(slices):,} tensors, more than any adapter of this model"
                )
            tensors = {key: handle.get_tensor(key).clone() for key in slices}
    except SafetensorError as error:
        raise CheckpointError(f"{where / TENSORS}: is no whole safetensors file ({error}); copy it again") from error
    folder_ = PeftFolder(where, settings, {key.removeprefix(PREFIX): value for key, value in tensors.items()})
    if len(folder_.tensors) < len(tensors):
        raise folder_.error(f"holds keys with and without {PREFIX!r} that name the same tensor")
    if not tensors:
        raise folder_.error("holds no tensor")
    if odd := [key for key, value in folder_.tensors.items() if not value.is_floating_point()]:
        raise folder_.error(f"{odd[0]} has dtype {folder_.tensors[odd[0]].dtype}, which no adapter has")
    if bad := [key for key, value in folder_.tensors.items() if not torch.isfinite(value.float()).all()]:
        raise folder_.error(f"{bad[0]} is not finite (of {len(bad)} such tensors)")
    return folder_


def _refuse_what_is_no_file(where: Path) -> None:
    there = {name: where / name for name in (SETTINGS, TENSORS)}
    pickled = [name for name in PICKLES if (where / name).exists()]
    if not there[TENSORS].exists() and pickled:
        raise CheckpointError(
            f"{where / pickled[0]}: is a pickle, which can run any code when it is read; save it as safetensors where "
            "you trust it (peft: model.save_pretrained(folder))"
        )
    for path in there.values():
        if not path.exists():
            raise FileNotFoundError(f"no {path.name} in {where}; a folder that peft wrote holds {' and '.join(there)}")
        if not path.is_file():
            raise CheckpointError(f"{path}: is no regular file")


def _settings(where: Path) -> dict[str, Any]:
    path = where / SETTINGS
    if path.stat().st_size > MOST_SETTINGS:
        raise CheckpointError(f"{path}: has {path.stat().st_size:,} bytes, more than the settings of an adapter need")
    return read_json(path, "copy the folder again")


@contextmanager
def new_folder(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary folder, whose files are moved to `folder` if all goes well.

    The settings go last, and former ones first: a folder that is only half replaced does not load. Raises
    `CheckpointError` where `folder` holds anything but an earlier export.
    """
    where = expanded(folder)
    if where.exists() and not where.is_dir():
        raise CheckpointError(f"{where} is a file; give a folder")
    if where.is_dir() and (others := sorted({each.name for each in where.iterdir()} - {SETTINGS, TENSORS, CARD})):
        raise CheckpointError(f"{where} holds other files ({', '.join(others[:3])}); give a new folder")
    for name in (SETTINGS, TENSORS, CARD):
        file_status(where / name)
    if where.is_dir() and any(where.iterdir()) and MARK not in _beginning(where / CARD):
        raise CheckpointError(f"{where} holds files that are no earlier export of ours; give a new folder")
    scratch = Path(tempfile.mkdtemp(prefix="lora-lite-"))
    try:
        yield scratch
        (where / SETTINGS).unlink(missing_ok=True)
        for name in (TENSORS, CARD, SETTINGS):
            write_atomically(where / name, (scratch / name).read_bytes())
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _beginning(path: Path) -> str:
    """The first characters of a file; empty where there is none."""
    return path.read_bytes()[:400].decode("utf-8", "replace") if path.is_file() else ""


def write_folder(where: Path, settings: Mapping[str, Any], tensors: Mapping[str, Tensor], card: str) -> None:
    """Write the files of a folder that is there. Raises `StateError` for tensors that are not finite."""
    if bad := [key for key, value in tensors.items() if not torch.isfinite(value).all()]:
        raise StateError(f"export_peft: {bad[0]} is not finite (of {len(bad)} such tensors); nothing was written")
    values = {f"{PREFIX}{key}": value.detach().to("cpu", copy=True).contiguous() for key, value in tensors.items()}
    (where / SETTINGS).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", "utf-8")
    (where / TENSORS).write_bytes(to_bytes(values, {"format": "pt"}))
    (where / CARD).write_text(card, "utf-8")
