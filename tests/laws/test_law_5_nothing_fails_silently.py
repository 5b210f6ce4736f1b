"""Law 5. Nothing fails silently: what a model cannot take is an error that says what, where and what to do, and
nothing has changed after it.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import lora_lite as ll
from helpers import anatomy, attached, bits, same_bits, tiny_llama, token_ids

CFG = ll.LoRAConfig(r=2)
IDS = token_ids()


def llama() -> nn.Module:
    return tiny_llama(num_hidden_layers=1)


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def refused(model: nn.Module, error: type[Exception], match: str, call: Callable[[], Any] | None = None) -> None:
    """`call` (attach, if None) raises `error` and leaves the model as it was."""
    before, shape_before = bits(model), anatomy(model)
    with pytest.raises(error, match=match):
        call() if call else ll.attach(model, CFG)
    assert anatomy(model) == shape_before
    assert all(p.is_meta for p in model.parameters()) or same_bits(before, model)


def test_a_name_that_is_taken(tmp_path: Path) -> None:
    model = llama()
    attached(model, "lora")
    ll.save(model, tmp_path / "a.safetensors")
    refused(model, ll.StateError, "named 'default' is attached already; detach it or choose another name")
    refused(model, ll.StateError, "attached already", lambda: ll.load(model, tmp_path / "a.safetensors"))


# The second line: attributes of nn.ModuleDict, under which no module can be kept.
BAD_NAMES = ["", "1st", "a.b", "a b", "a/b", "é", "a\n", "-a"]
BAD_NAMES += ["keys", "items", "values", "pop", "update", "clear", "forward", "training", "register_buffer", "type"]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_bad_name(name: str, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    cfg = ll.LoRAConfig(r=2, target_roles=())
    refused(model, ll.StateError, "adapter name .* must match", lambda: ll.attach(model, cfg, name=name))
    ll.attach(model, cfg)
    path = ll.save(model, tmp_path / "a.safetensors")
    refused(model, ll.StateError, "adapter name .* must match", lambda: ll.load(model, path, name=name))


def test_every_attribute_of_a_module_dict_is_no_name() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    for name in dir(nn.ModuleDict()):
        with pytest.raises(ll.StateError, match=r"no attribute of nn\.ModuleDict"):
            ll.attach(model, ll.LoRAConfig(r=2, target_roles=()), name=name)


@pytest.mark.parametrize("name", ["a", "A_b-c", "_", "lora", "sketch", "weight", "A"])
def test_names_that_work(name: str, tmp_path: Path) -> None:
    model = llama()
    attached(model, "lora", name=name)
    logits = model(IDS).logits
    path = ll.save(model, tmp_path / "a.safetensors", name=name)
    fresh = llama()
    ll.load(fresh, path, name=name)
    assert torch.equal(fresh(IDS).logits, logits)
    ll.detach(model, name)
    assert not torch.equal(model(IDS).logits, logits)


def test_a_wrapped_model(one_process: None) -> None:
    wrapped = nn.parallel.DistributedDataParallel(llama())
    refused(wrapped, ll.StateError, "the model is a DistributedDataParallel: attach first, then wrap")
    refused(nn.DataParallel(llama()), ll.StateError, "the model is a DataParallel: attach first")
    refused(nn.Sequential(wrapped), ll.StateError, "^0 is a DistributedDataParallel")


def test_a_wrapper_put_on_after_attach(one_process: None) -> None:
    model = llama()
    attached(model, "lora")
    wrapped = nn.parallel.DistributedDataParallel(model)
    wrapped(IDS).logits.sum().backward()
    assert ll.attachment(wrapped).targets.keys() == ll.attachment(model).targets.keys()
    assert all(p.grad is not None for a in ll.attachment(model).targets.values() for p in a.parameters())
    with ll.scale(wrapped, 0):
        base = wrapped(IDS).logits
    ll.detach(wrapped)
    assert torch.equal(model(IDS).logits, base)


def test_a_sharded_model(one_process: None) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Replicate, distribute_tensor

    mesh = init_device_mesh("cpu", (1,))
    one, whole = llama(), llama()
    layer = one.model.layers[0].mlp.up_proj
    layer.weight = nn.Parameter(distribute_tensor(layer.weight.data, mesh, [Replicate()]))
    with pytest.raises(ll.StateError, match=r"up_proj\.weight is sharded: attach first, then shard"):
        ll.attach(one, CFG)
    fully_shard(whole, mesh=mesh)
    with pytest.raises(ll.StateError, match=r"the model is a FSDP.*: attach first, then wrap or shard"):
        ll.attach(whole, CFG)
    assert not any("lora" in path for path, _ in [*one.named_modules(), *whole.named_modules()])


def test_inference_mode() -> None:
    model = llama()
    with torch.inference_mode():
        refused(model, ll.StateError, r"under torch.inference_mode", lambda: ll.attach(model, CFG))
        born_there = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(ll.StateError, match=r"under torch.inference_mode"):
        ll.attach(born_there, CFG)
    attached(model, "lora")
    logits = model(IDS).logits
    with torch.inference_mode():
        assert torch.equal(model(IDS).logits, logits)  # running there is fine


def test_meta_weights() -> None:
    with torch.device("meta"):
        nowhere = nn.Sequential(nn.Linear(4, 4))
    cfg = ll.LoRAConfig(r=2, target_roles=())
    refused(nowhere, ll.TargetError, "^0: its weight is on the meta device", lambda: ll.attach(nowhere, cfg))
    model = llama()
    model.lm_head.to("meta")  # not a target: no matter
    model.model.layers[0].self_attn.k_proj.to("meta")
    with pytest.raises(ll.TargetError, match=r"k_proj: its weight is on the meta device"):
        ll.attach(model, CFG)
    att = ll.attach(model, ll.LoRAConfig(r=2, exclude_names=("k_proj", "lm_head")))
    assert not any("k_proj" in path for path in att.targets)


def test_nested_roots() -> None:
    inner = llama()
    attached(inner.model, "lora")
    refused(inner, ll.StateError, "attached to the LlamaModel within this model: pass the same module each time")
    outer = llama()
    attached(outer, "lora")
    refused(outer, ll.StateError, "lies within one that has adapters", lambda: ll.attach(outer.model, CFG, name="b"))
    refused(outer, ll.StateError, "attached to a module around it", lambda: ll.scale(outer.model, 0))


def test_nothing_attached(tmp_path: Path) -> None:
    model = llama()
    calls: list[Callable[[], Any]] = [
        lambda: ll.scale(model, 0),
        lambda: ll.disabled(model),
        lambda: ll.detach(model),
        lambda: ll.save(model, tmp_path / "a.safetensors"),
        lambda: ll.merge(model),
        lambda: ll.unmerge(model),
        lambda: ll.merged_weights(model),
        lambda: ll.check(model, [IDS]),
        lambda: ll.param_groups(model, 1e-3),
        lambda: ll.attachment(model),
    ]
    for call in calls:
        refused(model, ll.StateError, "has no adapters of its own; call attach or load", call)
    attached(model, "lora")
    for call in (lambda: ll.detach(model, "b"), lambda: ll.save(model, tmp_path / "b", name="b")):
        refused(model, ll.StateError, "no adapter is named 'b'; attached: default", call)
    assert not list(tmp_path.iterdir())


def test_while_merged(tmp_path: Path) -> None:
    model = llama()
    attached(model, "lora")
    path = ll.save(model, tmp_path / "a.safetensors")
    ll.merge(model)
    calls: dict[str, Callable[[], Any]] = {
        "attach": lambda: ll.attach(model, CFG, name="b"),
        "detach": lambda: ll.detach(model),
        "save": lambda: ll.save(model, tmp_path / "b"),
        "load": lambda: ll.load(model, path, overwrite=True),
        "scale": lambda: ll.scale(model, 0),
        "merge": lambda: ll.merge(model),
        "merged_weights": lambda: ll.merged_weights(model),
        "check": lambda: ll.check(model, [IDS]),
    }
    for doing, call in calls.items():
        refused(model, ll.StateError, f"^{doing}: the adapters are merged into the weights; call unmerge first", call)


def test_a_layer_with_something_called_lora() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].lora = nn.Parameter(torch.zeros(1))
    cfg = ll.LoRAConfig(r=2, target_roles=())
    refused(model, ll.TargetError, "^1: has an attribute 'lora' of its own", lambda: ll.attach(model, cfg))
