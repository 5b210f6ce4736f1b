"""Law 6. Forward, merge and export agree, on trained weights, on layers of any shape, with bias, alone and stacked;
the error is measured and reported.
"""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import lora_lite as ll
from helpers import (
    METHODS,
    OneLayer,
    attached,
    bits,
    calibration,
    perturb,
    relative,
    same_bits,
    tiny,
    tiny_llama,
    token_ids,
)

F64, BF16 = torch.float64, torch.bfloat16
TOLERANCE = 1e-10
AFFINE = [method for method in METHODS if ll.methods()[method].facts.affine]
BEFORE = [method for method in AFFINE if ll.methods()[method].acts() == "before"]
AFTER = [method for method in AFFINE if method not in BEFORE]
SHAPES = [(24, 16), (16, 24), (16, 16)]


def inputs(i: int, dtype: torch.dtype = F64, rows: int = 6) -> Tensor:
    return torch.randn(rows, i, dtype=F64, generator=torch.Generator().manual_seed(9)).to(dtype)


def output(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)


class OneConv1D(nn.Module):
    """GPT-2's layer, which stores its weight as (i, o)."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.layer = Conv1D(o, i).to(F64)
        rng = torch.Generator().manual_seed(0)
        for p in self.layer.parameters():
            nn.init.normal_(p, generator=rng)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


@pytest.mark.parametrize("kind", ["bias", "no-bias", "conv1d"])
@pytest.mark.parametrize(("i", "o"), SHAPES)
@pytest.mark.parametrize("method", AFFINE)
def test_merged_is_unmerged(method: str, i: int, o: int, kind: str) -> None:
    model = OneConv1D(i, o) if kind == "conv1d" else OneLayer(i, o, kind == "bias")
    attached(model, method, [inputs(i, rows=50)], dtype=F64)
    x, before = inputs(i), bits(model)
    y = output(model, x)
    promised = ll.merged_weights(model)
    assert same_bits(before, model)
    report = ll.merge(model)
    assert relative(output(model, x), y) <= TOLERANCE
    assert relative(y, output(model, x * 0) + x @ matrix(model).T) <= TOLERANCE
    assert report["layer"].rounding == 0.0
    assert report["layer"].error <= TOLERANCE
    written = {key: value for key, value in model.named_parameters() if ".lora." not in key}
    assert set(promised) == set(written)
    assert all(torch.equal(promised[key], written[key]) for key in promised)
    ll.unmerge(model)
    assert same_bits(before, model)
    assert torch.equal(output(model, x), y)
    assert ("layer.bias" in promised) == (kind != "no-bias")


def matrix(model: Any) -> Tensor:
    W = model.layer.weight.detach()
    return W.T if isinstance(model.layer, Conv1D) else W


@pytest.mark.parametrize("bias_std", [1.0, 30.0])
@pytest.mark.parametrize("method", AFFINE)
def test_bf16_merges_to_the_final_rounding(method: str, bias_std: float) -> None:
    """The exact weights come from the ordinary forward pass of an fp64 copy, on the identity."""
    model = OneLayer(24, 16, dtype=BF16)
    with torch.no_grad():
        model.layer.bias *= bias_std
    attached(model, method, [inputs(24, BF16, rows=50)], dtype=F64)
    wide = copy.deepcopy(model).double()
    b = output(wide, torch.zeros(1, 24, dtype=F64))
    W = (output(wide, torch.eye(24, dtype=F64)) - b).T
    W = torch.where(W.abs() < 1e-12 * bias_std, torch.zeros_like(W), W)
    y = output(model, inputs(24, BF16))
    report = ll.merge(model)["layer"]
    stored = model.layer.weight.detach()
    eps = torch.finfo(BF16).eps
    assert stored.dtype == BF16
    # Only a value next to the middle between two neighbours may be rounded to the other one.
    assert float((stored == W.to(BF16)).float().mean()) > 0.99
    assert relative(stored.double(), W) <= eps / 2
    assert relative(model.layer.bias.detach().double(), b[0]) <= eps / 2
    assert abs(report.rounding - relative(stored.double(), W)) <= 1e-9
    assert relative(output(model, inputs(24, BF16)).double(), y.double()) <= 2 * eps
    assert report.error <= 2 * eps


def test_the_report_tells_the_disagreement() -> None:
    """On a weight whose rounding is coarse, the figures are what they are said to be."""
    model = OneLayer(24, 16, dtype=BF16)
    attached(model, "lora", dtype=F64)
    exact = ll.merged_weights(copy.deepcopy(model).double())["layer.weight"]
    x = torch.randn(8, 24, generator=torch.Generator().manual_seed(0)).to(BF16)
    adapted = output(model, x).double()
    report = ll.merge(model)["layer"]
    assert report.rounding == pytest.approx(relative(model.layer.weight.detach().double(), exact), rel=1e-12)
    assert report.error == pytest.approx(relative(output(model, x).double(), adapted), rel=1e-12)
    assert 0 < report.rounding < report.error < 2 * torch.finfo(BF16).eps


STACKS = [
    ([*(AFFINE * 2)[k : k + n]], shape) for n, shape in ((2, (24, 16)), (3, (16, 24))) for k in range(len(AFFINE))
]


@pytest.mark.parametrize(("stack", "shape"), STACKS, ids=lambda value: "+".join(map(str, value)))
def test_stacks_merge_to_what_the_forward_does(stack: list[str], shape: tuple[int, int]) -> None:
    i, o = shape
    model = OneLayer(i, o)
    for k, method in enumerate(stack):
        attached(model, method, [inputs(i, rows=50)], name=f"{method}_{k}", dtype=F64, seed=k)
    x, before = inputs(i), bits(model)
    y = output(model, x)
    ll.merge(model)
    assert relative(output(model, x), y) <= TOLERANCE
    ll.unmerge(model)
    assert same_bits(before, model)


@pytest.mark.parametrize("method", AFTER)
def test_a_stack_is_the_sum_of_changes_after_the_befores(method: str) -> None:
    """W' = (W + sum of changes(W)) R_n ... R_1, from what each adapter alone makes of W (16 x 16, so invertible)."""
    befores, afters = (BEFORE * 2)[:2], [method, AFTER[AFTER.index(method) - 1]]
    stack = [befores[0], afters[0], befores[1], afters[1]]
    model = OneLayer(16, 16)
    W = model.layer.weight.detach().clone()
    for k, each in enumerate(stack):
        attached(model, each, [inputs(16, rows=50)], name=f"a{k}", dtype=F64, seed=k)
        with torch.no_grad():
            for p in model.layer.lora[f"a{k}"].parameters():  # type: ignore[union-attr]
                p.mul_(1 + 0.1 * k)
    alone = []
    for k in range(4):
        with ll.scale(model, {f"a{j}": float(j == k) for j in range(4)}):
            alone.append(ll.merged_weights(model)["layer.weight"])
    R1, R2 = torch.linalg.solve(W, alone[0]), torch.linalg.solve(W, alone[2])
    assert relative(R1 @ R2, R2 @ R1) > 1e-6 or befores[0] == befores[1]
    expected = (alone[1] + alone[3] - W) @ R2 @ R1
    assert relative(ll.merged_weights(model)["layer.weight"], expected) <= TOLERANCE


