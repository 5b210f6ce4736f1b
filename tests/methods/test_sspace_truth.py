"""Every core on every basis, read on either side, against the textbook form (textbook.py): outputs and gradients."""

from typing import Any

import pytest
import torch

import lora_lite as ll
import textbook
from helpers import OneLayer, perturb, relative

F64 = torch.float64
TOLERANCE = 1e-9
BASES = ["svd", "wanda", "wanda:pool=mean_abs", "asvd", "corda", "corda:power=1.0"]
SHAPES = [(24, 16), (16, 24), (16, 16)]  # (i, o)
CORES: list[tuple[str, dict[str, Any]]] = [
    ("antipasto", {}),
    ("antipasto", {"suppress_only": True}),
    ("antipasto_dplr", {"lora_rank": 3}),
    ("antipasto_arrow", {"block": 3}),
    ("antipasto_ablate", {"k": 1, "init_alpha": 0.5}),
    ("antipasto_ablate", {"k": 3, "init_alpha": 0.5}),
    *(("antipasto_rot", {"rotate_basis": kind, "block_size": 4}) for kind in ("V", "U", "both", "none")),
    ("antipasto_rot", {"rotate_basis": "both", "block_size": 2}),
    ("antipasto_rot", {"rotate_basis": "V", "block_size": 8}),
    ("lora_xs", {}),
    ("lora_xs", {"alpha": 3.0}),
]


def data(i: int) -> torch.Tensor:
    """Inputs of uneven sizes, correlated, with a mean."""
    rng = torch.Generator().manual_seed(5)
    mix = torch.randn(i, i, dtype=F64, generator=rng) * torch.logspace(0, -1, i, dtype=F64)
    return torch.randn(60, i, dtype=F64, generator=rng) @ mix + 0.3


def build(method: str, basis: str, i: int, o: int, side: str, **changes: Any) -> tuple[OneLayer, Any, Any]:
    """(model, adapter, (U, S, P) of the textbook)."""
    model, X = OneLayer(i, o).eval(), data(i)
    cfg = ll.methods()[method].Config(r=8, basis=basis, side=side, dtype=F64, target_roles=(), **changes)
    att = ll.attach(model, cfg, [X] if cfg.basis.needs else None)  # type: ignore[attr-defined]
    adapter: Any = att.targets["layer"]
    found = textbook.basis(basis, model.layer.weight.detach(), X, adapter.r)
    return model, adapter, textbook.aligned(found, adapter.U)


def move(adapter: Any) -> None:
    """Perturb the parameters within their bounds; what the gradient does beyond them, test_sspace_cores.py tells."""
    perturb([adapter], 0.3)
    with torch.no_grad():
        if getattr(adapter.cfg, "suppress_only", False):
            adapter.g.copy_(-adapter.g.abs())
        if hasattr(adapter, "alpha"):
            adapter.alpha.clamp_(0.05, 0.95)


@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize(("i", "o"), SHAPES)
@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize(("method", "changes"), CORES, ids=str)
def test_outputs_and_gradients(method: str, changes: dict[str, Any], basis: str, i: int, o: int, side: str) -> None:
    model, adapter, USP = build(method, basis, i, o, side, **changes)
    assert relative(adapter.U, USP[0]) <= TOLERANCE and relative(adapter.S, USP[1]) <= TOLERANCE
    move(adapter)
    W, b = model.layer.weight.detach(), model.layer.bias.detach()
    t = {key: p.detach().clone().requires_grad_() for key, p in adapter.named_parameters()}
    rng = torch.Generator().manual_seed(3)
    x = torch.randn(3, 5, i, dtype=F64, generator=rng, requires_grad=True)
    weigh = torch.randn(3, 5, o, dtype=F64, generator=rng)
    for c in (1.0, 0.5, -1.0):
        expected = textbook.layer(method, x, W, b, USP, t, adapter.cfg, c)
        with ll.scale(model, c):
            y = model(x)
        base = (x @ W.T + b).detach()
        assert relative((y - base).detach(), (expected - base).detach()) <= TOLERANCE
        assert relative(y.detach(), base) > 1e-3  # else the comparison would prove little
        found = torch.autograd.grad((y * weigh).sum(), [x, *adapter.parameters()])
        wanted = torch.autograd.grad((expected * weigh).sum(), [x, *t.values()])
        for key, ours, theirs in zip(["x", *t], found, wanted, strict=True):
            assert relative(ours, theirs) <= TOLERANCE if theirs.any() else not ours.any(), key


@pytest.mark.parametrize(("method", "changes"), CORES, ids=str)
def test_one_coefficient_a_row(method: str, changes: dict[str, Any]) -> None:
    model, adapter, USP = build(method, "svd", 24, 16, "output", **changes)
    move(adapter)
    W, b = model.layer.weight.detach(), model.layer.bias.detach()
    t = {key: p.detach().clone() for key, p in adapter.named_parameters()}
    x = torch.randn(3, 5, 24, dtype=F64, generator=torch.Generator().manual_seed(3))
    with torch.no_grad(), ll.scale(model, torch.tensor([0.7, 0.0, -1.3], dtype=F64)):
        y = model(x)
    for row, c in enumerate((0.7, 0.0, -1.3)):
        assert relative(y[row], textbook.layer(method, x[row], W, b, USP, t, adapter.cfg, c)) <= TOLERANCE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize(("method", "changes"), CORES, ids=str)
def test_identity_at_attach(method: str, changes: dict[str, Any], basis: str, side: str, dtype: torch.dtype) -> None:
    model = OneLayer(24, 16, dtype=dtype)
    X = data(24).to(dtype)
    base = model(X)
    cfg = ll.methods()[method].Config(r=8, basis=basis, side=side, target_roles=(), **changes)
    adapter: Any = ll.attach(model, cfg, [X] if cfg.basis.needs else None).targets["layer"]  # type: ignore[attr-defined]
    bound = adapter.identity_bound(cfg, dtype)
    if bound == 0:
        assert torch.equal(model(X), base)
    else:
        assert float((model(X) - base).norm().detach() / base.norm().detach()) <= bound
