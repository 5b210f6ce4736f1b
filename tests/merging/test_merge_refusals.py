"""Merging: what it refuses, before anything is written, and what it leaves behind."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_lite as ll
from helpers import OneLayer, anatomy, attached, bits, perturb, relative, same_bits, tiny, tiny_llama, token_ids
from lora_lite.adapter import Adapter

F64 = torch.float64
PAPER: dict[str, Any] = {"title": "A method for this test", "arxiv": "0000.00000", "lr": 1e-3, "lr_range": (1e-4, 1e-2)}


class TwoLayers(nn.Module):
    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first, self.second = nn.Linear(12, 16, bias, dtype=F64), nn.Linear(16, 8, bias, dtype=F64)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


@pytest.fixture
def temporary() -> Callable[..., type[Adapter]]:
    """A function that registers a one-parameter method with a given `change`."""

    def make(change: Callable[[Any, Tensor, Tensor, Tensor], Tensor], affine: bool) -> type[Adapter]:
        @dataclass(frozen=True)
        class Config(ll.AdapterConfig):
            unused = ("r", "alpha")

        @ll.register(Config, ll.Facts("temporary", affine=affine, **PAPER))
        class Temporary(Adapter):
            def __init__(self, cfg: Config, i: int, o: int) -> None:
                super().__init__(cfg)
                self.g = self.parameter(o)

            def change(self, x: Tensor, y: Tensor, layer: nn.Module, c: Tensor) -> Tensor:
                return change(self, x, y, c)

        return Temporary

    return make


def square(adapter: Any, x: Tensor, y: Tensor, c: Tensor) -> Tensor:
    return c.to(y) * adapter.g.to(y) * y * y


def shift(adapter: Any, x: Tensor, y: Tensor, c: Tensor) -> Tensor:
    return (c.to(y) * adapter.g.to(y)).expand_as(y)


@pytest.mark.parametrize(("affine", "words"), [(False, "temporary is not affine"), (True, "measured on random inputs")])
def test_what_is_not_affine_is_refused(temporary: Callable[..., Any], affine: bool, words: str) -> None:
    """By its own word, and by measurement where it claims to be; the layer before it is not written either."""
    cls = temporary(square, affine)
    model = TwoLayers()
    attached(model, "lora", name="good", dtype=F64)
    cfg = cls.Config(target_names=("second",), target_roles=(), dtype=F64)
    perturb(ll.attach(model, cfg, name="bad").targets.values())
    before, x = bits(model), torch.ones(2, 12, dtype=F64)
    y = model(x)
    for call in (ll.merge, ll.merged_weights):
        with pytest.raises(ll.NotAffineError, match=rf"second: .*{words}"):
            call(model)
    assert same_bits(before, model)
    assert torch.equal(model(x), y)
    ll.detach(model, "bad")
    ll.merge(model)


def test_a_bias_that_the_stack_makes_is_added_and_taken_off_again(temporary: Callable[..., Any]) -> None:
    cls = temporary(shift, True)
    model = TwoLayers(bias=False)
    perturb(ll.attach(model, cls.Config(target_names=("first",), target_roles=(), dtype=F64)).targets.values())
    x = torch.randn(5, 12, dtype=F64, generator=torch.Generator().manual_seed(1))
    y = model(x).detach()
    assert set(ll.merged_weights(model)) == {"first.weight", "first.bias"}
    ll.merge(model)
    assert model.first.bias is not None and not model.first.bias.requires_grad
    assert relative(model(x), y) <= 1e-10
    ll.unmerge(model)
    assert model.first.bias is None and model.second.bias is None
    assert torch.equal(model(x), y)


def test_a_coefficient_for_each_row_is_refused() -> None:
    model = OneLayer(24, 16)
    attached(model, "lora", dtype=F64)
    before = bits(model)
    with ll.scale(model, torch.tensor([1.0, -1.0])), pytest.raises(ll.StateError, match="one value per row"):
        ll.merge(model)
    assert same_bits(before, model)
    ll.merge(model)


def test_a_tied_weight_gets_values_of_its_own() -> None:
    model = TwoLayers()
    model.tied = nn.Linear(12, 16, dtype=F64)
    model.tied.weight = shared = model.first.weight
    attached(model, "lora", target_names=("first",), dtype=F64)
    before, x = bits(model), torch.ones(2, 12, dtype=F64)
    y = model(x)
    ll.merge(model)
    assert relative(model(x), y) <= 1e-10
    assert model.tied.weight is shared and torch.equal(shared, before["first.weight"])
    ll.unmerge(model)
    assert model.first.weight is shared and same_bits(before, model) and torch.equal(model(x), y)


def test_a_tied_head_merges_and_its_folder_loads(tmp_path: Path) -> None:
    """The embedding stays, the head differs, and plain transformers reads both."""
    model: Any = tiny_llama(F64, tie_word_embeddings=True)
    attached(model, "lora", target_names=("lm_head",), exclude_names=(), dtype=F64)
    shared, ids = model.lm_head.weight, token_ids()
    y = model(ids).logits.detach()
    ll.merge(model)
    ll.unmerge(model)
    assert model.lm_head.weight is shared and model.config.tie_word_embeddings
    ll.merge(model, keep=False)
    assert relative(model(ids).logits, y) <= 1e-10
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, dtype=F64)
    assert relative(again(ids).logits, y) <= 1e-6


@pytest.mark.parametrize("keep", [True, False])
def test_a_block_under_three_names_merges_once(keep: bool) -> None:
    block = nn.Linear(16, 16, dtype=F64)
    model = nn.Sequential(block, block, block)
    att = ll.attach(model, tiny("lora", dtype=F64))
    perturb(att.targets.values())
    before, x = bits(model), torch.ones(2, 16, dtype=F64)
    y = model(x).detach()
    assert set(ll.merged_weights(model)) == {f"{k}.{key}" for k in range(3) for key in ("weight", "bias")}
    report = ll.merge(model, keep=keep)
    assert list(report) == ["0", "1", "2"] and relative(model(x), y) <= 1e-10
    if keep:
        ll.unmerge(model)
        assert same_bits(before, model)


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize(
    ("merged", "other", "right"),
    [("lora", "pissa", True), ("ia3", "lora", True), ("lora", "hra", True), ("hra", "lora", False),
     ("lora", "ia3", False), ("lora", "dora", False)],
)  # fmt: skip
def test_one_adapter_of_two_merges_where_that_is_right(merged: str, other: str, right: bool, keep: bool) -> None:
    model = OneLayer(16, 16)
    for each in (other, merged) if merged == "ia3" else (merged, other):
        attached(model, each, name=each, dtype=F64)
    before, x = bits(model), torch.randn(4, 16, dtype=F64, generator=torch.Generator().manual_seed(3))
    y = model(x).detach()
    if not right:
        with ll.scale(model, {other: 0.0}), pytest.raises(ll.NotAffineError, match=f"{other} would act in another way"):
            ll.merge(model, keep, merged)
        assert same_bits(before, model) and torch.equal(model(x), y)
        return
    ll.merge(model, keep, merged)
    assert relative(model(x), y) <= 1e-10 and not torch.equal(model.layer.weight, before["layer.weight"])
    if keep:
        ll.unmerge(model)
        assert same_bits(before, model) and torch.equal(model(x), y)
    else:
        assert [*model.layer.lora] == [other]  # type: ignore[misc, arg-type]
        with ll.scale(model, 0.5):
            assert not torch.equal(model(x), y)


def test_hooks_of_others_see_the_same_after_unmerge_and_a_second_attach() -> None:
    model, x, seen = OneLayer(12, 16), torch.ones(2, 12, dtype=F64), []
    attached(model, "lora", dtype=F64)
    model.layer.register_forward_hook(lambda layer, args, y: seen.append(y))
    adapted = model(x)
    ll.merge(model)
    ll.unmerge(model)
    model(x)
    ll.detach(model)
    attached(model, "lora", dtype=F64)
    model(x)
    whole = [each for each in seen if each.shape == adapted.shape]  # merging measures on other inputs
    assert all(torch.equal(each, adapted) for each in whole) and len(whole) == 3


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_weights_that_would_not_be_finite_are_refused(value: float) -> None:
    """A broken adapter, and one whose change does not fit into the base's dtype."""
    model = OneLayer(24, 16, dtype=torch.float16)
    att = attached(model, "lora")
    before = bits(model)
    with torch.no_grad():
        att.targets["layer"].B.fill_(value)
    with pytest.raises(ll.StateError, match=r"layer: .*not finite in torch\.float16"):
        ll.merge(model)
    assert all(torch.equal(before[key], model.get_parameter(key)) for key in ("layer.weight", "layer.bias"))


