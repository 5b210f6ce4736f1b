"""Which files of a folder are a split's, by their names."""

import re
from pathlib import Path

from lora_lite.lab.tasks.row_files import CorpusError, row_format

_SHARD = re.compile(r"-(?P<number>\d{5})-of-(?P<count>\d{5})$")
_NAMES = {"train": ("train", "training"), "validation": ("validation", "valid", "val", "dev"), "test": ("test",)}
DEPTH = 3  # folders below the one given in which a split's file is looked for


def split_files(folder: Path, split: str) -> list[Path]:
    """The file of a folder that is a split's by its whole name, such as train.jsonl, or all its numbered shards.

    "train_socratic.jsonl" and "train.old.jsonl" are not "train". Where none of the folder's own files is, those of the
    folders below it are looked at. A folder with one file alone has it as its training rows. Empty if there is none.
    Raises CorpusError if several could be meant, or a shard is missing.
    """
    names = _NAMES.get(split, (split,))
    for depth in range(DEPTH + 1):
        there = sorted(
            path for path in folder.glob("/".join(["*"] * (depth + 1))) if path.is_file() and row_format(path)
        )
        found = [path for path in there if _stem(path) in names]
        if not found and split == "train" and len(there) == 1 and depth == 0 and _stem(there[0]) not in _held_out():
            found = there
        sets = {(path.parent, _SHARD.sub("", path.name.split(".")[0])) for path in found}
        whole = len(found) == 1 or all(_SHARD.search(path.name.split(".")[0]) for path in found)
        if len(sets) > 1 or not whole:
            listed = ", ".join(str(path.relative_to(folder)) for path in found)
            raise CorpusError(f"{str(folder)!r} has several files that could be its split {split}: {listed}; name one")
        if found:
            _require_all_shards(found)
            return found
    return []


def _require_all_shards(found: list[Path]) -> None:
    """Raise CorpusError if the shards' own names tell of others that are not there, or that do not fit."""
    shards = [(path, match) for path in found if (match := _SHARD.search(path.name.split(".")[0]))]
    if not shards:
        return
    path, match = shards[0]
    counts = sorted({int(match["count"]) for _, match in shards})
    if len(counts) > 1:
        raise CorpusError(f"{str(path.parent)!r} has shards of {counts[0]} and of {counts[-1]}; keep those of one set")
    there = {int(match["number"]) for _, match in shards}
    if missing := [number for number in range(counts[0]) if number not in there]:
        name = path.name.replace(match[0], f"-{missing[0]:05d}-of-{counts[0]:05d}")
        raise CorpusError(
            f"{str(path.parent / name)!r} is missing: {len(there)} of {counts[0]} shards of that split are there; "
            "fetch it, or name the one file to be read"
        )


def _held_out() -> set[str]:
    return {name for split in ("validation", "test") for name in _NAMES[split]}


def _stem(path: Path) -> str:
    """The name without its format, in lower case: "train.old" of "train.old.jsonl.gz"."""
    name = re.sub(r"\.gz$", "", path.name.lower())
    return _SHARD.sub("", name.rpartition(".")[0])
