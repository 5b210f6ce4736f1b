"""`check`: what it reports, what it finds, and that it leaves everything as it was."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lora_lite as ll
from helpers import METHODS, anatomy, attached, bits, calibration, same_bits, tiny, tiny_llama, token_ids

IDS = token_ids()


class Net(nn.Module):
    """Two layers; `how` says what goes wrong with the second."""

    def __init__(self, how: str = "fine") -> None:
        super().__init__()
        self.how = how
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        if self.how == "never called":
            return F.linear(h, self.second.weight)
        if self.how == "never called in training" and self.training:
            return F.linear(h, self.second.weight)
        y = self.second(h)
        if self.how == "detached":
            return h + y.detach()
        if self.how == "dropped":
            return h
        if self.how == "zeroed":
            return h[:, :6] + 0 * y
        if self.how == "infinite":
            return h[:, :6] + (y - y.detach()).abs().sqrt()  # the slope of a root at 0
        if self.how == "mixed rows":
            return y + y.mean(0)
        if self.how == "raises":
            raise KeyError("broken")
        return y


def net(how: str = "fine") -> Net:
    model = Net(how)
    ll.attach(model, tiny("lora"))
    return model


X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("method", METHODS)
def test_what_it_reports(method: str) -> None:
    model, cfg = tiny_llama(), tiny(method)
    att = ll.attach(model, cfg, calibration(cfg, [IDS]))  # not perturbed: A's gradient would be 0 by design
    report = ll.check(model, [IDS, IDS])
    assert report.layers.keys() == {"default"} and report.layers["default"].keys() == att.targets.keys()
    for path, layer in report.layers["default"].items():
        adapter = att.targets[path]
        assert layer.calls >= 4  # two batches, in train and in eval mode
        assert layer.grad_norms.keys() == dict(adapter.named_parameters()).keys()
        assert all(0 < norm < float("inf") for norm in layer.grad_norms.values())
        assert path in str(report) and all(f"{key} {norm:.2e}" in str(report) for key, norm in layer.grad_norms.items())
    assert report.effect > 0 and report.rows_independent is True and report.idle_experts == []


def test_several_adapters_and_kinds_of_batch() -> None:
    model = tiny_llama()
    attached(model, "lora", name="a", layers=(0,))
    attached(model, "ia3", name="b", layers=(1,))
    batch = {"input_ids": IDS, "labels": IDS, "attention_mask": torch.ones_like(IDS)}
    report = ll.check(model, [batch, [IDS], IDS[:1]])
    assert {name: {path.split(".")[2] for path in layers} for name, layers in report.layers.items()} == {
        "a": {"0"}, "b": {"1"}
    }  # fmt: skip
    one_row = ll.check(model, [IDS[:1]])
    assert one_row.rows_independent is None


@pytest.mark.parametrize(
    ("how", "match"),
    [
        ("never called", "adapter 'default' on second never ran: the model uses that weight without calling the layer"),
        ("never called in training", "adapter 'default' on second .*train"),
        ("detached", "on second ran but got no finite, nonzero gradient: {'A': nan, 'B': nan}"),
        ("dropped", "on second ran but got no finite, nonzero gradient"),
        ("zeroed", "on second ran but got no finite, nonzero gradient: {'A': 0.0, 'B': 0.0}"),
        ("infinite", "got no finite, nonzero gradient: {'A': nan, 'B': nan}"),
        ("mixed rows", "a coefficient for one row moved others too"),
    ],
)
def test_what_it_finds(how: str, match: str) -> None:
    model = Net(how)
    if how in ("detached", "dropped"):
        model.first, model.second = nn.Linear(6, 6), nn.Linear(6, 6)
    ll.attach(model, tiny("lora"))
    before, shape_before = bits(model), anatomy(model)
    with pytest.raises(ll.CheckError, match=match):
        ll.check(model, [X])
    assert same_bits(before, model) and anatomy(model) == shape_before


def test_no_effect() -> None:
    """Gradients that reach an adapter although its change never reaches an output."""

    class Straight(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, y: Tensor) -> Tensor:
            return torch.zeros_like(y)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
            return grad

    class Model(Net):
        def forward(self, x: Tensor) -> Tensor:
            return Straight.apply(super().forward(x))

    model = Model()
    ll.attach(model, tiny("lora"))
    with pytest.raises(ll.CheckError, match="turning the coefficient from 0 to 1 changes no output"):
        ll.check(model, [X])


@pytest.mark.parametrize("how", ["fine", "raises", "never called"])
def test_it_restores_everything(how: str) -> None:
    """Bits, gradients (their tensors too), modes, hooks and the coefficient; also after an error."""
    model = net()
    model.train()
    model.second.eval()
    ll.scale(model, 0.25)
    model(X).sum().backward()
    model.how = how
    grads = {key: (p.grad, None if p.grad is None else p.grad.clone()) for key, p in model.named_parameters()}
    before, shape_before, output = bits(model), anatomy(model), Net.forward(model, X) if how == "fine" else None
    state = torch.get_rng_state()
    if how == "fine":
        ll.check(model, [X])
    else:
        with pytest.raises(KeyError if how == "raises" else ll.CheckError):
            ll.check(model, [X])
    assert torch.equal(torch.get_rng_state(), state)
    assert same_bits(before, model) and anatomy(model) == shape_before
    for key, p in model.named_parameters():
        assert p.grad is grads[key][0] and (p.grad is None or torch.equal(p.grad, grads[key][1]))
    if output is not None:
        assert torch.equal(model(X), output)


@pytest.mark.parametrize("method", METHODS)
def test_it_restores_every_method(method: str) -> None:
    model = tiny_llama(num_hidden_layers=1)
    attached(model, method, [IDS])
    before, logits = bits(model), model(IDS).logits
    ll.check(model, [IDS])
    assert same_bits(before, model) and torch.equal(model(IDS).logits, logits)


class Experts(nn.Module):
    """Two experts; the first gets every token."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])

    def forward(self, x: Tensor) -> Tensor:
        return self.experts[0](x)


