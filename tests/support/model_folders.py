"""Folders of tiny models and adapters of them, to be merged."""

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

import lora_lite as ll
from helpers import perturb
from zoo import ARCHITECTURES

SHARD = "20KB"


def saved(model: Any, folder: Path, dtype: torch.dtype = torch.float32, shard: str = SHARD) -> Path:
    """A model's folder, in shards, with files of other kinds."""
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "code").mkdir()
    (folder / "code" / "own.py").write_text("x = 1\n")
    (folder / "pytorch_model.bin").write_bytes(b"the weights once more")
    return folder


def adapter_of(folder: Path, *configs: Any, also: tuple[str, ...] = (), size: float = 0.05) -> Path:
    """A file of an adapter for the model in the folder."""
    model = read(folder)
    att = ll.attach(model, list(configs), train_also=also)
    perturb(att.targets.values(), size)
    with torch.no_grad():
        for value in att.also.values():
            value.add_(0.1)
    return ll.save(model, folder.parent / "adapter.safetensors")


def read(folder: Path) -> Any:
    name = json.loads((folder / "config.json").read_text())["architectures"][0]
    return getattr(transformers, name).from_pretrained(folder).eval()


def in_memory(folder: Path, adapter: Path, c: float = 1.0) -> nn.Module:
    model = read(folder)
    ll.load(model, adapter)
    with ll.scale(model, c):
        ll.merge(model, keep=False)
    return model


def same(found: nn.Module, expected: nn.Module) -> bool:
    one, other = (dict(model.named_parameters(remove_duplicate=False)) for model in (found, expected))
    assert one.keys() == other.keys()
    return all(torch.equal(value, other[key]) and value.dtype == other[key].dtype for key, value in one.items())


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def make(name: str, **changes: Any) -> Any:
    arch = ARCHITECTURES[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        settings = {**arch.settings, **changes}
        model = getattr(transformers, arch.model)(getattr(transformers, arch.config)(**settings))
    with torch.no_grad():
        for key, p in model.named_parameters():
            if key.endswith("bias"):
                p.normal_(generator=torch.Generator().manual_seed(0))
    return model


LORA = ll.LoRAConfig(r=2)
HEAD = ll.LoRAConfig(r=2, target_names=("lm_head", "q_proj"), target_roles=())
