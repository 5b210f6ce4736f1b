"""Ways to break the promises that a hostile reader tried."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import lora_lite as ll
from helpers import METHODS, OneLayer, attached, bits, perturb, same_bits, tiny, tiny_llama, token_ids

IDS = token_ids()
ALL = {"target_roles": ()}


class Two(nn.Module):
    """Two layers of one width, a then b; `between` may write to x in place."""

    def __init__(self, a: nn.Module | None = None, b: nn.Module | None = None, between: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.between = a or nn.Linear(8, 8), b or nn.Linear(8, 8), between

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        if self.between != 1.0:
            x *= self.between
        return y + self.b(x)


def trained(model: nn.Module, *configs: Any, **options: Any) -> ll.Attachment:
    att = ll.attach(model, *(configs or (ll.LoRAConfig(r=2, **ALL),)), **options)
    perturb(att.targets.values())
    return att


def test_a_scale_can_be_entered_again() -> None:
    model = tiny_llama()
    base = model(IDS).logits
    trained(model)
    reference = ll.disabled(model)
    with reference:
        pass
    moved = model(IDS).logits
    for _ in range(2):
        with reference:
            assert torch.equal(model(IDS).logits, base)
        assert torch.equal(model(IDS).logits, moved)


@pytest.mark.parametrize("call", [ll.disabled, ll.merge, lambda model: ll.param_groups(model, 1e-3), ll.detach])
def test_several_roots_within_a_model_are_not_guessed(call: Any) -> None:
    model = Two(OneLayer(8, 8, dtype=torch.float32), OneLayer(8, 8, dtype=torch.float32))
    trained(model.a)
    trained(model.b)
    with pytest.raises(ll.StateError, match=r"several modules of this Two \(a, b\): pass one of them"):
        call(model)
    ll.detach(model.a)


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Needy(nn.Linear):
    def forward(self, x: Tensor, k: int = 0) -> Tensor:
        if x.shape[0] == 8:  # as many rows as the probe has
            raise TypeError("wants k")
        return super().forward(x)


@pytest.mark.parametrize(
    ("layer", "error", "words"),
    [
        (Doubled(8, 8), ll.TargetError, "b: a Doubled, which computes something else than W x"),
        (parametrizations.weight_norm(nn.Linear(8, 8)), ll.TargetError, "b: its weight is computed"),
        (Needy(8, 8), TypeError, "wants k"),
    ],
)
def test_a_merge_that_would_not_be_the_forward_is_refused_whole(
    layer: nn.Module, error: type[Exception], words: str
) -> None:
    model = Two(b=layer)
    trained(model)
    before, x = bits(model), torch.randn(3, 8)
    found = model(x)
    with pytest.raises(error, match=words):
        ll.merge(model)
    assert same_bits(before, model) and torch.equal(model(x), found)
    with ll.disabled(model):  # nothing counts as merged
        assert not torch.equal(model(x), found)


def test_a_layer_within_a_target_is_refused() -> None:
    class Wrapped(nn.Linear):  # as peft wraps a layer: it has its weight, and the layer itself within
        def __init__(self) -> None:
            super().__init__(8, 8)
            self.base_layer = nn.Linear(8, 8)

    model = Two(b=Wrapped())
    with pytest.raises(ll.TargetError, match=r"b\.base_layer lies within b, .* unload it first"):
        ll.attach(model, ll.LoRAConfig(r=2, **ALL))


def test_a_base_module_called_lora_is_the_bases() -> None:
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lora = nn.ModuleDict({"default": nn.Linear(8, 8)})

        def forward(self, x: Tensor) -> Tensor:
            return self.lora["default"](x)

    model = Two(b=Inner())
    keys = set(model.state_dict())
    first = trained(model, name="first")
    assert set(ll.base_state_dict(model)) == keys
    trained(model, name="second")
    assert all(p.requires_grad for adapter in first.targets.values() for p in adapter.parameters())
    ll.detach(model)
    assert set(model.state_dict()) == keys


def test_calibration_sees_that_an_input_was_written_to() -> None:
    model = Two(between=0.0)
    with torch.no_grad():
        att = ll.attach(model, ll.EVAConfig(r=2, **ALL), [torch.randn(16, 8)])
    assert not torch.equal(att.targets["a"].A, att.targets["b"].A)


def test_train_also_of_an_offloaded_weight_leaves_the_model_as_it_was() -> None:
    model = Two()
    model.head = nn.Linear(8, 3, device="meta")
    with pytest.raises(ll.TargetError, match=r"head\.weight is offloaded"):
        ll.attach(model, ll.LoRAConfig(r=2, target_names=("^a$",), **ALL), train_also=("head",))
    assert all(p.requires_grad for p in model.parameters())
    with pytest.raises(ll.StateError, match="no adapters of its own"):
        ll.detach(model)


@pytest.mark.parametrize("call", [ll.detach, lambda model: ll.save(model, "never.safetensors"), ll.attachment])
def test_a_replaced_train_also_weight_is_noticed(call: Any) -> None:
    model = Two()
    model.head = nn.Linear(8, 3)
    trained(model, ll.LoRAConfig(r=2, target_names=("^a$",), **ALL), train_also=("head",))
    model.head = nn.Linear(8, 5)
    with pytest.raises(ll.StateError, match=r"head\.weight, which it trains, was replaced"):
        call(model)
    model.head = nn.Linear(8, 3)
    ll.detach(model)


def test_nothing_is_built_on_a_weight_that_another_adapter_trains() -> None:
    model = Two()
    trained(model, ll.LoRAConfig(r=2, target_names=("^a$",), **ALL), train_also=(r"^b\.weight",))
    with pytest.raises(ll.TargetError, match=r"b: adapter 'default' trains b\.weight"):
        ll.attach(model, ll.DoRAConfig(r=2, target_names=("^b$",), **ALL), name="second")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("method", [method for method in METHODS if ll.methods()[method].facts.affine])
def test_adapters_of_any_dtype_run_and_merge(method: str, dtype: torch.dtype) -> None:
    model = OneLayer(16, 24, dtype=torch.float32)
    x = torch.randn(12, 16)
    attached(model, method, [x], dtype=dtype)
    found = model(x)
    ll.merge(model)
    assert float((model(x) - found).norm() / found.norm()) < 0.05  # of 16-bit adapters


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_torchs_default_dtype_does_not_matter(dtype: torch.dtype, tmp_path: Any) -> None:
    model = tiny_llama()
    torch.set_default_dtype(dtype)
    try:
        trained(model)
        ll.check(model, [{"input_ids": IDS}])
        found = model(IDS).logits
        path = ll.save(model, tmp_path / "a.safetensors")
        ll.merge(model)
        ll.unmerge(model)
        ll.detach(model)
        ll.load(model, path)
        assert torch.equal(model(IDS).logits, found)
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_coefficient_set_under_inference_mode_can_be_trained_with() -> None:
    model = OneLayer(16, 24)
    ll.attach(model, tiny("ia3", dtype=torch.float64))
    with torch.inference_mode():
        ll.scale(model, 0.5)
    model(torch.randn(3, 16, dtype=torch.float64)).sum().backward()


def test_no_coefficients_at_all_are_refused() -> None:
    model = OneLayer(16, 24)
    ll.attach(model, tiny("lora"))
    with pytest.raises(ll.CoefficientError, match="value per batch row"):
        ll.scale(model, torch.zeros(0))


def test_saving_through_a_link_keeps_the_link(tmp_path: Any) -> None:
    model = OneLayer(16, 24)
    trained(model)
    (tmp_path / "link.safetensors").symlink_to(tmp_path / "real.safetensors")
    ll.save(model, tmp_path / "link.safetensors")
    assert (tmp_path / "link.safetensors").is_symlink() and (tmp_path / "real.safetensors").is_file()
