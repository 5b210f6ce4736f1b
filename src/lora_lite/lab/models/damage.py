"""Which file of a model's folder cannot be read: libraries say what they met there, and seldom where."""

import json
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer

WEIGHTS = (
    "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json",
)  # fmt: skip


def damage(folder: Path) -> str:
    """The first file that is missing or damaged, and how; "" where none is found."""
    return next(_damages(folder), "")


def _damages(folder: Path) -> Iterator[str]:
    if not (folder / "config.json").is_file():
        yield "config.json is missing"
    for path in sorted(folder.glob("*.json")):
        try:
            read = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            yield f"{path.name} is damaged ({error})"
            continue
        if not isinstance(read, dict):
            yield f"{path.name} is damaged (it holds no object, but {type(read).__name__})"
        elif path.name == "tokenizer.json":
            yield from _bad_tokenizer(path)
        elif path.name.endswith(".index.json"):
            yield from _lost_shards(folder, path.name, read.get("weight_map"))
    if not any((folder / name).is_file() for name in WEIGHTS):
        yield "it has no weights (model.safetensors)"
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, "pt"):
                pass
        except (OSError, SafetensorError) as error:
            yield f"{path.name} is damaged or cut off ({error})"


def _bad_tokenizer(path: Path) -> Iterator[str]:
    try:
        Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises no narrower class
        yield f"{path.name} is damaged ({error})"


def _lost_shards(folder: Path, index: str, places: object) -> Iterator[str]:
    names = sorted({str(name) for name in places.values()}) if isinstance(places, dict) else []
    for name in names:
        if not (folder / name).is_file():
            yield f"{name} is missing, which {index} names"