def test_nothing_to_merge_or_unmerge_is_an_error() -> None:
    model = OneLayer(24, 16)
    for call in (ll.merge, ll.unmerge, ll.merged_weights):
        with pytest.raises(ll.StateError, match="has no adapters"):
            call(model)
    attached(model, "lora", dtype=F64)
    with pytest.raises(ll.StateError, match="nothing is merged"):
        ll.unmerge(model)


def test_while_merged_everything_else_is_refused(tmp_path: Path) -> None:
    model = OneLayer(24, 16)
    attached(model, "lora", dtype=F64)
    file = ll.save(model, tmp_path / "a.safetensors")
    ll.merge(model)
    before, x = bits(model), torch.ones(2, 24, dtype=F64)
    calls: dict[str, Callable[[], Any]] = {
        "scale": lambda: ll.scale(model, 0.5),
        "scale ": lambda: ll.disabled(model),
        "attach": lambda: ll.attach(model, tiny("ia3"), name="second"),
        "attach ": lambda: ll.load(model, file, name="second"),
        "load": lambda: ll.load(model, file, overwrite=True),
        "save": lambda: ll.save(model, tmp_path / "b.safetensors"),
        "merge": lambda: ll.merge(model),
        "merged_weights": lambda: ll.merged_weights(model),
        "check": lambda: ll.check(model, [x]),
        "detach": lambda: ll.detach(model),
    }
    for name, call in calls.items():
        with pytest.raises(ll.StateError, match=f"{name.strip()}: .*call unmerge first"):
            call()
    assert same_bits(before, model)
    assert not (tmp_path / "b.safetensors").exists()
    ll.unmerge(model)
    ll.detach(model)


