"""Merging a file into a folder: the bits of merging in memory, read by plain transformers; and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import lora_lite as ll
from helpers import perturb
from lora_lite.interop.merged_folder import merge_folder
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("name", "changes", "configs", "untied"),
    [
        ("llama", {}, [LORA], False),
        ("llama", {}, [HEAD], False),
        ("llama", {"tie_word_embeddings": True}, [LORA], False),
        ("llama", {"tie_word_embeddings": True}, [HEAD], True),
        ("qwen2", {}, [ll.DoRAConfig(r=2)], False),
        ("qwen2", {}, [ll.IA3Config(target_names=("k_proj",))], False),
        ("gpt2", {}, [ll.PiSSAConfig(r=2)], False),
        ("gpt2", {}, [ll.LoRAConfig(r=2, target_names=("lm_head", "c_attn"), target_roles=())], True),
        ("gpt_neox", {}, [ll.HRAConfig(r=2)], False),
    ],
)
def test_the_folder_has_the_bits_of_merging_in_memory(
    name: str, changes: dict[str, Any], configs: list[Any], untied: bool, dtype: torch.dtype, tmp_path: Path
) -> None:
    base = saved(make(name, **changes), tmp_path / "base", dtype)
    adapter = adapter_of(base, *configs)
    before = {path: (base / path).read_bytes() for path in files(base)}
    done = merge_folder(base, adapter, tmp_path / "out")
    merged, expected = read(tmp_path / "out"), in_memory(base, adapter)
    assert same(merged, expected) and not same(merged, read(base))
    tied = merged.get_output_embeddings().weight is merged.get_input_embeddings().weight
    assert tied == (merged.config.tie_word_embeddings and not untied) and bool(done.untied) == untied
    assert done.agreement is not None and done.agreement.error < done.agreement.change / 2
    assert (0 < done.mean <= done.worst[1] < 2**-8) if dtype == torch.bfloat16 else done.worst[1] < 1e-7
    assert before == {path: (base / path).read_bytes() for path in files(base)}
    added = {"model-untied.safetensors"} if untied else set()
    assert files(tmp_path / "out") == files(base) - {"pytorch_model.bin"} | added
    assert done.left_out == ("pytorch_model.bin",) and sorted(tmp_path.glob(".*")) == []
    assert len(list(base.glob("model-*.safetensors"))) > 1
