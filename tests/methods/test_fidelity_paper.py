"""Every method against its paper's equation (see equations.py), and what its initial values are."""

import math
from typing import Any

import pytest
import torch

import lora_lite as ll
from equations import EQUATIONS, Tensors, reflections, rotation
from helpers import METHODS, OneLayer, calibration, perturb, relative, tiny

TOLERANCE = 1e-10
F64 = torch.float64
SHAPES = [(24, 16), (16, 24), (16, 16)]  # (i, o)
CONFIGS = {  # further configs of a method than its tiny one
    "hra": [{"r": 6}],
    "road": [{"road_variant": f"road_{k}", "group_size": size} for k in (1, 2, 4) for size in (2, 8)],
    "lora": [{"r": 3, "alpha": 5.0}],
    "lora_xs": [{"r": 5, "alpha": 7.0}],
    "pissa": [{"r": 5, "alpha": 7.0}],
}
AFFINE = [method for method in METHODS if ll.methods()[method].facts.affine]
CASES = [(method, changes) for method in AFFINE for changes in ({}, *CONFIGS.get(method, []))]


def attached(method: str, i: int, o: int, bias: bool = True, **changes: Any) -> tuple[OneLayer, Any]:
    """An fp64 layer with an fp64 adapter."""
    cfg = tiny(method, dtype=F64, **changes)
    model = OneLayer(i, o, bias)
    data = [torch.randn(50, i, dtype=F64, generator=torch.Generator().manual_seed(7))]
    return model.eval(), ll.attach(model, cfg, calibration(cfg, data)).targets["layer"]


def copies(adapter: Any) -> Tensors:
    return {key: value.detach().clone() for key, value in adapter.state_dict().items()}


def test_every_method_has_its_equation_here() -> None:
    assert set(AFFINE) <= set(EQUATIONS), "write the new method's equation, from its paper"


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize(("i", "o"), SHAPES)
@pytest.mark.parametrize(("method", "changes"), CASES, ids=str)
def test_forward_and_gradients_are_the_papers(method: str, changes: dict[str, Any], i: int, o: int, bias: bool) -> None:
    model, adapter = attached(method, i, o, bias, **changes)
    start = copies(adapter)
    perturb([adapter], 0.3)
    W = model.layer.weight.detach()
    b = model.layer.bias.detach() if bias else torch.zeros(o, dtype=F64)
    trained = {key: p.detach().clone().requires_grad_() for key, p in adapter.named_parameters()}
    rng = torch.Generator().manual_seed(3)
    x = torch.randn(2, 5, i, dtype=F64, generator=rng, requires_grad=True)
    weigh = torch.randn(2, 5, o, dtype=F64, generator=rng)
    W1, b1 = EQUATIONS[method](W, b, trained, start, adapter.cfg)
    for c in (1.0, 0.5, -1.0) if adapter.facts.linear_in_c else (1.0,):
        expected = x @ (W + c * (W1 - W)).T + b + c * (b1 - b)
        with ll.scale(model, c):
            y = model(x)
        assert relative(y.detach(), expected.detach()) <= TOLERANCE
        assert relative(y.detach(), (x @ W.T + b).detach()) > 1e-3  # else the comparison would prove little
        found = torch.autograd.grad((y * weigh).sum(), [x, *adapter.parameters()])
        wanted = torch.autograd.grad((expected * weigh).sum(), [x, *trained.values()], retain_graph=True)
        for key, ours, theirs in zip(["x", *trained], found, wanted, strict=True):
            assert relative(ours, theirs) <= TOLERANCE, key