def test_merging_for_good_leaves_a_plain_model() -> None:
    """No hooks, attributes or modules stay; flags come back; `train_also` weights stay as trained."""
    model = tiny_llama(F64)
    clean, start = anatomy(model), bits(model)
    cfg = tiny("lora", dtype=F64)
    att = ll.attach(model, cfg, train_also=("lm_head",))
    ll.attach(model, tiny("ia3_ff", dtype=F64), name="second")
    perturb(att.targets.values())
    with torch.no_grad():
        model.lm_head.weight += 0.1  # type: ignore[union-attr, operator]
        y = model(input_ids=token_ids()).logits
        report = ll.merge(model, keep=False)
        assert relative(model(input_ids=token_ids()).logits, y) <= 1e-10
    assert anatomy(model) == clean
    assert set(bits(model)) == set(start)
    assert torch.equal(model.get_parameter("lm_head.weight"), start["lm_head.weight"] + 0.1)
    changed = {key for key, value in start.items() if not torch.equal(value, bits(model)[key])}
    assert changed == {"lm_head.weight", *(f"{path}.weight" for path in report)}
    with pytest.raises(ll.StateError, match="has no adapters"):
        ll.unmerge(model)
    ll.attach(model, cfg)  # and it takes new ones


def test_a_copy_of_a_merged_model_unmerges_by_itself() -> None:
    model = OneLayer(24, 16)
    attached(model, "lora", dtype=F64)
    before = bits(model)
    ll.merge(model)
    merged = bits(model)
    other = copy.deepcopy(model)
    ll.unmerge(other)
    assert same_bits(before, other)
    assert same_bits(merged, model)
    ll.unmerge(model)
    assert same_bits(before, model)


def test_a_weight_that_a_hook_computes_is_refused() -> None:
    """torch.nn.utils.weight_norm: the weight is no parameter, and each forward pass computes it."""
    model = OneLayer(8, 8)
    torch.nn.utils.weight_norm(model.layer)
    attached(model, "lora")
    with pytest.raises(ll.TargetError, match="its weight is computed"):
        ll.merge(model)
