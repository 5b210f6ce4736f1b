"""Quantised layers of bitsandbytes and torchao on the CPU: attach, train, save, load, merge, unmerge.

On a CPU with AVX-512 bf16 bitsandbytes packs 4-bit weights in the first eval forward. "Linear4bit-packed" has them
packed by the same function on every CPU; its sizes are those that the packed kernel takes.
"""

import copy
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from torch import nn

import lora_lite as ll
from helpers import METHODS, attached, bits, calibration, relative, same_bits, tiny, train
from lora_lite.layers.linear import dense
from lora_lite.layers.packing import forbid_packing
from quantized_models import KINDS, QUANTIZED, ROUNDS_INPUTS, H, I, Net, O, bare, four_bit, inputs, net, output, packed


@pytest.mark.parametrize("kind", KINDS)
def test_dense_is_the_librarys_own_weight(kind: str) -> None:
    """What the layer itself makes of the identity, less its bias."""
    model = bare(net(kind))
    # bitsandbytes multiplies int8 products by 6.200124e-05, which is 1/127^2 to 1.8e-5 only.
    tolerance = 2e-5 if kind == "Linear8bitLt" else 1e-6
    for layer, i in ((model.first, I), (model.second, H)):
        own = (output(layer, torch.eye(i)) - output(layer, torch.zeros(1, i))).T
        assert dense(layer).dtype == torch.float32
        assert float((dense(layer) - own).abs().max() / own.abs().max()) <= tolerance
        assert dense(layer, torch.float64).dtype == torch.float64


def test_dense_of_8_bits_is_the_librarys_dequantisation() -> None:
    layer: Any = net("Linear8bitLt").first
    scales = layer.state.SCB if layer.weight.SCB is None else layer.weight.SCB
    own = bitsandbytes.functional.int8_vectorwise_dequant(layer.weight.data, scales)
    assert relative(dense(layer), own) <= 1e-7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_attach_changes_nothing(method: str, kind: str, dtype: torch.dtype) -> None:
    model, x = net(kind, dtype), inputs(dtype)
    before, y = bits(model), output(bare(model), x)
    cfg = tiny(method, **QUANTIZED)
    cls = ll.methods()[method]
    att = ll.attach(model, cfg, calibration(cfg, [x]))
    with ll.scale(model, 1.0 if cls.facts.trained else 0.0):
        error = float((output(model, x) - y).abs().max() / y.abs().max())
    bound = cls.identity_bound(cfg, dtype)
    if bound and kind in ROUNDS_INPUTS:  # a last bit of the input may turn into one of the 127 steps
        bound = max(bound, 1 / 127)
    assert error <= 4 * bound  # 0 where the method says so; else the bound is for one layer
    assert len(att.targets) == 2
    assert same_bits(before, model)
    ll.detach(model)
    assert torch.equal(output(bare(model), x), y)
    assert same_bits(before, model)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_trains_saves_and_loads(method: str, kind: str, tmp_path: Path) -> None:
    model, x = net(kind), inputs()
    before, y = bits(model), output(bare(model), x)
    cfg = tiny(method, **QUANTIZED)
    att = ll.attach(model, cfg, calibration(cfg, [x]))
    start = [p.detach().clone() for adapter in att.targets.values() for p in adapter.parameters()]
    if ll.methods()[method].facts.trained:
        train(model, x, steps=2)
        now = [p for adapter in att.targets.values() for p in adapter.parameters()]
        assert all(torch.isfinite(p).all() for p in now)
        assert not any(torch.equal(old, new) for old, new in zip(start, now, strict=True))
    trained = output(model, x)
    assert relative(trained, y) > 1e-5
    assert same_bits(before, model)
    ll.save(model, tmp_path / "adapter.safetensors")
    fresh = net(kind)
    ll.load(fresh, tmp_path / "adapter.safetensors")
    assert torch.equal(output(fresh, x), trained)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", [name for name in METHODS if ll.methods()[name].facts.affine])
