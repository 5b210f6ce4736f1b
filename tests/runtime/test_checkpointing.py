"""Gradient checkpointing: a layer that backward computes again uses the coefficient of its forward pass."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lora_lite as ll
from helpers import METHODS, attached, perturb, relative, tiny, tiny_llama, token_ids

IDS = token_ids()
KINDS = ["non-reentrant", "reentrant"]
ROWS = torch.tensor([0.0, 2.0, -1.0])


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {key: p.grad for key, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    assert found and all(grad is not None for grad in found.values())
    return found  # type: ignore[return-value]


def enable(model: Any, kind: str) -> None:
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": kind == "reentrant"})
    if kind == "reentrant":
        model.enable_input_require_grads()


def counted(model: nn.Module) -> list[int]:
    """A list that grows by one whenever the first adapted layer runs."""
    calls: list[int] = []
    layer = model.get_submodule(next(iter(ll.attachment(model).targets)))
    layer.register_forward_hook(lambda *args: calls.append(1))
    return calls


def compare(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key in found:
        assert relative(found[key], expected[key]) < 1e-12, key


def loss(model: nn.Module, power: float = 2) -> Tensor:
    return model(IDS).logits.pow(power).mean()


def ends_after_backward(model: nn.Module) -> None:
    with ll.scale(model, -1.5):
        loss(model).backward()


def ends_before_backward(model: nn.Module) -> None:
    with ll.scale(model, -1.5):
        value = loss(model)
    value.backward()


def rows_end_before_backward(model: nn.Module) -> None:
    with ll.scale(model, ROWS):
        value = loss(model)
    value.backward()


def two_forwards(model: nn.Module) -> None:
    with ll.scale(model, 2.0):
        first = loss(model)
    with ll.scale(model, ROWS):
        second = loss(model, 4)
    (first + 3 * second).backward()


def two_backwards(model: nn.Module) -> None:
    with ll.scale(model, 2.0):
        first = loss(model)
    with ll.scale(model, -1.0):
        second = loss(model, 4)
        first.backward()
    second.backward()


CASES = [ends_after_backward, ends_before_backward, rows_end_before_backward, two_forwards, two_backwards]


def both(method: str, kind: str, cases: list[Callable[[nn.Module], None]]) -> None:
    plain, checkpointed = (tiny_llama(torch.float64, num_hidden_layers=1).train() for _ in range(2))
    for model in (plain, checkpointed):
        attached(model, method, [IDS], dtype=torch.float64)
    enable(checkpointed, kind)
    for case in cases:
        case(plain)
        expected = gradients(plain)
        calls = counted(checkpointed)
        case(checkpointed)
        assert len(calls) == (4 if case.__name__.startswith("two") else 2)  # each call is indeed computed twice
        compare(gradients(checkpointed), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES)
def test_gradients_of_a_lora(case: Callable[[nn.Module], None], kind: str) -> None:
    both("lora", kind, [case])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_gradients_of_every_method(method: str, kind: str) -> None:
    if ll.methods()[method].facts.trained:
        both(method, kind, [ends_before_backward, two_forwards])


@pytest.mark.parametrize("kind", KINDS)
def test_a_stack_with_two_coefficients(kind: str) -> None:
    plain, checkpointed = (tiny_llama(torch.float64, num_hidden_layers=1).train() for _ in range(2))
    found = []
    for model in (plain, checkpointed):
        attached(model, "lora", dtype=torch.float64)
        attached(model, "hra", name="second", dtype=torch.float64)
        if model is checkpointed:
            enable(model, kind)
        with ll.scale(model, {"default": 0.5, "second": ROWS}):
            value = loss(model)
        value.backward()
        found.append(gradients(model))
    compare(found[1], found[0])


class Flat(nn.Module):
    """Two layers on a flattened batch, checkpointed if asked."""

    def __init__(self, kind: str | None) -> None:
        super().__init__()
        self.kind = kind
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first, self.second = (nn.Linear(8, 8, dtype=torch.float64) for _ in range(2))

    def block(self, x: Tensor) -> Tensor:
        return self.second(self.first(x.reshape(-1, 8)).tanh()).reshape(x.shape)

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.block, x, use_reentrant=self.kind == "reentrant") if self.kind else self.block(x)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_a_flattened_batch(kind: str) -> None:
    x = torch.randn(3, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    found = []
    for model in (Flat(None), Flat(kind)):
        attached(model, "lora", dtype=torch.float64)
        with ll.scale(model, ROWS):
            value = model(x).square().sum()
        value.backward()
        found.append(gradients(model))
    compare(found[1], found[0])


@pytest.mark.parametrize("kind", KINDS)
def test_a_call_past_the_root_is_refused(kind: str) -> None:
    """The root did not see the forward pass, so the coefficient is not known: an error, no wrong gradient."""
    model = tiny_llama(num_hidden_layers=1)
    attached(model, "lora")
    enable(model, kind)
    model.model(IDS).last_hidden_state.sum().backward()  # fine: no coefficient was ever given
    with ll.scale(model, 0.5):
        hidden = model.model(IDS).last_hidden_state
    with pytest.raises(ll.StateError, match="its forward pass did not go through the module that was given to attach"):
        hidden.sum().backward()
    loss(model).backward()


def test_after_a_backward_that_failed() -> None:
    """What a failed backward leaves behind does not reach the next one."""
    model = tiny_llama(torch.float64, num_hidden_layers=1)
    attached(model, "lora", dtype=torch.float64)
    enable(model, "non-reentrant")
    with ll.scale(model, 2.0):
        value = loss(model)
    handle = model.lm_head.register_full_backward_hook(lambda *args: 1 / 0)
    with ll.scale(model, 3.0):
        failing = loss(model)
    with pytest.raises(ZeroDivisionError):
        failing.backward()
    handle.remove()
    model.zero_grad()
    value.backward()
    found = gradients(model)
    model.gradient_checkpointing_disable()
    with ll.scale(model, 2.0):
        loss(model).backward()
    compare(found, gradients(model))


def test_dropout_is_the_same_when_computed_again() -> None:
    model = tiny_llama(torch.float64, num_hidden_layers=1)
    att = ll.attach(model, tiny("lora", dropout=0.5, dtype=torch.float64))
    perturb(att.targets.values())
    found = []
    for on in (False, True):
        model.train()
        if on:
            enable(model, "non-reentrant")
        torch.manual_seed(0)
        loss(model).backward()
        found.append(gradients(model))
    compare(found[1], found[0])
