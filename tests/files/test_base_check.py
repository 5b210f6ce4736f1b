"""`load` tells another base model from a copy of the same one in other clothes."""

from collections.abc import Callable
from pathlib import Path

import bitsandbytes
import pytest
import torch
from torch import nn

import lora_lite as ll
from helpers import anatomy, bits, perturb, same_bits, tiny_llama, token_ids
from lora_lite.files.base_check import SKETCH_COSINE, sketch
from lora_lite.runtime.attachment import Attachment

CONFIG = ll.LoRAConfig(r=2)


def llama(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    return tiny_llama(dtype, seed, hidden_size=64, intermediate_size=128)


def fine_tuned(size: float) -> nn.Module:
    """Every weight moved by noise of `size` times its norm, about as far as a full fine-tune or further."""
    model, rng = llama(), torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in model.parameters():
            noise = torch.randn(p.shape, generator=rng)
            p.add_(size * p.norm() / noise.norm() * noise)
    return model


def four_bit(plain: nn.Linear, kind: str) -> nn.Module:
    quantized = bitsandbytes.nn.Linear4bit(
        plain.in_features, plain.out_features, bias=False, compute_dtype=torch.float32, quant_type=kind
    )
    quantized.weight = bitsandbytes.nn.Params4bit(plain.weight.data.clone(), requires_grad=False, quant_type=kind)
    return quantized.to("cpu")


def eight_bit(plain: nn.Linear) -> nn.Module:
    quantized = bitsandbytes.nn.Linear8bitLt(plain.in_features, plain.out_features, bias=False, has_fp16_weights=False)
    quantized.weight = bitsandbytes.nn.Int8Params(plain.weight.data.clone(), requires_grad=False)
    return quantized.to("cpu")


def quantized(make: Callable[[nn.Linear], nn.Module]) -> nn.Module:
    model = llama()
    for path, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and path != "lm_head":
            model.set_submodule(path, make(layer))
    return model


# name -> (the copy, lowest cosine that it may show over all layers)
SAME: dict[str, tuple[Callable[[], nn.Module], float]] = {
    "itself": (llama, 1.0),
    "bf16": (lambda: llama(dtype=torch.bfloat16), 0.9999),
    "fp16": (lambda: llama(dtype=torch.float16), 0.9999),
    "int8": (lambda: quantized(eight_bit), 0.999),
    "nf4": (lambda: quantized(lambda plain: four_bit(plain, "nf4")), 0.98),
    "fp4": (lambda: quantized(lambda plain: four_bit(plain, "fp4")), 0.97),
    "fine-tune of 0.1": (lambda: fine_tuned(0.1), 0.98),
    "fine-tune of 0.3": (lambda: fine_tuned(0.3), 0.90),
}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = llama()
    perturb(ll.attach(model, CONFIG).targets.values())
    return ll.save(model, tmp_path_factory.mktemp("base") / "adapter.safetensors")


def cosines(model: nn.Module) -> dict[str, float]:
    there = llama()
    targets = ll.attach(there, CONFIG).targets
    return {
        key: float(
            torch.cosine_similarity(sketch(model.get_submodule(key), key), sketch(there.get_submodule(key), key), 0)
        )
        for key in targets
    }


@pytest.mark.parametrize("kind", SAME)
def test_a_copy_of_the_same_base_passes(kind: str, path: Path) -> None:
    make, lowest = SAME[kind]
    model = make()
    worst = min(cosines(model).values())
    assert worst > SKETCH_COSINE + 0.05 and worst >= lowest - 1e-6
    att: Attachment = ll.load(model, path)
    assert len(att.targets) == 14
    with torch.no_grad():
        adapted = model(token_ids()).logits
        with ll.disabled(model):
            assert not torch.equal(adapted, model(token_ids()).logits)


@pytest.mark.parametrize("seed", range(1, 6))
def test_another_base_is_refused(seed: int, path: Path) -> None:
    model = llama(seed)
    before, form = bits(model), anatomy(model)
    found = cosines(model)
    assert max(found.values()) < SKETCH_COSINE - 0.2  # not one layer comes near the threshold
    worst = min(found, key=lambda key: found[key])
    words = rf"trained on another base model; worst layer {worst}, cosine {found[worst]:.2f} < 0.8 .*base='any'"
    with pytest.raises(ll.BaseMismatchError, match=words):
        ll.load(model, path)
    assert same_bits(before, model) and anatomy(model) == form
    assert len(ll.load(model, path, base="any").targets) == 14


def test_one_layer_that_differs_is_enough_and_is_named(path: Path) -> None:
    model = llama()
    odd = "model.layers.1.mlp.up_proj"
    nn.init.normal_(model.get_submodule(odd).weight, generator=torch.Generator().manual_seed(0))  # type: ignore[arg-type]
    with pytest.raises(ll.BaseMismatchError, match=f"worst layer {odd}"):
        ll.load(model, path)


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_a_weight_of_nothing_is_another_base(value: float, path: Path) -> None:
    for key in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
        model = llama()
        nn.init.constant_(model.get_submodule(key).weight, value)  # type: ignore[arg-type]
        with pytest.raises(ll.BaseMismatchError, match=f"worst layer {key}"):
            ll.load(model, path)


def test_weights_that_are_zero_in_both_are_the_same(tmp_path: Path) -> None:
    def half_zero() -> nn.Module:
        model = llama()
        nn.init.zeros_(model.get_submodule("model.layers.0.self_attn.q_proj").weight)  # type: ignore[arg-type]
        return model

    model = half_zero()
    ll.attach(model, CONFIG)
    path = ll.save(model, tmp_path / "adapter.safetensors")
    assert len(ll.load(half_zero(), path).targets) == 14
    with pytest.raises(ll.BaseMismatchError, match=r"worst layer model\.layers\.0\.self_attn\.q_proj, cosine 0\.00"):
        ll.load(llama(), path)


def test_the_check_holds_in_place_too(path: Path) -> None:
    model = llama(seed=1)
    ll.attach(model, CONFIG)
    before = bits(model)
    with pytest.raises(ll.BaseMismatchError, match="another base model"):
        ll.load(model, path, overwrite=True)
    assert same_bits(before, model)
    ll.load(model, path, overwrite=True, base="any")
    assert not same_bits(before, model)
