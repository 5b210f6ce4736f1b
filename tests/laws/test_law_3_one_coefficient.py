"""Law 3. One coefficient: c = 0 is the base, c = 1 the trained adapter; absolute, never cumulative. It multiplies the
whole change, unless a method says otherwise.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

import lora_lite as ll
from helpers import (
    METHODS,
    OneLayer,
    attached,
    calibration,
    perturb,
    relative,
    tiny,
)
from law_models import IDS, SHAPES, inputs, llama


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_c_zero_is_the_base_and_c_one_the_adapter(method: str, dtype: torch.dtype) -> None:
    model = llama(dtype)
    base = model(IDS).logits
    attached(model, method, [IDS])
    full = model(IDS).logits
    assert not torch.equal(full, base)
    with ll.scale(model, 0):
        assert torch.equal(model(IDS).logits, base)
    with ll.disabled(model):
        assert torch.equal(model(IDS).logits, base)
    with ll.scale(model, 1):
        assert torch.equal(model(IDS).logits, full)


@pytest.mark.parametrize("method", METHODS)
def test_c_is_absolute(method: str) -> None:
    model, x = OneLayer(16, 24, dtype=torch.float32), inputs(16, torch.float32)
    attached(model, method, [x])
    full = model(x)
    with ll.scale(model, 2.0):
        double = model(x)
        with ll.scale(model, 2.0), ll.scale(model, 2.0):
            assert torch.equal(model(x), double)
        with ll.scale(model, 1.0):
            assert torch.equal(model(x), full)
        assert torch.equal(model(x), double)
    assert torch.equal(model(x), full)


@pytest.mark.parametrize("method", [method for method in METHODS if ll.methods()[method].facts.linear_in_c])
@pytest.mark.parametrize(("i", "o"), SHAPES)
def test_c_multiplies_the_whole_change(method: str, i: int, o: int) -> None:
    """x' = x + c (before(x) - x) and y' = y + c change, seen at the layer, in fp64."""
    model, x = OneLayer(i, o), inputs(i, torch.float64)
    base = model(x)
    attached(model, method, [x], dtype=torch.float64)
    seen: list[Tensor] = []
    model.layer.register_forward_pre_hook(lambda layer, args: seen.append(args[0]))  # comes after ours

    def at(c: float) -> tuple[Tensor, Tensor]:
        with ll.scale(model, c):
            y = model(x)
        return seen.pop(), y

    x1, y1 = at(1.0)
    assert torch.equal(x1, x) == (ll.methods()[method].acts() == "after")
    assert relative(y1, base) > 1e-3
    for c in (-1.0, 0.37, 2.5):
        x_c, y_c = at(c)
        assert relative(x_c, x + c * (x1 - x)) < 1e-14
        assert relative(y_c, base + c * (y1 - base)) < 1e-13


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_all_forms_of_c_give_the_same_bits(method: str, dtype: torch.dtype) -> None:
    cfg = tiny(method)
    if "alpha" not in cfg.unused:
        cfg = cfg.replace(alpha=5.3)  # no power of two, so that the order of multiplications shows
    model, x = OneLayer(16, 24, dtype=dtype), inputs(16, dtype)
    att = ll.attach(model, cfg, calibration(cfg, [x]))
    perturb(att.targets.values())
    for c in (0.3, -1.7, 1.0, 0.0, 3.0):
        zero_dim = torch.tensor(c, dtype=torch.float64)
        forms: list[Any] = [c, zero_dim, zero_dim.expand(5), {"default": c}, {"default": zero_dim.expand(5)}]
        if c == int(c):
            forms += [int(c), torch.tensor(int(c)), torch.tensor(c), torch.full((5,), c, dtype=torch.bfloat16)]
        found = []
        for form in forms:
            with ll.scale(model, form):
                found.append(model(x))
        assert all(torch.equal(found[0], other) for other in found[1:]), c
