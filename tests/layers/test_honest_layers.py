"""Layers whose output is not that of the weight they hold, kinds that are not understood, compiled models, and tensors
replaced by `load_state_dict`."""

import pytest
import torch
from torch import Tensor, nn

import lora_lite as ll
from helpers import METHODS, OneLayer, attached, relative, tiny

READERS = [name for name in METHODS if ll.methods()[name].reads_weight]


class Transposed(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return input @ self.weight


class Scaled(nn.Linear):
    """As the fp8 layers do, whose scale is not in the weight."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 100


class Active(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).relu()


@pytest.mark.parametrize("kind", [Transposed, Scaled, Active])
@pytest.mark.parametrize("method", METHODS)
def test_a_layer_that_computes_something_else(method: str, kind: type[nn.Linear]) -> None:
    model = nn.Sequential(kind(16, 16), nn.Linear(16, 8))
    if method not in READERS:
        assert len(ll.attach(model, tiny(method), [torch.randn(40, 16)] if method == "eva" else None).targets) == 2
        return
    with pytest.raises(ll.TargetError, match=f"0: this {kind.__name__} computes something else than W x"):
        ll.attach(model, tiny(method))
    assert not hasattr(model[0], "lora")


def test_an_attention_output_that_is_never_called() -> None:
    """By default it stays without an adapter, and that is said; by name it is refused."""
    for model in (nn.TransformerEncoderLayer(16, 2), nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2), 2)):
        with pytest.warns(ll.LoraLiteWarning, match=r"left out by default, .*self_attn\.out_proj.*never called"):
            att = ll.attach(model, tiny("lora", d_model=16))
        assert {path.rpartition(".")[2] for path in att.targets} == {"linear1", "linear2"}
        assert all("out_proj" in path for path in att.left_out) and att.left_out
        ll.detach(model)
        with pytest.raises(ll.TargetError, match=r"out_proj: nn\.MultiheadAttention reads its weight"):
            ll.attach(model, tiny("lora", target_names=("out_proj",)))


class Packed(nn.Module):
    """A quantised layer without a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.in_features = self.out_features = 8
        self.register_buffer("qweight", torch.zeros(8, dtype=torch.int32))


def test_kinds_that_are_not_understood_are_named() -> None:
    model = nn.Sequential(Packed(), Packed())
    with pytest.raises(ll.TargetError, match=r"no linear layer.*Not understood.*2 Packed"):
        ll.attach(model, tiny("lora"))
    model.add_module("lm_head", nn.Linear(8, 4))
    with pytest.raises(ll.TargetError, match=r"q_proj.*Not understood.*2 Packed"):
        ll.attach(model, ll.LoRAConfig(target_names=("q_proj",)))


def test_a_compiled_model_is_refused() -> None:
    model = nn.Sequential(nn.Linear(8, 4))
    with pytest.raises(ll.StateError, match=r"is a OptimizedModule: attach first, then wrap or shard .or compile"):
        ll.attach(torch.compile(model), tiny("lora"))  # type: ignore[arg-type]


@pytest.mark.parametrize("part", ["", "layer", "layer.lora", "layer.lora.default"])
@pytest.mark.parametrize("side", ["input", "output"])
def test_load_state_dict_rebuilds_what_is_derived(side: str, part: str) -> None:
    x, runs = torch.randn(60, 24, dtype=torch.float64), []
    for size in (1.0, 3.0):
        model = OneLayer(24, 16)
        data = x * torch.linspace(1, size**4, 24)
        attached(model, "antipasto_corda", [data], side=side, size=size)
        runs.append(model)
    one, other = runs
    assert relative(one(x), other(x)) > 1e-3
    one.get_submodule(part).load_state_dict(other.get_submodule(part).state_dict())
    assert relative(one(x), other(x)) <= 1e-7


class _Sequences(nn.Linear):
    """Takes (B, T, i) alone."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.ndim != 3:
            raise RuntimeError("three dimensions")
        return super().forward(x)


def test_a_layer_that_takes_no_single_row_is_not_asked() -> None:
    model, x = nn.Sequential(_Sequences(8, 8)), torch.randn(2, 3, 8)
    base = model(x)
    ll.attach(model, ll.DoRAConfig(r=2, target_roles=()))
    assert torch.equal(model(x), base)


@pytest.mark.parametrize("key", ["weight", "bias"])
@pytest.mark.parametrize("method", METHODS)
def test_a_layer_that_is_not_finite(method: str, key: str) -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 8))
    with torch.no_grad():
        model[1].get_parameter(key).view(-1)[3] = float("nan")
    data = ll.Contrast([torch.randn(9, 16)], [torch.randn(9, 16)]) if method == "sspace" else [torch.randn(40, 16)]
    needs = ll.methods()[method].needs(tiny(method))
    with pytest.raises(ll.TargetError, match=f"^1: its {key} holds NaN or infinite values"):
        ll.attach(model, tiny(method), data if needs else None)
    assert not hasattr(model[0], "lora")
