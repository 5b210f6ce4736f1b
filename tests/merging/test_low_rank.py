"""`ll.low_rank`: the exact factors of any affine stack, against the merged weights, which are computed otherwise."""

import resource
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_lite as ll
from helpers import METHODS, OneLayer, attached, relative

AFFINE = [method for method in METHODS if ll.methods()[method].facts.affine]
BATCHES = [torch.randn(64, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(k)) for k in range(12)]


def change(model: OneLayer) -> tuple[Tensor, Tensor]:
    """(dW, db) by `merged_weights`: the layer on the identity."""
    merged, layer = ll.merged_weights(model), model.layer
    return merged["layer.weight"] - layer.weight, merged["layer.bias"] - layer.bias


def agree(model: OneLayer, found: Any) -> None:
    (B, A), (dW, db) = found, change(model)
    assert B.shape == (dW.shape[0], found.rank) and A.shape == (found.rank, dW.shape[1])
    assert relative(B @ A, dW) < 1e-10 and found.error < 1e-10
    assert relative(B.T @ B, torch.eye(found.rank, dtype=B.dtype)) < 1e-10
    assert torch.equal(db, torch.zeros_like(db)) if found.bias is None else relative(found.bias, db) < 1e-10


@pytest.mark.parametrize("c", [1.0, -0.7])
@pytest.mark.parametrize("method", AFFINE)
def test_the_factors_are_the_change(method: str, c: float) -> None:
    model = OneLayer(24, 40)
    attached(model, method, BATCHES)
    with ll.scale(model, c):
        [found] = ll.low_rank(model).values()
        agree(model, found)
        dW, _ = change(model)
    assert found.rank == int(torch.linalg.matrix_rank(dW, rtol=1e-9)) > 0


@pytest.mark.parametrize("third", ["ia3_ff", "hra", "antipasto_rot"])
@pytest.mark.parametrize("second", ["dora", "delora", "ia3"])
@pytest.mark.parametrize("first", ["lora", "pissa", "antipasto"])
def test_a_stack_of_three(first: str, second: str, third: str) -> None:
    model = OneLayer(24, 40)
    for name, method in zip("abc", (first, second, third), strict=True):
        attached(model, method, BATCHES, name=name)
    with ll.scale(model, {"a": 0.5, "b": 1.0, "c": -1.0}):
        agree(model, ll.low_rank(model)["layer"])
        alone = ll.low_rank(model, "a")["layer"]
    with ll.scale(model, {"a": 0.5, "b": 0.0, "c": 0.0}):
        agree(model, alone)


@pytest.mark.parametrize("method", ["dora", "ia3", "road", "antipasto"])
def test_the_best_part_of_a_rank_is_that_of_the_svd(method: str) -> None:
    model = OneLayer(24, 40)
    attached(model, method, BATCHES)
    dW, _ = change(model)
    S = torch.linalg.svdvals(dW)
    found = ll.low_rank(model, rank=4)["layer"]
    best = float(S[4:].norm() / S.norm())
    assert found.rank == 4 and best <= found.error <= best * 1.01
    assert abs(relative(found.B @ found.A, dW) - found.error) < 1e-10
    assert ll.low_rank(model, rank=400)["layer"].error < 1e-10


def test_nothing_is_written_and_no_change_has_rank_0() -> None:
    model = OneLayer(24, 40)
    ll.attach(model, ll.LoRAConfig(r=2, target_roles=()))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found = ll.low_rank(model)["layer"]
    assert found.rank == 0 and found.bias is None and found.error == 0.0
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in before.items())
    with ll.scale(model, 0.0):
        attached_too = ll.low_rank(model)["layer"]
    assert attached_too.rank == 0


def test_it_works_without_gradients() -> None:
    model = OneLayer(24, 40)
    attached(model, "lora")
    with torch.no_grad():
        agree(model, ll.low_rank(model)["layer"])
    with torch.inference_mode():
        assert ll.low_rank(model)["layer"].rank == 2


def test_what_has_no_factors_is_refused() -> None:
    model = OneLayer(24, 40)
    adapter = attached(model, "lora").targets["layer"]
    with ll.scale(model, torch.tensor([1.0, 2.0])), pytest.raises(ll.StateError, match="one value per row"):
        ll.low_rank(model)
    with pytest.raises(ValueError, match="rank = 0"):
        ll.low_rank(model, rank=0)

    class Bent(type(adapter)):  # type: ignore[misc]
        def change(self, x: Tensor, y: Tensor, layer: nn.Module, c: Tensor) -> Tensor:
            return x.abs() @ self.A.T @ self.B.T

    adapter.__class__ = Bent
    with pytest.raises(ll.NotAffineError, match="layer: the change of its stack is not affine"):
        ll.low_rank(model)
    with pytest.raises(ll.StateError, match="no adapters"):
        ll.low_rank(nn.Linear(2, 2))


def test_a_large_layer_never_has_its_change_formed() -> None:
    """4096 x 11008: W is 360 MB in fp64, and so would dW be."""
    model = OneLayer(11008, 4096, bias=False, dtype=torch.float32)
    attached(model, "lora", r=32)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    [found] = ll.low_rank(model).values()
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert found.rank == 32 and found.error < 1e-10
    assert grown < 1.5 * 11008 * 4096 * 8 / 2**20, f"{grown:.0f} MiB"