def test_merges_into_plain_layers_and_back(method: str, kind: str, dtype: torch.dtype) -> None:
    model, x = net(kind, dtype), inputs(dtype)
    attached(model, method, [x], **QUANTIZED)
    layers = {"first": model.first, "second": model.second}
    before, y = bits(model), output(model, x)
    exact = plain_copy(model)
    promised = ll.merged_weights(model)
    report = ll.merge(model)
    eps = torch.finfo(dtype).eps
    for path, bias in (("first", True), ("second", False)):
        merged = model.get_submodule(path)
        assert type(merged) is nn.Linear and merged.weight.dtype == dtype
        assert (merged.bias is not None) == bias
        assert not any(p.requires_grad for p in merged.parameters(recurse=False))
        assert torch.equal(merged.weight, promised[f"{path}.weight"])
        assert report[path].rounding <= eps / 2
        assert report[path].error <= (4 / 127 if kind in ROUNDS_INPUTS else 4 * eps)
    # Against an fp64 model of the dequantised weights, with the same adapters.
    assert relative(output(model, x).double(), output(exact, x.double())) <= 8 * eps
    assert relative(output(model, x), y) <= (4 / 127 if kind in ROUNDS_INPUTS else 8 * eps)
    ll.unmerge(model)
    assert all(model.get_submodule(path) is layer for path, layer in layers.items())
    assert same_bits(before, model)
    assert torch.equal(output(model, x), y)


def plain_copy(model: Net) -> nn.Module:
    """The model with plain fp64 layers in the place of quantised ones, and copies of their adapters."""
    memo: dict[int, Any] = {}
    for path in ("first", "second"):
        layer = model.get_submodule(path)
        plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, dtype=torch.float64)
        with torch.no_grad():
            plain.weight.copy_(dense(layer))
            if layer.bias is not None:
                plain.bias.copy_(layer.bias)
        plain.lora = copy.deepcopy(layer.lora, memo)
        for key in ("_forward_hooks", "_forward_pre_hooks"):
            getattr(plain, key).update(getattr(layer, key))
            getattr(plain, f"{key}_with_kwargs").update(getattr(layer, f"{key}_with_kwargs"))
        memo[id(layer)] = plain
    wide = copy.deepcopy(model, memo)
    wide.head.double()
    return wide


@pytest.mark.parametrize("kind", KINDS)
def test_merging_for_good_leaves_plain_layers(kind: str) -> None:
    model, x = net(kind), inputs()
    attached(model, "lora", **QUANTIZED)
    ll.merge(model, keep=False)
    assert {type(module) for module in model.children()} == {nn.Linear}
    assert set(model.state_dict()) == {"first.weight", "first.bias", "second.weight", "head.weight", "head.bias"}
    assert torch.isfinite(output(model, x)).all()


def test_a_weight_that_is_not_quantised_yet_is_refused() -> None:
    layer = bitsandbytes.nn.Linear4bit(I, H)  # only moving it to a device quantises it
    model = nn.Sequential(layer)
    with pytest.raises(ll.TargetError, match="not quantised yet; move the model to its device"):
        ll.attach(model, tiny("dora"))
    assert not hasattr(layer, "lora")


