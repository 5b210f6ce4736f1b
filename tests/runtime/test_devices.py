"""A base that accelerate spreads: adapters live where their layer computes, and offloaded weights are refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from accelerate.hooks import AlignDevicesHook, add_hook_to_module

import lora_lite as ll
from helpers import METHODS, OneLayer, attached, bits, same_bits, tiny, tiny_llama, token_ids, train

IDS = token_ids()


def spread(**device_map: str) -> Any:
    return dispatch_model(tiny_llama(num_hidden_layers=1), device_map=device_map, main_device="cpu", force_hooks=True)


ON_CPU = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}


@pytest.mark.parametrize("method", METHODS)
def test_a_dispatched_model(method: str, tmp_path: Path) -> None:
    plain, model = tiny_llama(num_hidden_layers=1), spread(**{"": "cpu"})
    assert hasattr(model.model.layers[0].self_attn.q_proj, "_hf_hook")
    for each in (plain, model):
        attached(each, method, [IDS])
    assert torch.equal(model(IDS).logits, plain(IDS).logits)
    before = bits(model.model.embed_tokens)
    if ll.methods()[method].facts.trained:
        train(model, IDS)
    assert same_bits(before, model.model.embed_tokens)
    path = ll.save(model, tmp_path / "a.safetensors")
    fresh = spread(**{"": "cpu"})
    ll.load(fresh, path)
    assert torch.equal(fresh(IDS).logits, model(IDS).logits)
    ll.detach(model)
    assert torch.equal(model(IDS).logits, tiny_llama(num_hidden_layers=1)(IDS).logits)


def test_offloaded_layers_are_refused_as_targets_alone(tmp_path: Path) -> None:
    device_map = {**ON_CPU, "model.layers.0": "cpu", "model.layers.1": "disk"}
    model = dispatch_model(tiny_llama(), device_map=device_map, main_device="cpu", offload_dir=str(tmp_path))
    assert model.model.layers[1].self_attn.q_proj.weight.is_meta
    base = model(IDS).logits
    with pytest.raises(ll.TargetError, match=r"layers\.1\.self_attn\.q_proj: its weight is on the meta"):
        ll.attach(model, ll.LoRAConfig(r=2))
    assert not any("lora" in path for path, _ in model.named_modules())
    assert torch.equal(model(IDS).logits, base)
    att = attached(model, "lora", layers=(0,))  # the others run as they are
    assert all(path.startswith("model.layers.0.") for path in att.targets)
    plain = tiny_llama()
    attached(plain, "lora", layers=(0,))
    assert torch.equal(model(IDS).logits, plain(IDS).logits)
    assert not torch.equal(model(IDS).logits, base)


def test_load_into_an_offloaded_model_is_refused(tmp_path: Path) -> None:
    model = tiny_llama()
    attached(model, "lora")
    path = ll.save(model, tmp_path / "a.safetensors")
    other = cpu_offload(tiny_llama(), execution_device=torch.device("cpu"))
    with pytest.raises(ll.TargetError, match="its weight is on the meta device"):
        ll.load(other, path)
    assert not any("lora" in path for path, _ in other.named_modules())


@pytest.mark.parametrize("method", METHODS)
def test_a_model_dispatched_after_attach(method: str) -> None:
    """accelerate then puts hooks on the adapters as well, which see the layer among their arguments."""
    model = tiny_llama(num_hidden_layers=1)
    att = attached(model, method, [IDS])
    expected = model(IDS).logits
    dispatched = dispatch_model(model, device_map={"": "cpu"}, main_device="cpu", force_hooks=True)
    assert all(hasattr(adapter, "_hf_hook") for adapter in att.targets.values())
    assert torch.equal(dispatched(IDS).logits, expected)
    ll.detach(dispatched)
    assert torch.equal(dispatched(IDS).logits, tiny_llama(num_hidden_layers=1)(IDS).logits)


@pytest.mark.parametrize("method", METHODS)
def test_adapters_go_where_the_layer_computes(method: str) -> None:
    """Which is the hook's device, not the weight's. "meta" stands for the accelerator that tests do not have."""
    model, cfg = OneLayer(16, 24, dtype=torch.float32), tiny(method)
    if ll.methods()[method].needs(cfg):
        return  # its calibration would have to run on that device
    add_hook_to_module(model.layer, AlignDevicesHook(execution_device="meta"))
    model.layer.weight = torch.nn.Parameter(torch.randn(24, 16))  # the hook has moved them: back to the CPU
    model.layer.bias = torch.nn.Parameter(torch.randn(24))
    att = ll.attach(model, cfg)
    tensors = [*att.targets["layer"].parameters(), *att.targets["layer"].buffers()]
    assert tensors and all(tensor.is_meta for tensor in tensors)


@pytest.mark.parametrize("method", ["lora", "ia3", "hra", "pissa"])
def test_a_model_offloaded_after_attach(method: str) -> None:
    """accelerate's hooks on the adapters move what they are called with, but not the layer."""
    model = tiny_llama(num_hidden_layers=1)
    attached(model, method, [IDS])
    expected = model(IDS).logits
    assert torch.equal(cpu_offload(model, execution_device=torch.device("cpu"))(IDS).logits, expected)


def test_a_method_that_reads_an_offloaded_weight_says_so() -> None:
    model = tiny_llama(num_hidden_layers=1)
    attached(model, "dora", [IDS])
    with pytest.raises(ll.TargetError, match="the weight is offloaded"):
        cpu_offload(model, execution_device=torch.device("cpu"))(IDS)