class Mixture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Experts()

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


def test_idle_experts_are_reported() -> None:
    model = Mixture()
    ll.attach(model, tiny("lora"))
    report = ll.check(model, [X])
    assert report.idle_experts == ["block.experts.1"]
    assert "block.experts.1" in str(report)


def test_train_also_keeps_its_gradients_and_bits() -> None:
    model = tiny_llama(num_hidden_layers=1)
    ll.attach(model, tiny("lora"), train_also=("lm_head",))
    before = bits(model)
    ll.check(model, [IDS])
    assert same_bits(before, model) and all(p.grad is None for p in model.parameters())
    model(IDS).logits.sum().backward()
    grads = {key: (p.grad, p.grad.clone()) for key, p in model.named_parameters() if p.grad is not None}
    assert "lm_head.weight" in grads
    ll.check(model, [IDS])
    for key, (grad, value) in grads.items():
        assert model.get_parameter(key).grad is grad and torch.equal(grad, value), key


def test_running_averages_are_put_back() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 6))
    ll.attach(model, tiny("lora"))
    before = bits(model)
    ll.check(model, [X])
    assert same_bits(before, model)


def test_one_gradient_that_is_not_finite() -> None:
    """One of an adapter's tensors is enough, even where the others are fine."""
    model = net()
    model.get_parameter("second.lora.default.B").register_hook(lambda grad: grad * float("nan"))
    with pytest.raises(ll.CheckError, match=r"on second got a gradient that is not finite: .*'B': nan"):
        ll.check(model, [X])


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda model: ll.check(model, []), ValueError, "give at least one batch"),
        (lambda model: ll.check(model, [3]), TypeError, "a batch is a mapping, a tuple, a list or a tensor, not a int"),
    ],
)
def test_bad_batches(call: Callable[[nn.Module], Any], error: type[Exception], match: str) -> None:
    model = net()
    with pytest.raises(error, match=match):
        call(model)


def test_under_no_grad() -> None:
    model = net()
    with torch.no_grad(), pytest.raises(ll.CheckError, match="no tensor that depends on the adapters; is it run under"):
        ll.check(model, [X])


def test_a_frozen_adapter_beside_a_trained_one() -> None:
    model = net()
    frozen = ll.attach(model, tiny("lora"), name="frozen")
    for adapter in frozen.targets.values():
        adapter.requires_grad_(False)
    report = ll.check(model, [X])
    assert all(not layer.grad_norms for layer in report.layers["frozen"].values())
    assert all(layer.grad_norms for layer in report.layers["default"].values())


class Towers(nn.Module):
    """Two towers; only the smaller output comes from the first."""

    def __init__(self) -> None:
        super().__init__()
        self.small, self.large = nn.Linear(6, 4), nn.Linear(6, 60)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"large": self.large(x), "small": self.small(x)}


def test_an_effect_on_any_output_counts() -> None:
    model = Towers()
    ll.attach(model, tiny("lora", target_names=("small",)))
    report = ll.check(model, [X])
    assert report.effect > 0 and report.rows_independent is True
