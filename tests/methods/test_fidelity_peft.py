"""Forward pass and all gradients against peft 0.21, on perturbed tensors copied across, in fp64.

`pytest -s tests/test_fidelity_peft.py` prints the worst relative error of each method.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import lora_lite as ll
from helpers import OneLayer, perturb, relative

TOLERANCE = 1e-10
F64 = torch.float64
SHAPES = [(24, 16), (16, 24), (16, 16)]  # (i, o): narrowing, widening, square
LORA = partial(peft.LoraConfig, r=4, lora_alpha=6)
COMMON: dict[str, Any] = {"dtype": F64, "target_names": ("layer",), "target_roles": ()}


def same(tensor: Tensor) -> Tensor:
    return tensor


def start_of_pissa(layer: nn.Module, W: Tensor) -> Tensor:
    """s B0 A0, which peft subtracts from the base weight."""
    own: Any = layer.lora["default"]
    return own.cfg.scaling * own.B0 @ own.A0


def start_of_delora(layer: nn.Module, W: Tensor) -> Tensor:
    """The initial update, which the paper subtracts from the base weight (eq. 9)."""
    own: Any = layer.lora["default"]
    strength = own.cfg.lambda0 / own.cfg.r / (own.A0.norm(dim=1) * own.B0.norm(dim=0))
    return own.B0 @ torch.diag(strength) @ own.A0 * W.norm(dim=0)


@dataclass
class Pair:
    """A method here and in peft.

    Attributes:
        ours: our config.
        theirs: makes peft's config from `target_modules`.
        tensors: our tensor -> (peft's, how ours is laid out there). The layout serves values and gradients.
        start: what peft has subtracted from the base weight, where we leave it untouched.
    """

    ours: Any
    theirs: Callable[..., Any]
    tensors: dict[str, tuple[str, Callable[[Tensor], Tensor]]]
    start: Callable[[nn.Module, Tensor], Tensor] | None = None


AB = {"A": ("lora_A.default.weight", same), "B": ("lora_B.default.weight", same)}


def road(variant: str, group_size: int) -> Pair:
    flat = {name: (f"road_{name}.default", torch.flatten) for name in ("theta", "alpha")}
    return Pair(
        ll.RoadConfig(road_variant=variant, group_size=group_size, **COMMON),
        partial(peft.RoadConfig, variant=variant, group_size=group_size),
        flat,
    )


PAIRS = {
    "lora": Pair(ll.LoRAConfig(r=4, alpha=6.0, **COMMON), LORA, AB),
    "rslora": Pair(ll.LoRAConfig(r=4, alpha=6.0, rslora=True, **COMMON), partial(LORA, use_rslora=True), AB),
    "lora_bias": Pair(
        ll.LoRAConfig(r=4, alpha=6.0, bias=True, **COMMON),
        partial(LORA, lora_bias=True),
        {**AB, "b": ("lora_B.default.bias", same)},
    ),
    # peft's own initialisation raises in fp64; it is compared in fp32 below.
    "pissa": Pair(ll.PiSSAConfig(r=4, alpha=6.0, **COMMON), LORA, AB, start_of_pissa),
    "dora": Pair(
        ll.DoRAConfig(r=4, alpha=6.0, **COMMON),
        partial(LORA, use_dora=True),
        {**AB, "m": ("lora_magnitude_vector.default.weight", same)},
    ),
    "delora": Pair(
        ll.DeLoRAConfig(r=4, lambda0=3.0, **COMMON),
        partial(peft.DeloraConfig, r=4, delora_lambda=3),
        {"A": ("delora_A.default", same), "B": ("delora_B.default", same), "lam": ("delora_lambda.default", same)},
        start_of_delora,
    ),
    "hra": Pair(ll.HRAConfig(r=4, **COMMON), partial(peft.HRAConfig, r=4), {"U": ("hra_u.default", torch.t)}),
    "ia3": Pair(
        ll.IA3Config(**COMMON),
        partial(peft.IA3Config, feedforward_modules=[]),
        {"l": ("ia3_l.default", partial(torch.unsqueeze, dim=1))},
    ),
    "ia3_ff": Pair(
        ll.IA3FFConfig(**COMMON),
        partial(peft.IA3Config, feedforward_modules=["layer"]),
        {"l": ("ia3_l.default", partial(torch.unsqueeze, dim=0))},
    ),
    **{f"road_{k}/{size}": road(f"road_{k}", size) for k in (1, 2, 4) for size in (2, 8)},
}


@pytest.fixture(scope="module")
def worst() -> Iterator[dict[str, float]]:
    """Worst relative error by method, printed at the end."""
    found: dict[str, float] = {}
    yield found
    print("\nworst relative error against peft, fp64: forward, gradients of input and parameters")
    for name, error in found.items():
        print(f"  {name:<10} {error:.1e}")


def build(pair: Pair, i: int, o: int, bias: bool, size: float = 0.3) -> tuple[OneLayer, nn.Module]:
    """Our model with a perturbed adapter, and peft's with the same tensors."""
    base = OneLayer(i, o, bias)
    ours = copy.deepcopy(base)
    att = ll.attach(ours, pair.ours)
    perturb(att.targets.values(), size)
    theirs = peft.get_peft_model(copy.deepcopy(base), pair.theirs(target_modules=["layer"]))
    wrapped = theirs.base_model.model.layer
    copy_across(pair, ours.layer, wrapped)
    if pair.start is not None:
        with torch.no_grad():
            wrapped.base_layer.weight -= pair.start(ours.layer, base.layer.weight)
    return ours.eval(), theirs.eval()


def copy_across(pair: Pair, ours: nn.Module, theirs: nn.Module) -> None:
    adapter = ours.lora["default"]
    assert set(pair.tensors) == {name for name, _ in adapter.named_parameters()}
    with torch.no_grad():
        for name, (path, layout) in pair.tensors.items():
            value = layout(adapter.get_parameter(name))
            assert value.shape == theirs.get_parameter(path).shape
            theirs.get_parameter(path).copy_(value)


def run(model: nn.Module, i: int, o: int) -> tuple[Tensor, Tensor]:
    """Output, and the input's gradient; the parameters' gradients are left on them."""
    rng = torch.Generator().manual_seed(3)
    x = torch.randn(2, 5, i, dtype=F64, generator=rng, requires_grad=True)
    y = model(x)
    (y * torch.randn(2, 5, o, dtype=F64, generator=rng)).sum().backward()
    assert x.grad is not None
    return y.detach(), x.grad


def errors(pair: Pair, ours: OneLayer, theirs: Any, i: int, o: int) -> dict[str, float]:
    (y, dx), (peft_y, peft_dx) = run(ours, i, o), run(theirs, i, o)
    found = {"forward": relative(y, peft_y), "input": relative(dx, peft_dx)}
    adapter: Any = ours.layer.lora["default"]
    for name, (path, layout) in pair.tensors.items():
        grad = theirs.base_model.model.layer.get_parameter(path).grad
        found[name] = relative(layout(adapter.get_parameter(name).grad), grad)
    return found


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize(("i", "o"), SHAPES)
@pytest.mark.parametrize("name", PAIRS)
def test_forward_and_gradients_are_pefts(name: str, i: int, o: int, bias: bool, worst: dict[str, float]) -> None:
    ours, theirs = build(PAIRS[name], i, o, bias)
    with torch.no_grad():
        adapted = ours(torch.ones(1, i, dtype=F64))
        with ll.disabled(ours):
            plain = ours(torch.ones(1, i, dtype=F64))
    assert relative(adapted, plain) > 1e-2  # else the comparison would prove little
    found = errors(PAIRS[name], ours, theirs, i, o)
    worst[name] = max(worst.get(name, 0.0), *found.values())
    assert max(found.values()) <= TOLERANCE, found


def test_the_order_of_reflections_counts() -> None:
    """Else the comparison with peft would hold for a reversed product too."""
    ours, _ = build(PAIRS["hra"], 24, 16, True)
    x = torch.randn(5, 24, dtype=F64, generator=torch.Generator().manual_seed(3))
    adapter: Any = ours.layer.lora["default"]
    with torch.no_grad():
        y = ours(x)
        adapter.U.copy_(adapter.U.flip(0))
        assert relative(ours(x), y) > 1e-2


def test_delora_differs_from_peft_by_the_initial_update_alone() -> None:
    """The paper subtracts it; peft does not, and starts at B = 0 instead."""
    pair, (i, o) = PAIRS["delora"], (24, 16)
    ours, theirs = build(pair, i, o, True)
    start = start_of_delora(ours.layer, ours.layer.weight)
    wrapped: Any = theirs.base_model.model.layer
    with torch.no_grad():
        wrapped.base_layer.weight.copy_(ours.layer.weight)  # peft as it is, on the untouched base
    x = torch.randn(5, i, dtype=F64, generator=torch.Generator().manual_seed(3))
    assert relative(theirs(x) - ours(x), x @ start.T) <= TOLERANCE
    assert relative(theirs(x), ours(x)) > 1e-2


@pytest.mark.parametrize("size", [0.0, 1e-6, 0.3], ids=["zero", "clamped", "free"])
def test_delora_started_at_zero_is_peft_as_it_is(size: float) -> None:
    """With B0 = 0 nothing is subtracted: the same function and gradients, where peft clamps the norm of B too."""
    pair, (i, o) = PAIRS["delora"], (24, 16)
    ours, theirs = build(Pair(pair.ours, pair.theirs, pair.tensors), i, o, True)
    adapter: Any = ours.layer.lora["default"]
    with torch.no_grad():
        adapter.B0.zero_()
        adapter.B.normal_(0.0, size, generator=torch.Generator().manual_seed(4))
    copy_across(pair, ours.layer, theirs.base_model.model.layer)  # type: ignore[union-attr]
    (y, dx), (peft_y, peft_dx) = run(ours, i, o), run(theirs, i, o)
    assert relative(y, peft_y) <= TOLERANCE
    assert relative(dx, peft_dx) <= TOLERANCE
    wrapped: Any = theirs.base_model.model.layer
    assert relative(adapter.B.grad, wrapped.get_parameter("delora_B.default").grad) <= TOLERANCE


def test_pissa_starts_where_pefts_own_initialisation_does() -> None:
    """In fp32, for peft factorises in no other precision above it. Factors are unique up to a sign, products are."""
    base = OneLayer(24, 16, dtype=torch.float32)
    theirs = peft.get_peft_model(copy.deepcopy(base), LORA(target_modules=["layer"], init_lora_weights="pissa"))
    wrapped: Any = theirs.base_model.model.layer
    adapter: Any = ll.attach(base, PAIRS["pissa"].ours).targets["layer"]
    A, B = (wrapped.get_parameter(f"lora_{name}.default.weight").double() for name in "AB")
    assert relative(B @ A, adapter.B0 @ adapter.A0) < 1e-5
    assert relative((A.abs()), adapter.A0.abs()) < 1e-5
    residual = base.layer.weight.double() - start_of_pissa(base.layer, base.layer.weight)
    assert relative(wrapped.base_layer.weight.double(), residual) < 1e-5


def test_dropout_of_dora_leaves_peft_where_the_docstring_says() -> None:
    """Ours drops on the low-rank path alone; the authors' code and peft drop the input of the (m/n - 1) term too."""
    cfg = PAIRS["dora"].ours.replace(dropout=0.5)
    ours, theirs = build(Pair(cfg, partial(LORA, use_dora=True, lora_dropout=0.5), PAIRS["dora"].tensors), 24, 16, True)
    assert max(errors(PAIRS["dora"], ours, theirs, 24, 16).values()) <= TOLERANCE  # evaluation: the same
    adapter, W = ours.train().layer.lora["default"], ours.layer.weight
    x = torch.randn(4000, 24, dtype=F64, generator=torch.Generator().manual_seed(3))
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(5)
        y = ours(x)
        torch.manual_seed(5)
        dropped = torch.nn.functional.dropout(x, 0.5)
        scale = (adapter.m / (W + cfg.scaling * adapter.B @ adapter.A).norm(dim=1)).unsqueeze(1)  # type: ignore[operator]
        low_rank = scale * (cfg.scaling * adapter.B @ adapter.A)
        assert relative(y, x @ (scale * W).T + ours.layer.bias + dropped @ low_rank.T) <= TOLERANCE
        theirs.train()
        torch.manual_seed(5)
        peft_y = x @ W.T + ours.layer.bias + dropped @ ((scale - 1) * W + low_rank).T
        assert relative(theirs(x), peft_y) <= TOLERANCE
