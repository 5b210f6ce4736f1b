"""What the cores promise: contractions contract, rotations keep to bounds, gains stay positive, signs do not matter and
parameters never outlive the basis that they were made for."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import lora_lite as ll
import textbook
from helpers import METHODS, OneLayer, bits, calibration, perturb, relative, same_bits, tiny
from lora_lite.frozen_basis.adapter import FrozenBasisAdapter

F64 = torch.float64
FAMILY = [name for name in METHODS if issubclass(ll.methods()[name], FrozenBasisAdapter)]
CORES = [name for name in FAMILY if ll.methods()[name].facts.trained]
seeds, cs = st.integers(0, 10**6), st.floats(0, 1)
X = torch.randn(40, 24, dtype=F64, generator=torch.Generator().manual_seed(5))


def attached(method: str, model: Any = None, **changes: Any) -> tuple[Any, Any]:
    model = OneLayer(24, 16) if model is None else model
    cfg = tiny(method, **{"dtype": F64, **changes})
    return model, ll.attach(model, cfg, calibration(cfg, [X.to(model.layer.weight.dtype)])).targets["layer"]


def one(value: float) -> Tensor:
    return torch.tensor(value, dtype=F64)


def matrix(adapter: Any, c: float) -> Tensor:
    """D with delta(h) = D h."""
    return adapter.delta(torch.eye(adapter.r, dtype=F64), one(c)).T.detach()


@settings(max_examples=60, deadline=None)
@given(seed=seeds, c=cs, size=st.sampled_from([0.1, 1.0, 30.0]), k=st.integers(1, 8))
def test_the_ablation_is_a_contraction(seed: int, c: float, size: float, k: int) -> None:
    _, adapter = attached("antipasto_ablate", k=k)
    perturb([adapter], size, seed)
    values = torch.linalg.svdvals(torch.eye(8, dtype=F64) + matrix(adapter, c))
    assert bool((values <= 1 + 1e-12).all()) and bool((values >= 0).all())


@pytest.mark.parametrize("start", [1.5, -0.5])
def test_alpha_comes_back_into_its_bounds(start: float) -> None:
    """A clamp alone would hold it outside for good; what leads further out is stopped."""
    _, adapter = attached("antipasto_ablate", k=1)
    h = X[:, :8]
    with torch.no_grad():
        Q = torch.linalg.qr(adapter.C).Q
    optimizer = torch.optim.SGD([adapter.alpha], lr=0.05)

    def descend(target: float, steps: int) -> float:
        """Steps towards removing `target` of the direction."""
        with torch.no_grad():
            adapter.alpha.fill_(start)
        for _ in range(steps):
            optimizer.zero_grad()
            (adapter.delta(h, one(1.0)) + target * h @ Q @ Q.T).square().sum(1).mean().backward()
            optimizer.step()
        return float(adapter.alpha.detach())

    assert descend(0.5, 200) == pytest.approx(0.5, abs=0.01)
    assert descend(2.0 if start > 0 else -1.0, 5) == start


def test_suppress_only_never_amplifies_and_can_still_learn() -> None:
    _, adapter = attached("antipasto", suppress_only=True)
    with torch.no_grad():
        adapter.g.copy_(torch.linspace(-3, 3, 8))
    for c in (0.0, 0.4, 1.0):
        gain = 1 + matrix(adapter, c).diagonal()
        assert bool((gain <= 1).all()) and bool((gain > 0).all())
    assert bool((1 + matrix(adapter, -1.0).diagonal() >= 1).all())  # its opposite undoes
    for sign in (1.0, -1.0):  # a loss that wants less, or more, of every direction
        adapter.g.grad = None
        (sign * adapter.delta(torch.ones(1, 8, dtype=F64), one(1.0)).sum()).backward()
        above = adapter.g > 0
        assert bool(adapter.g.grad[~above].ne(0).all())
        assert bool(adapter.g.grad[above].ne(0).all()) == (sign > 0)


@settings(max_examples=60, deadline=None)
@given(g=st.floats(-30, 30), c=st.floats(-2, 2))
def test_the_gain_is_positive(g: float, c: float) -> None:
    _, adapter = attached("antipasto")
    with torch.no_grad():
        adapter.g.fill_(g)
    gain = float(1 + adapter.gain(one(c))[0].detach())
    assert gain == pytest.approx(float(textbook.new_scale(one(g), c)), rel=1e-9, abs=1e-15)
    assert gain > 0 or c * g < -30


@settings(max_examples=60, deadline=None)
@given(seed=seeds, c=st.floats(-3, 3), size=st.sampled_from([0.1, 1.0, 100.0]), bs=st.sampled_from([2, 4, 8]))
def test_rotations(seed: int, c: float, size: float, bs: int) -> None:
    angle = 0.7
    _, adapter = attached(
        "antipasto_rot", block_size=bs, max_rotation_angle=angle, rotate_basis="V", dtype=torch.float32
    )
    perturb([adapter], size, seed)
    eye = torch.eye(bs, dtype=F64)
    R, back = (adapter.turn(adapter.rot_T, one(value)).detach() + eye for value in (c, -c))
    assert float((R.mT @ R - eye).abs().max()) <= 1e-6
    assert float((back - R.mT).abs().max()) <= 1e-12
    expected = textbook.rotation(adapter.rot_T.detach().double(), bs, angle, c)
    assert float((torch.block_diag(*R) - expected).abs().max()) <= 1e-12
    X = torch.linalg.solve(R + eye, R - eye, left=False)  # the Cayley transform is its own inverse
    assert float(X.abs().max()) <= math.tan(angle / 2) + 1e-9
    if bs == 2:
        assert float(torch.acos((R[:, 0, 0]).clamp(-1, 1)).max()) <= angle + 1e-9


def test_larger_blocks_can_turn_further_than_the_angle() -> None:
    """The bound is of each entry: the docs say so."""
    _, adapter = attached("antipasto_rot", block_size=8, max_rotation_angle=0.7, rotate_basis="V")
    with torch.no_grad():
        adapter.rot_T.fill_(100.0)
    R = adapter.turn(adapter.rot_T, one(1.0)).detach()[0] + torch.eye(8, dtype=F64)
    assert float(torch.linalg.eigvals(R).angle().abs().max()) > 1.4


def test_one_mixing_weight_routes_one_direction_to_another() -> None:
    model, adapter = attached("antipasto_arrow", block=3)
    with torch.no_grad():
        adapter.M[2, 0] = 0.7
    W, U = model.layer.weight.detach(), adapter.U
    change = ll.merged_weights(model)["layer.weight"] - W
    assert relative(change, 0.7 * torch.outer(U[:, 2], U[:, 0] @ W)) <= 1e-12
    x = torch.linalg.pinv(U.T @ W)[:, 0]  # carries direction 0 alone
    moved = U.T @ (change @ x)
    assert relative(moved, 0.7 * torch.eye(8, dtype=F64)[2]) <= 1e-9
    _, diagonal = attached("antipasto")
    perturb([diagonal], 1.0)
    assert matrix(diagonal, 1.0)[2, 0] == 0


def conjugated(adapter: Any, Z: Tensor) -> None:
    """Carry the core along when U becomes U Z, for a signed permutation Z that keeps S."""
    adapter.U.copy_(adapter.U @ Z)
    with torch.no_grad():
        for key, p in dict(adapter.named_parameters()).items():
            if key == "g":
                p.copy_((Z.abs().T @ p) if len(p) == len(Z) else p)
            elif key in ("B", "C"):
                p.copy_(Z.T @ p)
            elif key == "A":
                p.copy_(p @ Z)
            elif key == "R":
                p.copy_(Z.T @ p @ Z)
            elif key == "M":
                part = Z[: len(p), : len(p)]
                p.copy_(part.T @ p @ part)
            elif key == "d":
                p.copy_(Z.abs().T @ p)
            elif key.startswith("rot_T"):
                bs = adapter.cfg.block_size
                row, column = torch.triu_indices(bs, bs, 1)
                sign = Z.diagonal().reshape(-1, bs)
                p.mul_(sign[:, row] * sign[:, column])


@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("method", CORES)
def test_signs_of_singular_pairs_do_not_matter(method: str, side: str) -> None:
    model, adapter = attached(method, side=side)
    perturb([adapter], 0.2)
    Z = torch.diag(torch.tensor([1.0, -1, 1, -1, -1, 1, 1, -1], dtype=F64))
    with torch.no_grad():
        expected = model(X)
        conjugated(adapter, Z)
        adapter.derive(model.layer)
        assert relative(model(X), expected) <= 1e-13


@pytest.mark.parametrize("method", ["antipasto", "antipasto_dplr", "antipasto_ablate", "lora_xs"])
def test_the_order_of_equal_singular_values_does_not_matter(method: str) -> None:
    model = OneLayer(24, 16)
    U, S, Vh = torch.linalg.svd(model.layer.weight.detach(), full_matrices=False)
    S[2:5] = S[2]
    model.layer.weight.data.copy_(U @ torch.diag(S) @ Vh)
    model, adapter = attached(method, model)
    perturb([adapter], 0.2)
    Z = torch.eye(8, dtype=F64)[[0, 1, 3, 4, 2, 5, 6, 7]].T
    with torch.no_grad():
        expected = model(X)
        conjugated(adapter, Z)
        adapter.derive(model.layer)
        assert relative(model(X), expected) <= 1e-13


@pytest.mark.parametrize("method", CORES)
def test_parameters_are_born_after_their_basis(method: str, tmp_path: Path) -> None:
    """Neither attaching again nor loading over leaves a core on a basis that it was not made for."""
    model, adapter = attached(method, side="output")
    first = bits(adapter)
    perturb([adapter], 0.2)
    path = ll.save(model, tmp_path / "a.safetensors")
    trained = bits(adapter)
    ll.detach(model)
    with torch.no_grad():
        model.layer.weight.copy_(torch.randn(16, 24, dtype=F64, generator=torch.Generator().manual_seed(9)))
    model, again = attached(method, model, side="output")
    parameters = dict(again.named_parameters())
    assert not torch.equal(again.U, first["U"])
    assert all(torch.equal(p, first[key]) for key, p in parameters.items())  # seeded initial values, not trained ones
    ll.load(model, path, overwrite=True, base="any")
    assert again is ll.attachment(model).targets["layer"] and same_bits(
        {k: trained[k] for k in first if k != "P"}, again
    )
    assert again.P is None or relative(again.P, again.U.T @ model.layer.weight.detach()) <= 1e-13


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", CORES)
def test_zero_singular_values(method: str, dtype: torch.dtype) -> None:
    model = OneLayer(24, 16, dtype=dtype)
    with torch.no_grad():
        model.layer.weight.copy_(torch.outer(model.layer.weight[:, 0], model.layer.weight[0]))
    base = model(X.to(dtype))
    model, adapter = attached(method, model, dtype=torch.float32)
    if adapter.identity_bound(adapter.cfg) == 0:
        assert torch.equal(model(X.to(dtype)), base)
    perturb([adapter], 0.2)
    y = model(X.to(dtype))
    y.float().square().sum().backward()
    assert torch.isfinite(y).all() and all(torch.isfinite(p.grad).all() for p in adapter.parameters())
    assert not adapter.inverse_S[adapter.S == 0].any() and int((adapter.S > 0).sum()) <= 8


@pytest.mark.parametrize(
    ("method", "changes", "words"),
    [
        ("antipasto", {"r": 17}, "r = 17 is larger than the rank min"),
        ("antipasto_rot", {"r": 10}, r"r = 10 \(of min\(i, o\) = 16\) is not divisible by block_size = 4"),
        ("antipasto_arrow", {"block": 8}, "block = 8 must be smaller than the number of directions r = 8"),
        ("antipasto_ablate", {"k": 9}, "k = 9 is larger than the number of directions r = 8"),
        ("antipasto_dplr", {"lora_rank": 9}, "lora_rank = 9 is larger than the number of directions r = 8"),
    ],
)
def test_sizes_that_do_not_fit(method: str, changes: dict[str, Any], words: str) -> None:
    model = OneLayer(24, 16)
    before = bits(model)
    with pytest.raises(ll.TargetError, match=f"layer: {words}"):
        attached(method, model, **changes)
    assert same_bits(before, model) and not hasattr(model.layer, "lora")


@pytest.mark.parametrize("method", [name for name in CORES if name != "lora_xs"])
def test_the_default_r_is_lowered_to_the_layers_rank(method: str) -> None:
    model = OneLayer(24, 18)
    cfg = ll.methods()[method].Config(target_roles=())
    att = ll.attach(model, cfg, calibration(cfg, [X]))
    r = 16 if method == "antipasto_rot" else 18  # a multiple of the block
    assert att.targets["layer"].r == r and f"U (18, {r})" in att.summary()
    _, everything = attached(method, OneLayer(24, 20), r=None)
    assert everything.r == 20