@pytest.mark.parametrize(("i", "o"), SHAPES)
@pytest.mark.parametrize(("method", "changes"), CASES, ids=str)
def test_the_equation_starts_at_the_base(method: str, changes: dict[str, Any], i: int, o: int) -> None:
    """The paper's own formula, with the library's initial values: identity needs no trick of the code's."""
    model, adapter = attached(method, i, o, **changes)
    W, b = model.layer.weight.detach(), model.layer.bias.detach()
    W1, b1 = EQUATIONS[method](W, b, copies(adapter), copies(adapter), adapter.cfg)
    assert relative(W1, W) <= max(1e-12, adapter.identity_bound(adapter.cfg, F64))
    assert relative(b1, b) <= 1e-12
    x = torch.randn(5, i, dtype=F64, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        y, plain = model(x), x @ W.T + b
        with ll.disabled(model):
            assert torch.equal(model(x), torch.nn.functional.linear(x, W, b))
    assert float((y - plain).abs().max() / plain.abs().max()) <= adapter.identity_bound(adapter.cfg, F64) + 1e-15


@pytest.mark.parametrize("kind", ["zero", "rank one", "row", "column"])
@pytest.mark.parametrize(("i", "o"), SHAPES[:2])
@pytest.mark.parametrize("method", [method for method in METHODS if ll.methods()[method].facts.trained])
def test_a_degenerate_weight_gives_finite_numbers(method: str, i: int, o: int, kind: str) -> None:
    """No norm, root or factorisation may divide by zero: such weights occur (zero-initialised or pruned layers)."""
    model = OneLayer(i, o, dtype=torch.float32)
    with torch.no_grad():
        W = model.layer.weight
        one_row, one_column = W.clone(), W.clone()
        one_row[3], one_column[:, 3] = 0.0, 0.0
        by_kind = {"zero": 0 * W, "rank one": torch.outer(W[:, 0], W[0]), "row": one_row, "column": one_column}
        W.copy_(by_kind[kind])
    x = torch.randn(50, i, generator=torch.Generator().manual_seed(7))
    cfg = tiny(method, **({} if "r" in ll.methods()[method].Config.unused else {"r": 16}))
    y = model(x).detach()
    adapter = ll.attach(model, cfg, calibration(cfg, [x])).targets["layer"]
    bound = adapter.identity_bound(cfg, torch.float32)
    for size in (0.0, 0.05):
        perturb([adapter], size)
        now = model(x)
        now.square().sum().backward()
        assert size or float((now.detach() - y).abs().max() / y.abs().max()) <= bound
        assert torch.isfinite(now).all()
        assert all(torch.isfinite(p.grad).all() for p in adapter.parameters())
        assert all(torch.isfinite(value).all() for value in adapter.state_dict().values())


def test_dora_holds_the_norm_constant_in_backward() -> None:
    """With the norm differentiated, the gradients of A and B would be others: the equation above tells them apart."""
    model, adapter = attached("dora", 24, 16)
    perturb([adapter], 0.3)
    t = {key: p.detach().clone().requires_grad_() for key, p in adapter.named_parameters()}
    x = torch.randn(5, 24, dtype=F64, generator=torch.Generator().manual_seed(3))
    V = model.layer.weight.detach() + adapter.cfg.scaling * t["B"] @ t["A"]
    y = x @ (t["m"].unsqueeze(1) * V / V.norm(dim=1, keepdim=True)).T + model.layer.bias.detach()
    (through,) = torch.autograd.grad(y.square().sum(), t["B"])
    (held,) = torch.autograd.grad(model(x).square().sum(), adapter.B)
    assert relative(held, through) > 1e-2


def test_dora_gives_rows_the_norm_m() -> None:
    model, adapter = attached("dora", 24, 16)
    perturb([adapter], 0.3)
    norms = ll.merged_weights(model)["layer.weight"].norm(dim=1)
    assert relative(norms, adapter.m.detach().abs()) <= 1e-14


@pytest.mark.parametrize(("i", "o"), SHAPES)
@pytest.mark.parametrize("alpha", [5.0, 11.0])
def test_pissa_starts_from_the_best_approximation_of_its_rank(i: int, o: int, alpha: float) -> None:
    model, adapter = attached("pissa", i, o, r=5, alpha=alpha)
    U, S, Vh = torch.linalg.svd(model.layer.weight.detach(), full_matrices=False)
    best = U[:, :5] @ torch.diag(S[:5]) @ Vh[:5]
    assert relative(alpha / 5 * adapter.B0 @ adapter.A0, best) <= 1e-12
    assert relative(adapter.A0 @ adapter.A0.T, torch.diag(S[:5]) * 5 / alpha) <= 1e-12  # balanced: both hold S^1/2
    assert relative(adapter.B0.T @ adapter.B0, torch.diag(S[:5]) * 5 / alpha) <= 1e-12
    assert torch.equal(adapter.A, adapter.A0) and torch.equal(adapter.B, adapter.B0)


def test_hra_is_orthogonal_with_its_pairs_broken() -> None:
    model, adapter = attached("hra", 24, 16, r=6)
    perturb([adapter], 0.3)
    x = torch.eye(24, dtype=F64)
    turned = adapter.before(x, model.layer, torch.tensor(1.0, dtype=F64)).detach()
    assert relative(turned @ turned.T, x) <= 1e-14
    assert relative(turned, reflections(adapter.U.detach()).T) <= 1e-14
    assert relative(turned, x) > 0.1


def test_hra_reads_the_norm_of_no_reflection() -> None:
    model, adapter = attached("hra", 24, 16, r=6)
    perturb([adapter], 0.3)
    x = torch.randn(5, 24, dtype=F64, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        y = model(x)
        adapter.U *= torch.linspace(0.1, 10, 6, dtype=F64).unsqueeze(1)
        assert relative(model(x), y) <= 1e-14


@pytest.mark.parametrize("variant", ["road_1", "road_2", "road_4"])
def test_road_pairs_neighbours_at_group_size_two(variant: str) -> None:
    """The paper's eqs. 2 and 3: 2 x 2 blocks on the diagonal. A rotation, if all its scales are 1 (road_1)."""
    model, adapter = attached("road", 24, 16, road_variant=variant, group_size=2)
    perturb([adapter], 0.3)
    R = rotation(adapter.theta.detach(), adapter.alpha.detach(), 2)
    blocks = torch.block_diag(*[R[k : k + 2, k : k + 2] for k in range(0, 16, 2)])
    assert torch.equal(R, blocks)
    assert relative(ll.merged_weights(model)["layer.weight"], R @ model.layer.weight.detach()) <= 1e-14
    if variant == "road_1":
        R = rotation(adapter.theta.detach(), torch.ones_like(adapter.alpha), 2)
        assert relative(R @ R.T, torch.eye(16, dtype=F64)) <= 1e-14


@pytest.mark.parametrize("size", [0.01, 1.0, 100.0])
def test_delora_bounds_the_change(size: float) -> None:
    """Eq. 7: lam ||.|| bounds the trained update, however far A and B went; the subtracted one adds at most lambda0."""
    model, adapter = attached("delora", 24, 16, r=4, lambda0=3.0)
    with torch.no_grad():
        adapter.A.normal_(0.0, size, generator=torch.Generator().manual_seed(1))
        adapter.B.normal_(0.0, size, generator=torch.Generator().manual_seed(2))
        adapter.lam.fill_(2.0)
    W = model.layer.weight.detach()
    change = ll.merged_weights(model)["layer.weight"] - W
    assert float((change / W.norm(dim=0)).norm()) <= 2.0 + 3.0
    with torch.no_grad():
        adapter.B.copy_(adapter.B0)  # the same angles: the strengths subtract
        adapter.A.copy_(adapter.A0)
    change = ll.merged_weights(model)["layer.weight"] - W
    assert float((change / W.norm(dim=0)).norm()) <= 1.0


def test_delora_moves_in_proportion_to_the_step() -> None:
    """What subtracting the initial update is for: started at B = 0, one step of any size switches on the full norm."""
    sizes = []
    for lr in (1e-5, 1e-3):
        model, adapter = attached("delora", 64, 48, r=4)
        optimizer = torch.optim.AdamW([adapter.A, adapter.B], lr=lr, weight_decay=0.0)
        model(torch.ones(4, 64, dtype=F64)).square().sum().backward()
        optimizer.step()
        sizes.append(relative(ll.merged_weights(model)["layer.weight"], model.layer.weight.detach()))
    assert 90 < sizes[1] / sizes[0] < 110


@pytest.mark.parametrize(("i", "o"), SHAPES)
def test_lora_xs_spans_the_leading_singular_directions(i: int, o: int) -> None:
    model, adapter = attached("lora_xs", i, o, r=5, alpha=5.0)
    U, S, Vh = torch.linalg.svd(model.layer.weight.detach(), full_matrices=False)
    assert relative((U[:, :5].T @ adapter.U).abs(), torch.eye(5, dtype=F64)) <= 1e-12
    assert relative(adapter.S, S[:5]) <= 1e-12
    assert relative((adapter.U.T @ model.layer.weight.detach() @ Vh[:5].T).abs(), torch.diag(S[:5])) <= 1e-12


def test_lora_xs_starts_at_zero_or_at_the_papers_noise() -> None:
    _, exact = attached("lora_xs", 120, 100, r=100)
    assert not exact.R.any()
    model, noisy = attached("lora_xs", 120, 100, r=100, init_std=1e-5)
    # 10000 draws: the standard error of the deviation is 0.7%.
    assert math.isclose(float(noisy.R.detach().std()), 1e-5, rel_tol=0.03)
    W = model.layer.weight.detach()
    assert 0 < relative(ll.merged_weights(model)["layer.weight"], W) < 1e-3


@pytest.mark.parametrize("method", [name for name in METHODS if hasattr(ll.methods()[name].Config, "rslora")])
def test_rslora_divides_by_the_root_of_r(method: str) -> None:
    plain, stabilised = (attached(method, 24, 16, r=9, alpha=6.0, rslora=flag)[1] for flag in (False, True))
    assert math.isclose(plain.cfg.scaling, 6 / 9)
    assert math.isclose(stabilised.cfg.scaling, 6 / 3)


@pytest.mark.parametrize("method", [name for name in METHODS if hasattr(ll.methods()[name].Config, "dropout")])
def test_dropout_acts_in_training_alone_and_on_the_low_rank_path(method: str) -> None:
    model, adapter = attached(method, 24, 16, r=3, alpha=6.0, dropout=0.5)
    perturb([adapter], 0.3)
    x = torch.randn(2000, 24, dtype=F64, generator=torch.Generator().manual_seed(3))
    with torch.no_grad(), torch.random.fork_rng():
        still = model(x)
        assert torch.equal(model(x), still)
        model.train()
        torch.manual_seed(0)
        first = model(x)
        assert not torch.equal(model(x), first)
        assert relative(first, still) > 1e-2
        adapter.A.zero_()  # nothing but the low-rank path may have been dropped
        dropped = model(x)
        assert torch.equal(dropped, model.eval()(x))