@pytest.mark.parametrize(
    "options",
    [
        {"quant_type": "nf4"}, {"quant_type": "fp4"}, {"compress_statistics": False},
        {"quant_storage": torch.bfloat16}, {"quant_storage": torch.float32, "compress_statistics": False},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_packing_does_not_change_what_is_read(dtype: torch.dtype, options: dict[str, Any]) -> None:
    """But for its scales, which packing rounds to bf16."""
    torch.manual_seed(0)
    plain = nn.Linear(I, H, dtype=dtype)
    layer = four_bit(plain, **options)
    exact = dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
    assert torch.equal(dense(layer), exact)
    scales = exact.reshape(-1, 64).abs().amax(1, keepdim=True)
    layer = packed(plain, **options)
    rounded = exact.reshape(-1, 64) / scales * scales.bfloat16().float()
    assert relative(dense(layer), rounded.reshape(exact.shape)) <= torch.finfo(dtype).eps
    assert layer.weight.quant_state.packing_format_for_cpu  # reading unpacks nothing
    seen = dense(layer)
    forbid_packing(layer)
    assert torch.equal(dense(layer), seen)
    x = inputs(dtype)
    assert relative(output(layer, x), x @ seen.to(dtype).T + layer.bias) <= torch.finfo(dtype).eps


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("target", ["first", "second"])
def test_packing_does_not_cut_gradients(target: str, training: bool) -> None:
    """In the README's order: attach, check (which ends in eval mode), train; through layers that are no targets too."""
    model, x = net("Linear4bit-packed"), inputs()
    exact = nn.Sequential(*[nn.Linear(i, o, b) for i, o, b in ((I, H, True), (H, O, False), (O, 8, True))])
    with torch.no_grad():
        for path, plain in zip(("first", "second", "head"), exact, strict=True):
            plain.weight.copy_(dense(model.get_submodule(path)))
            if plain.bias is not None:
                plain.bias.copy_(model.get_submodule(path).bias)
    att = attached(model, "lora", target_names=(target,))
    ll.check(model, [x])
    output(model, x)
    model.train(training)
    model(x).square().mean().backward()
    A, B = (p.detach().clone().requires_grad_() for p in (att.targets[target].A, att.targets[target].B))
    scaling = att.targets[target].cfg.scaling
    h = exact[0](x) + (scaling * x @ A.T @ B.T if target == "first" else 0)
    y = exact[1](h.tanh()) + (scaling * h.tanh() @ A.T @ B.T if target == "second" else 0)
    exact[2](y.relu()).square().mean().backward()
    for found, wanted in ((att.targets[target].A, A), (att.targets[target].B, B)):
        assert relative(found.grad, wanted.grad) <= 1e-5


def test_packing_is_allowed_again_once_nothing_is_attached(tmp_path: Path) -> None:
    model = net("Linear4bit-packed")

    def allowed() -> set[bool]:
        return {model.first.support_avx512bf16_for_cpu, model.second.support_avx512bf16_for_cpu}

    with pytest.raises(ll.CalibrationError):
        ll.attach(model, tiny("eva", **QUANTIZED), [])
    assert allowed() == {True}
    ll.attach(model, tiny("lora", **QUANTIZED))
    path = ll.save(model, tmp_path / "adapter.safetensors")
    ll.attach(model, tiny("ia3", target_names=("first",)), name="other")
    ll.detach(model, "default")
    assert allowed() == {False}
    ll.detach(model)
    assert allowed() == {True}
    ll.load(model, path)
    assert allowed() == {False}
    ll.detach(model)
    assert allowed() == {True}
    model.first.support_avx512bf16_for_cpu = model.second.support_avx512bf16_for_cpu = False
    ll.attach(model, tiny("lora", **QUANTIZED))
    ll.detach(model)
    assert allowed() == {False}


def test_a_layer_that_lost_the_class_of_its_weight_is_read_as_4_bits() -> None:
    """As sharding does with a float storage; bitsandbytes itself recovers it from the layer in the next forward."""
    torch.manual_seed(0)
    layer = four_bit(nn.Linear(I, H), quant_storage=torch.float32)
    W = dense(layer)
    layer.weight = nn.Parameter(layer.weight.data.clone(), requires_grad=False)
    assert torch.equal(dense(layer), W)


def test_merging_keeps_the_dtype_of_activations() -> None:
    """Not that in which a 4-bit layer computes: it returns its input's."""
    plain = nn.Linear(I, H)
    model, x = nn.Sequential(nn.LayerNorm(I), four_bit(plain, compute_dtype=torch.bfloat16)).eval(), inputs()
    attached(model, "lora")
    y = output(model, x)
    report = ll.merge(model)
    assert model[1].weight.dtype == torch.float32 and output(model, x).dtype == torch.float32
    assert 0 < relative(output(model, x), y) <= 0.01 and 0 < report["1"].error <= 0.01
