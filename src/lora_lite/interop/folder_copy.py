"""A new folder for a model, made from another one: copied whole, and given tensors that the other has not."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from secrets import token_hex
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from lora_lite.errors import CheckpointError
from lora_lite.files.atomic import expanded, sync_folder
from lora_lite.interop.safetensors_folder import INDEX, SINGLE, SafetensorsFolder, read_json

FIRST, ADDED = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
UNTIED = "model-untied.safetensors"
# Other copies of the weights, which would be the unmerged ones; and sums over files that are no longer the same.
STALE = (
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".onnx_data", ".pkl",
    "checksums.json",
)  # fmt: skip


@contextmanager
def new_sibling(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary folder beside `folder`, which takes its place if all goes well; else nothing is left.

    Raises `CheckpointError` where `folder` is a file, or holds anything.
    """
    where = Path(os.path.abspath(expanded(folder)))
    if where.is_dir() and any(where.iterdir()):
        raise CheckpointError(f"{where} is there already and holds files; give a new folder")
    if where.exists() and not where.is_dir():
        raise CheckpointError(f"{where} is a file; give a new folder")
    where.parent.mkdir(parents=True, exist_ok=True)
    scratch = where.parent / f".{where.name[:100]}.{token_hex(8)}.tmp"
    try:
        scratch.mkdir()
        yield scratch
        if where.is_dir():
            where.rmdir()
        scratch.rename(where)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    sync_folder(where.parent)


def copy_folder(source: SafetensorsFolder, to: Path) -> list[str]:
    """Copy a model's folder, its weights and all files beside them; other copies of the weights, which are left out,
    are returned by name."""
    left_out: list[str] = []
    for folder, inner, names in os.walk(source.where):
        inner[:] = sorted(each for each in inner if not each.startswith("."))
        for name in sorted(names):
            path = (Path(folder) / name).relative_to(source.where)
            if str(path) not in source.files and name.lower().endswith(STALE):
                left_out.append(str(path))
                continue
            (to / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source.where / path, to / path)
    return left_out


def add_tensors(folder: SafetensorsFolder, added: Mapping[str, Tensor]) -> None:
    """Give a folder tensors that it has not: one more shard, and the index."""
    where, places = folder.where, {key: each.file for key, each in folder.tensors.items()}
    index: dict[str, Any] = {"metadata": {"total_size": sum(each.nbytes for each in folder.tensors.values())}}
    if (where / INDEX).is_file() and not (where / SINGLE).is_file():
        index, name = read_json(where / INDEX), UNTIED
    else:  # one file would be read without a look at the index, so it becomes a shard
        (where / SINGLE).rename(where / FIRST)
        places, name = dict.fromkeys(places, FIRST), ADDED
    save_file({key: value.contiguous() for key, value in added.items()}, where / name, {"format": "pt"})
    metadata = index.get("metadata")
    metadata = dict(metadata) if isinstance(metadata, dict) else {}
    for key, more in (("total_size", lambda t: t.nbytes), ("total_parameters", lambda t: t.numel())):
        if isinstance(metadata.get(key), int):
            metadata[key] += sum(map(more, added.values()))
    index = {"metadata": metadata, "weight_map": {**places, **dict.fromkeys(added, name)}}
    (where / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", "utf-8")
