"""Merging a file into a folder: the bits of merging in memory, read by plain transformers, in little memory."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open

import lora_lite as ll
from helpers import perturb
from lora_lite.interop.merged_folder import merge_folder
from model_folders import HEAD, LORA, SHARD, adapter_of, files, in_memory, make, read, same, saved


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
        ("t5", {}, [ll.LoRAConfig(r=2, target_names=("lm_head", "k"), target_roles=())], True),
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


def test_a_coefficient_is_merged_and_what_was_trained_as_well_replaces_the_folders(tmp_path: Path) -> None:
    base = saved(make("llama", tie_word_embeddings=True), tmp_path / "base")
    adapter = adapter_of(base, LORA, also=("embed_tokens", "model.norm"))
    done = merge_folder(base, adapter, tmp_path / "out", c=0.5)
    merged = read(tmp_path / "out")
    assert same(merged, in_memory(base, adapter, 0.5)) and not same(merged, in_memory(base, adapter, 1.0))
    assert merged.lm_head.weight is merged.model.embed_tokens.weight and done.untied == ()
    assert set(done.replaced) == {"model.embed_tokens.weight", "model.norm.weight"}
    assert "replaced as well: model." in str(done) and "no longer tied" not in str(done)


def test_one_file_becomes_two_shards_where_a_tensor_is_added(tmp_path: Path) -> None:
    base = saved(make("llama", tie_word_embeddings=True), tmp_path / "base", shard="1GB")
    assert (base / "model.safetensors").is_file()
    adapter = adapter_of(base, HEAD)
    done = merge_folder(base, adapter, tmp_path / "out")
    assert same(read(tmp_path / "out"), in_memory(base, adapter)) and done.untied == ("lm_head.weight",)
    shards = {path.name for path in (tmp_path / "out").glob("*.safetensors")}
    assert shards == {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"}
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    stored = {}
    for shard in shards:
        with safe_open(tmp_path / "out" / shard, "pt") as handle:
            stored |= {key: (shard, handle.get_tensor(key)) for key in handle.keys()}  # noqa: SIM118
    assert index["weight_map"] == {key: shard for key, (shard, _) in stored.items()}
    assert index["metadata"]["total_size"] == sum(value.nbytes for _, value in stored.values())


@pytest.mark.parametrize("head", [False, True])
def test_keys_may_lack_the_name_of_the_base_model(head: bool, tmp_path: Path) -> None:
    model = make("gpt2")
    base = saved(model, tmp_path / "base")
    config = (base / "config.json").read_text()
    for path in base.glob("*.safetensors*"):
        path.unlink()
    model.transformer.save_pretrained(base, max_shard_size=SHARD)  # as the hub has GPT-2
    (base / "config.json").write_text(config)
    names = ("lm_head", "c_attn") if head else ("c_attn",)
    adapter = adapter_of(base, ll.LoRAConfig(r=2, target_names=names, target_roles=()))
    merge_folder(base, adapter, tmp_path / "out")
    assert same(read(tmp_path / "out"), in_memory(base, adapter))


def test_moved_running_averages_are_merged(tmp_path: Path) -> None:
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    base = saved(transformers.ResNetForImageClassification(config), tmp_path / "base")
    model = read(base)
    perturb(ll.attach(model, ll.LoRAConfig(r=2, target_names=("classifier",), target_roles=())).targets.values())
    model.train()(torch.randn(4, 3, 32, 32))
    done = merge_folder(base, ll.save(model, tmp_path / "adapter.safetensors"), tmp_path / "out")
    merged = dict(read(tmp_path / "out").named_buffers())
    assert all(torch.equal(value, merged[key]) for key, value in model.named_buffers() if ".lora." not in key)
    assert any(key.endswith("running_mean") for key in done.replaced)
    assert done.unchecked == "nothing tells what the model reads"


MEMORY = """
import resource, sys
import lora_lite as ll
from lora_lite.interop.merged_folder import merge_folder
from pathlib import Path
folder = Path(sys.argv[1])
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
import transformers.models.llama.modeling_llama
before = peak()
done = merge_folder(folder / "base", folder / "adapter.safetensors", folder / "out", check=False)
assert len(done.rounding) == 14 * 7
print((peak() - before) // 1024)
"""


@pytest.mark.slow
def test_peak_memory_is_that_of_a_layer(tmp_path: Path) -> None:
    settings = {"hidden_size": 1024, "intermediate_size": 2730, "num_hidden_layers": 14, "vocab_size": 512}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(num_attention_heads=8, **settings))
    model.save_pretrained(tmp_path / "base", max_shard_size="200MB")
    perturb(ll.attach(model, LORA).targets.values())
    ll.save(model, tmp_path / "adapter.safetensors")
    del model
    size = sum(path.stat().st_size for path in (tmp_path / "base").glob("*.safetensors"))
    env = {**os.environ, "LORA_LITE_NO_TYPECHECK": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", MEMORY, str(tmp_path)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert size > 600e6 and int(done.stdout.split()[-1]) < 250, done.stdout
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 3
