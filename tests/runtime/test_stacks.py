"""Several adapters at once: they add up, whatever the order; each has its own coefficient and can leave alone."""

import functools
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_lite as ll
from helpers import METHODS, OneLayer, attached, bits, relative, same_bits, tiny_llama, token_ids
from lora_lite.runtime.state import find_root

IDS = token_ids()
X = torch.randn(5, 7, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
BEFORE = [method for method in METHODS if ll.methods()[method].acts() == "before"]
AFTER = [method for method in METHODS if method not in BEFORE]


def layer_with(methods: tuple[str, ...]) -> OneLayer:
    """One fp64 layer with these methods, each perturbed in its own way, under the names m0, m1, ..."""
    model = OneLayer(16, 24)
    for method in methods:
        add(model, method, f"{method}-{methods.index(method)}")
    return model


def add(model: OneLayer, method: str, name: str) -> None:
    with ll.disabled(model) if find_root(model) else torch.no_grad():  # calibrated on the base
        att = attached(model, method, [X], name=name, dtype=torch.float64)
    assert list(att.targets) == ["layer"]


@functools.cache
def alone(method: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """(x', change of the output at x) of one method by itself."""
    model = OneLayer(16, 24)
    base = model(x)
    add(model, method, method)
    if method in BEFORE:
        seen: list[Tensor] = []
        model.layer.register_forward_pre_hook(lambda layer, args: seen.append(args[0]))
        model(x)
        return seen[0], torch.zeros_like(base)
    return x, model(x) - base


def expected(methods: tuple[str, ...]) -> Tensor:
    """Befores composed in order, then W, then the sum of the changes at (x', y0)."""
    x = X
    for method in methods:
        x = alone(method, x)[0]
    y = OneLayer(16, 24)(x)
    return y + sum(alone(method, x)[1] for method in methods)


@pytest.mark.parametrize("method", METHODS)
def test_pairs(method: str) -> None:
    for other in METHODS[METHODS.index(method) + 1 :]:
        pair = (method, other)
        found = {order: layer_with(order)(X) for order in (pair, pair[::-1])}
        for order, y in found.items():
            assert relative(y, expected(order)) < 1e-13, order
        if not set(pair) <= set(BEFORE):
            assert relative(found[pair], found[pair[::-1]]) < 1e-13, pair


@pytest.mark.parametrize("before", [None, *BEFORE])
def test_three(before: str | None) -> None:
    """Some of the methods that act after W, by twos with a `before` and by threes without, in all orders."""
    combinations = list(itertools.combinations(AFTER, 2 if before else 3))[:: 10 if before else 40]
    for chosen in combinations:
        three = (*chosen, before) if before else chosen
        found = [layer_with(order)(X) for order in itertools.permutations(three)]
        assert relative(found[0], expected(three)) < 1e-13, three
        assert max(relative(y, found[0]) for y in found) < 1e-13, three


@pytest.mark.parametrize("method", METHODS)
def test_two_of_the_same_method(method: str) -> None:
    model = OneLayer(16, 24)
    add(model, method, "a")
    one = model(X)
    add(model, method, "b")
    both = model(X)
    assert relative(both, one) > 1e-3
    with ll.scale(model, {"b": 0}):
        assert torch.equal(model(X), one)


def test_each_has_its_own_coefficient() -> None:
    model = OneLayer(16, 24)
    base = model(X)
    changes = {}
    linear = [method for method in AFTER if ll.methods()[method].facts.linear_in_c]
    for method in linear:
        changes[method] = alone(method, X)[1]
        add(model, method, method)
    rows = torch.linspace(-1, 2, 5, dtype=torch.float64)
    several = {m: 0.3 * k - 1 for k, m in enumerate(linear)}
    for c in (dict.fromkeys(linear, 0.5), several, {linear[0]: rows, linear[1]: 2}):
        with ll.scale(model, c):
            y = model(X)
        total = sum(torch.as_tensor(c.get(m, 1.0), dtype=torch.float64).reshape(-1, 1, 1) * changes[m] for m in linear)
        assert relative(y, base + total) < 1e-13
    assert relative(model(X), base + sum(changes.values())) < 1e-13


@pytest.mark.parametrize("method", METHODS)
def test_detaching_one_leaves_the_others(method: str) -> None:
    """Bitwise: outputs, tensors, coefficient; in the order attached and the reverse, on the same and other layers."""
    models = [tiny_llama(num_hidden_layers=1) for _ in range(3)]
    settings: dict[str, Any] = {"target_names": ("_proj$",)}
    for index, model in enumerate(models):
        if index == 1:
            attached(model, "lora", name="x", **settings)
        with ll.disabled(model) if index == 1 else torch.no_grad():
            attached(model, method, [IDS], name="stays")
        if index == 2:
            attached(model, "ia3", name="x", **settings)
        ll.scale(model, {"stays": 1.5})
    for model in models[1:]:
        assert not torch.equal(model(IDS).logits, models[0](IDS).logits)
        kept = {path: bits(adapter) for path, adapter in ll.attachment(model, "stays").targets.items()}
        ll.detach(model, "x")
        assert torch.equal(model(IDS).logits, models[0](IDS).logits)
        assert list(model.state_dict()) == list(models[0].state_dict())
        assert all(same_bits(kept[path], a) for path, a in ll.attachment(model, "stays").targets.items())
        assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in models[0].parameters()]
    ll.detach(models[1], "stays")
    assert all(p.requires_grad for p in models[1].parameters())


def test_adapters_on_different_layers() -> None:
    model = tiny_llama()
    attached(model, "lora", name="first", layers=(0,))
    one = model(IDS).logits
    attached(model, "dora", name="second", layers=(1,))
    both = model(IDS).logits
    assert not torch.equal(one, both)
    assert not set(ll.attachment(model, "first").targets) & set(ll.attachment(model, "second").targets)
    with ll.scale(model, {"second": 0}):
        assert torch.equal(model(IDS).logits, one)
    ll.detach(model, "first")
    with ll.disabled(model):
        assert torch.equal(model(IDS).logits, tiny_llama()(IDS).logits)


def pair() -> list[ll.AdapterConfig]:
    return [ll.IA3Config(), ll.IA3FFConfig()]


def test_a_list_of_configs_is_one_adapter(tmp_path: Path) -> None:
    model = tiny_llama()
    att = ll.attach(model, pair(), name="ia3")
    kinds = {path.rsplit(".", 1)[-1]: adapter.facts.name for path, adapter in att.targets.items()}
    assert kinds == {"k_proj": "ia3", "v_proj": "ia3", "down_proj": "ia3_ff"}
    with torch.no_grad():
        for index, adapter in enumerate(att.targets.values()):
            adapter.l.add_(0.01 * (index + 1))
    logits, base = model(IDS).logits, tiny_llama()(IDS).logits
    assert not torch.equal(logits, base)

    fresh = tiny_llama()
    again = ll.load(fresh, ll.save(model, tmp_path / "a.safetensors", name="ia3"), name="other")
    assert torch.equal(fresh(IDS).logits, logits)
    assert again.num_trainable == att.num_trainable and list(again.targets) == list(att.targets)
    with ll.scale(fresh, {"other": 0}):
        assert torch.equal(fresh(IDS).logits, base)
    ll.detach(fresh, "other")
    assert torch.equal(fresh(IDS).logits, base) and not any("lora" in key for key in fresh.state_dict())


def test_overlapping_configs_are_refused() -> None:
    model: nn.Module = tiny_llama()
    for configs, path in (
        ([ll.IA3Config(), ll.LoRAConfig(target_names=("q_proj", "v_proj"))], "v_proj"),
        ([ll.LoRAConfig(), ll.LoRAConfig()], "q_proj"),
    ):
        with pytest.raises(ll.TargetError, match=rf"{path} is selected by configs 0 and 1; make them disjoint"):
            ll.attach(model, configs)
    with pytest.raises(ValueError, match="at least one config"):
        ll.attach(model, [])
    assert not any("lora" in path for path, _ in model.named_modules())
