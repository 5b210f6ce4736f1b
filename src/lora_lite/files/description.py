"""What an adapter's file says of itself, without a model: read under fixed limits, for the file may be anybody's."""

import hashlib
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lora_lite.files.format import empty_adapter, opened_alone, verify
from lora_lite.registry import method_of


class _OneByOne(Mapping[str, Tensor]):
    """A file's tensors, each read when it is asked for, and not kept."""

    def __init__(self, handle: Any) -> None:
        self.handle, self.keys_ = handle, list(handle.keys())

    def __getitem__(self, key: str) -> Tensor:
        return self.handle.get_tensor(key)

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys_)

    def __len__(self) -> int:
        return len(self.keys_)


def describe(where: Path) -> dict[str, Any]:
    """What a file holds, as plain data. Raises CheckpointError for one that is damaged, FileNotFoundError for none."""
    with opened_alone(where) as (file, header, sizes, handle):
        tensors = _OneByOne(handle)
        verify(file, header, tensors)
        digest = hashlib.sha256()
        for key in sorted(key for key in tensors if key.endswith(".sketch") and ".lora." not in key):
            digest.update(key.encode() + tensors[key].contiguous().numpy().tobytes())
    trained, frozen, targets = 0, 0, dict[str, int]()
    for path, (_, cfg, (i, o)) in file.targets.items():
        adapter = empty_adapter(file, path, cfg, i, o)
        names = {key for key, _ in adapter.named_parameters()}
        for key, value in adapter.state_dict().items():
            trained, frozen = trained + value.numel() * (key in names), frozen + value.numel() * (key not in names)
        group = f"{method_of(cfg).facts.name} r={cfg.r} {re.sub(r'[0-9]+', '*', path)} ({i} -> {o})"
        targets[group] = targets.get(group, 0) + 1
    also = {key: sizes[f"also.{key}"] for key in file.also}
    return {
        "file": str(where),
        "bytes": where.stat().st_size,
        "version": header["version"],
        "base": {"name": header["base_name"], "fingerprint": digest.hexdigest()[:16]},
        "methods": header["configs"],
        "targets": targets,
        "layers": len(file.targets),
        "trained_values": trained + sum(math.prod(shape) for shape in also.values()),
        "frozen_values": frozen,
        "holds_basis": file.basis,
        "train_also": also,
        "buffers": {key: sizes[f"buffer.{key}"] for key in file.buffers},
    }


def as_text(contents: Mapping[str, Any]) -> str:
    """What `describe` found, for people."""
    methods = [f"{each['method']} (r = {each['config'].get('r')})" for each in contents["methods"]]
    basis = "" if contents["holds_basis"] else ", bases left out: load rebuilds them"
    lines = [
        f"{contents['file']}: {contents['bytes']:,} bytes, written by lora-lite {contents['version']}",
        f"method      {', '.join(methods)}",
        f"base        {contents['base']['name'] or 'no name'}, fingerprint {contents['base']['fingerprint']}",
        f"values      {contents['trained_values']:,} trained, {contents['frozen_values']:,} frozen{basis}",
        f"layers      {contents['layers']:,}",
        *(f"  {count:>4} x {group}" for group, count in contents["targets"].items()),
    ]
    for label in ("train_also", "buffers"):
        lines += [f"{label:<11} {key} {tuple(shape)}" for key, shape in contents[label].items()]
    return "\n".join(lines)
