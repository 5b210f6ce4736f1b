"""Linear layers whose stored weight is not what they multiply with: fp8 with a scale, masked, quantised inputs."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

import lora_lite as ll
from helpers import METHODS, tiny

SIZE = 128
READERS = [name for name in METHODS if ll.methods()[name].reads_weight]
X = torch.randn(6, SIZE, generator=torch.Generator().manual_seed(0))


def fp8(monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """transformers' own layer, with the product that its kernel computes on a GPU."""
    from transformers.integrations.finegrained_fp8 import FP8Linear

    def forward(self: Any, input: Tensor) -> Tensor:
        return F.linear(input, self.weight.to(input.dtype) * self.weight_scale_inv.repeat_interleave(SIZE, 1))

    monkeypatch.setattr(FP8Linear, "forward", forward)
    layer = FP8Linear(SIZE, SIZE, block_size=(SIZE, SIZE))
    W = torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    layer.weight.data = (W * 100).to(torch.float8_e4m3fn)
    layer.weight_scale_inv.data.fill_(0.01)
    return layer


class Masked(nn.Linear):
    """A pruned layer."""

    def __init__(self) -> None:
        super().__init__(SIZE, SIZE)
        mask = torch.rand(SIZE, SIZE, generator=torch.Generator().manual_seed(2)) > 0.5
        self.register_buffer("mask", mask.float())

    def forward(self, input: Tensor) -> Tensor:
        return input @ (self.weight * self.mask).T + self.bias


@pytest.mark.parametrize("method", ["dora", "pissa", "antipasto"])
def test_fp8_with_a_scale_is_refused_by_what_reads_the_weight(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(fp8(monkeypatch))
    with pytest.raises(ll.TargetError, match="0: this FP8Linear computes something else than W x"):
        ll.attach(model, tiny(method))
    assert not hasattr(model[0], "lora")


def test_fp8_with_a_scale_takes_what_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(fp8(monkeypatch), nn.Linear(SIZE, 8))
    y = model(X)
    ll.attach(model, tiny("lora"))
    assert torch.equal(model(X), y)
    assert not ll.check(model, [X]).gradient.wrong  # type: ignore[union-attr]


@pytest.mark.parametrize("method", READERS)
def test_a_masked_weight_is_refused_by_what_reads_it(method: str) -> None:
    model = nn.Sequential(Masked(), nn.Linear(SIZE, 8))
    with pytest.raises(ll.TargetError, match="0: this Masked computes something else than W x"):
        ll.attach(model, tiny(method))


def dynamic() -> nn.Module:
    """Three layers, of which torchao rounds weights and activations to 8 bits."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(SIZE, SIZE), nn.Tanh(), nn.Linear(SIZE, SIZE), nn.Tanh(), nn.Linear(SIZE, 64))
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    return model


def test_dynamically_quantised_activations_take_an_adapter_and_check_finds_the_cut() -> None:
    model = dynamic()
    y = model(X)
    ll.attach(model, tiny("lora"))
    assert torch.equal(model(X), y)
    with pytest.raises(
        ll.CheckError, match=r"the gradients are not those of the loss: .*quantised layers that pass back"
    ):
        ll.check(model, [X])


def test_a_cut_below_which_nothing_is_trained_is_reported_only() -> None:
    model = dynamic()
    ll.attach(model, tiny("lora", target_names=(r"^4$",)))
    report = ll.check(model, [X])
    assert not report.gradient.wrong  # type: ignore[union-attr]
    assert "0" in report.cut_layers and "quantised layers that pass back another gradient" in str(report)