@pytest.mark.parametrize("method", AFTER)
def test_the_order_of_changes_does_not_matter(method: str) -> None:
    others = [BEFORE[0], AFTER[AFTER.index(method) - 1]]
    results = []
    for order in ([method, *others], [*others, method], [others[0], method, others[1]]):
        model = OneLayer(24, 16)
        for each in order:
            cfg = tiny(each, dtype=F64)
            ll.attach(model, cfg, calibration(cfg, [inputs(24, rows=50)]), name=each)
        for each in order:  # once all are attached, for calibration sees what is in force
            perturb([model.layer.lora[each]])  # type: ignore[union-attr, list-item]
        results.append((output(model, inputs(24)), ll.merged_weights(model)["layer.weight"]))
    for y, W in results[1:]:
        assert relative(y, results[0][0]) <= 1e-14
        assert relative(W, results[0][1]) <= 1e-14


@pytest.mark.parametrize("c", [0.5, -1.0, 0.0])
@pytest.mark.parametrize("method", AFFINE)
def test_the_coefficient_in_force_is_folded(method: str, c: float) -> None:
    model = OneLayer(24, 16)
    W = model.layer.weight.detach().clone()
    attached(model, method, [inputs(24, rows=50)], dtype=F64)
    x = inputs(24)
    full = output(model, x)
    with ll.scale(model, c):
        y = output(model, x)
        ll.merge(model)
        assert relative(output(model, x), y) <= TOLERANCE
    assert relative(output(model, x), y) <= TOLERANCE  # what is folded stays, whatever the coefficient is later
    assert relative(y, full) > 1e-4
    assert (relative(model.layer.weight.detach(), W) <= 1e-15) == (c == 0)
    ll.unmerge(model)
    assert torch.equal(output(model, x), full)


@pytest.mark.parametrize("method", AFFINE)
def test_a_whole_model_merges(method: str) -> None:
    """In training mode as well: what dropout and modes do is no part of the weights."""
    model = tiny_llama(F64)
    batch = {"input_ids": token_ids()}
    attached(model, method, [batch], dtype=F64)
    with torch.no_grad():
        y = model(**batch).logits
        promised = ll.merged_weights(model)
        report = ll.merge(model.train())
        assert model.training
        merged = model.eval()(**batch).logits
    assert relative(merged, y) <= TOLERANCE
    assert {f"{path}.weight" for path in report} == {key for key in promised if key.endswith("weight")}
    assert max(each.error for each in report.values()) <= TOLERANCE


def test_an_adapter_that_hits_dropout_merges_as_in_evaluation() -> None:
    model = OneLayer(24, 16).train()
    cfg = tiny("lora", dtype=F64, dropout=0.5)
    perturb(ll.attach(model, cfg).targets.values())
    y = output(model.eval(), inputs(24))
    report = ll.merge(model.train())
    assert report["layer"].error <= TOLERANCE
    assert relative(output(model, inputs(24)), y) <= TOLERANCE
