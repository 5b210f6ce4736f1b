"""What 16 bits can hold, and what is refused because no precision can: overflow, weak directions, NaN."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_lite as ll
from helpers import METHODS, OneLayer, attached, calibration, perturb, relative, tiny

BASES = ("wanda", "wanda:pool=mean_abs", "asvd", "corda", "corda:power=1.0")
SPREAD = torch.logspace(0, -3, 16, dtype=torch.float64)  # singular values


def constant(i: int, o: int, weight: float, dtype: torch.dtype) -> OneLayer:
    model = OneLayer(i, o, bias=False, dtype=dtype)
    model.layer.weight.data.fill_(weight)
    return model


def spread(i: int, o: int, dtype: torch.dtype) -> OneLayer:
    model = OneLayer(i, o, dtype=torch.float64)
    U, _, Vh = torch.linalg.svd(model.layer.weight.detach(), full_matrices=False)
    model.layer.weight.data.copy_(U @ torch.diag(SPREAD) @ Vh)
    return model.to(dtype)


@pytest.mark.parametrize(("i", "o", "weight"), [(16, 256, 1.0), (4096, 32, 1 / 4096), (32, 16, 1.0)])
@pytest.mark.parametrize("method", METHODS)
def test_coordinates_beyond_fp16_of_values_within(method: str, i: int, o: int, weight: float) -> None:
    """|x| |A_j| is beyond 65504 where x and y are not."""
    if method in ("eva", "antipasto_corda", "antipasto_asvd") and i > 1000:
        pytest.skip("an eigenproblem of 4096: seconds, and the same code as of other shapes")
    model, x = constant(i, o, weight, torch.float16), torch.full((3, i), 1250.0, dtype=torch.float16)
    base = model(x)
    data = [x, torch.randn(16, i, generator=torch.Generator().manual_seed(0)).half()]
    cfg = tiny(method)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if cfg.__class__ is ll.SSpaceConfig:
            given: Any = ll.Contrast([data[1]], [-data[1]])
        else:
            given = calibration(cfg, data)
        att = ll.attach(model, cfg, given)
    with ll.scale(model, 0):
        assert torch.equal(model(x), base)
    perturb(att.targets.values(), 1e-3)
    found = model(x)
    assert bool(torch.isfinite(found).all())
    exact = OneLayer(i, o, bias=False, dtype=torch.float64)
    exact.layer.weight.data.copy_(model.layer.weight)
    twin = ll.attach(exact, att.targets["layer"].cfg.replace(dtype=torch.float64), doubled(given)).targets["layer"]
    twin.load_state_dict({key: value.double() for key, value in att.targets["layer"].state_dict().items()})
    twin.derive(exact.layer)
    assert relative(found.double(), exact(x.double())) <= 5e-3


def doubled(data: Any) -> Any:
    if isinstance(data, ll.Contrast):
        return ll.Contrast(doubled(data.positive), doubled(data.negative))
    return None if data is None else [batch.double() for batch in data]


@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("method", ["antipasto", "lora_xs", "eva", "pissa", "hra"])
def test_gradients_in_fp16_are_those_of_fp64(method: str, side: str) -> None:
    found = []
    for dtype in (torch.float16, torch.float64):
        model = OneLayer(24, 16, dtype=torch.float16).to(dtype)
        x = 100 * torch.randn(5, 24, generator=torch.Generator().manual_seed(1)).half().to(dtype)
        changes = {"side": side} if method in ("antipasto", "lora_xs") else {}
        att = ll.attach(model, tiny(method, dtype=torch.float64, **changes), [x] if method == "eva" else None)
        perturb(att.targets.values())
        model(x).sum().backward()
        found.append(torch.cat([p.grad.flatten() for p in att.targets["layer"].parameters()]))
    assert relative(found[0], found[1]) <= 2e-2


def test_autocast_to_fp16_holds_what_it_reads() -> None:
    model, x = constant(16, 256, 1.0, torch.float32), torch.full((3, 16), 1250.0)
    ll.attach(model, ll.AntiPaSTOConfig(r=8, side="output", target_roles=()))
    with torch.autocast("cpu", torch.float16):
        assert bool(torch.isfinite(model(x)).all())


@pytest.mark.parametrize("method", ["antipasto_rot", "antipasto_dplr", "sspace"])
def test_cores_that_divide_by_S_keep_weak_directions_in_bf16(method: str) -> None:
    """U^T y in bf16 is off by 2^-8 of the largest direction, which divided by a weak S is no small part."""
    x = torch.randn(64, 24, generator=torch.Generator().manual_seed(3))
    changes: list[Tensor] = []
    state: dict[str, Tensor] = {}
    for dtype in (torch.float64, torch.bfloat16):
        model = spread(24, 16, torch.bfloat16).to(dtype)
        data = ll.Contrast([x.to(dtype)], [-x.to(dtype)]) if method == "sspace" else None
        att = ll.attach(model, tiny(method), data)
        assert att.targets["layer"].cfg.side == "input"
        perturb(att.targets.values())
        layer, adapter = model.layer, att.targets["layer"]
        state = state or adapter.state_dict()
        adapter.load_state_dict(state)  # of one calibration, in fp64
        adapter.derive(layer)
        y = nn.functional.linear(x.to(dtype), layer.weight, layer.bias)
        h, B = adapter.change(x.to(dtype), y, layer, torch.tensor(1.0))
        changes.append((h.double() @ B.double().T).detach())
    assert relative(changes[1], changes[0]) <= 0.02


@pytest.mark.parametrize("rotate_basis", ["V", "U", "both", "none"])
@pytest.mark.parametrize("block_size", [2, 4])
def test_rotations_give_the_same_bits_for_all_forms_of_c(rotate_basis: str, block_size: int) -> None:
    model, x = OneLayer(33, 48, dtype=torch.float32), torch.randn(6, 7, 33)
    attached(model, "antipasto_rot", r=32, rotate_basis=rotate_basis, block_size=block_size)
    with ll.scale(model, 0.7):
        one = model(x)
    for c in (torch.tensor(0.7, dtype=torch.float64), torch.full((6,), 0.7, dtype=torch.float64)):
        with ll.scale(model, c):
            assert torch.equal(model(x), one)
    with ll.scale(model, 0.7):
        assert torch.equal(model(x[2:3]), one[2:3])


@pytest.mark.parametrize("cfg_dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("size", [1.0, 1000.0])
def test_dora_of_large_rows_starts_at_the_base(size: float, cfg_dtype: torch.dtype) -> None:
    for seed in range(5):
        model, x = OneLayer(40, 24, dtype=torch.float32, seed=seed), torch.randn(5, 40)
        model.layer.weight.data.mul_(size)
        base = model(x)
        ll.attach(model, ll.DoRAConfig(r=2, dtype=cfg_dtype, target_roles=()))
        assert torch.equal(model(x), base)


def test_weak_directions_in_an_fp16_adapter() -> None:
    """1 / S is beyond fp16 for S < 1.5e-5."""
    model = spread(24, 16, torch.float32)
    model.layer.weight.data.mul_(1e-3)
    x = torch.randn(5, 24)
    base = model(x)
    for method in ("antipasto_rot", "antipasto_dplr"):
        ll.attach(model, tiny(method, dtype=torch.float16))
        assert torch.equal(model(x), base)
        ll.detach(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_ablation_stays_within_its_declared_bound(bias: bool, dtype: torch.dtype) -> None:
    for seed in range(10):
        model = OneLayer(16, 64, bias, dtype, seed)
        cfg = ll.AntiPaSTOAblateConfig(r=4, k=3, target_roles=(), seed=seed)
        x = torch.randn(50, 16, generator=torch.Generator().manual_seed(seed)).to(dtype)
        base = model(x).double()
        ll.attach(model, cfg)
        W_x = base - (model.layer.bias.double() if bias else 0)
        parts = (model(x).double() - base).norm(dim=-1) / W_x.norm(dim=-1)
        rounding = 2 * torch.finfo(dtype).eps * base.norm(dim=-1) / W_x.norm(dim=-1)
        assert bool((parts <= cfg.init_alpha * (1 + 1e-3) + rounding).all())
        ll.detach(model)


def test_ablation_starts_where_steps_turn_it_alike_for_any_r() -> None:
    for r in (4, 64, 256):
        model = OneLayer(256, 256, dtype=torch.float32)
        C = ll.attach(model, ll.AntiPaSTOAblateConfig(r=r, k=4, target_roles=())).targets["layer"].C
        assert float(C.norm(dim=0).mean()) == pytest.approx(1.0, rel=0.5 if r == 4 else 0.15)


def test_ablation_learns_to_find_a_direction() -> None:
    """24 AdamW steps at the registered rate turn Q towards the direction that the data asks to remove."""
    model = OneLayer(64, 64, bias=False, dtype=torch.float32)
    adapter: Any = ll.attach(model, ll.AntiPaSTOAblateConfig(r=64, target_roles=(), init_alpha=0.5)).targets["layer"]
    rng = torch.Generator().manual_seed(0)
    wanted = torch.randn(64, generator=rng)
    wanted = wanted / wanted.norm()
    optimizer = torch.optim.AdamW(ll.param_groups(model, lr=adapter.facts.lr))
    for _ in range(24):
        x = torch.randn(256, 64, generator=rng)
        with ll.disabled(model):
            y = model(x)
        loss = (model(x) - (y - torch.outer(y @ wanted, wanted))).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    Q = torch.linalg.qr(adapter.C.detach()).Q
    assert float((adapter.U @ Q).squeeze() @ wanted) ** 2 > 0.5


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("method", [m for m in METHODS if m not in ("lora", "eva", "hra", "ia3", "ia3_ff", "road")])
def test_weights_that_are_not_finite_are_refused_with_the_path(method: str, value: float) -> None:
    model, x = OneLayer(16, 24, dtype=torch.float32), torch.randn(32, 16)
    model.layer.weight.data[3, 5] = value
    cfg = tiny(method)
    with pytest.raises((ll.TargetError, ll.CalibrationError), match=r"layer: .*(NaN|finite)"):
        ll.attach(model, cfg, calibration(cfg, [x]))
    assert "lora" not in model.layer._modules


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("basis", [*BASES, "eva", "sspace"])
def test_calibration_data_that_is_not_finite_is_refused(basis: str, value: float) -> None:
    model, x = OneLayer(16, 24, dtype=torch.float32), torch.randn(32, 16)
    x[4, 2] = value
    cfg: Any = tiny(basis) if basis in METHODS else tiny("antipasto", basis=basis)
    with pytest.raises(ll.CalibrationError, match=r"layer: .* not finite"):
        ll.attach(model, cfg, calibration(cfg, [x]))
    assert "lora" not in model.layer._modules


@pytest.mark.parametrize("rho", [1.0, 2.0])
def test_padding_alone_is_no_calibration(rho: float) -> None:
    from helpers import tiny_llama, token_ids

    ids = token_ids(2, 6)
    batch = {"input_ids": ids, "attention_mask": torch.zeros_like(ids)}
    with pytest.raises(ll.CalibrationError, match="padding alone"):
        ll.attach(tiny_llama(), ll.EVAConfig(r=2, rho=rho), [batch])
    with pytest.raises(ll.CalibrationError, match="do not vary"):
        ll.attach(
            OneLayer(16, 24, dtype=torch.float32), ll.EVAConfig(r=2, rho=2.0, target_roles=()), [torch.zeros(8, 16)]
        )


def test_unused_calibration_data_is_answered_with_what_would_use_it() -> None:
    with pytest.warns(ll.LoraLiteWarning, match=r"eva.*wanda, asvd, corda"):
        ll.attach(OneLayer(16, 24, dtype=torch.float32), ll.LoRAConfig(target_roles=()), [torch.randn(4, 16)])


@pytest.mark.parametrize("config", [ll.AntiPaSTOConfig, ll.AntiPaSTORotConfig, ll.SSpaceConfig])
def test_a_default_r_is_lowered_and_a_given_one_is_not(config: Any) -> None:
    assert config().rank(64, 300) == 64 and config().rank(400, 300) == 256
    assert config(r=None).rank(400, 300) == 300
    for r in (65, 256):
        with pytest.raises(ValueError, match=f"r = {r} is larger than the rank"):
            config(r=r).rank(64, 300)
    with pytest.raises(ValueError, match="an integer >= 1, or None, or 'auto'"):
        config(r=0)


def test_rot_may_start_off_the_base() -> None:
    model = OneLayer(24, 16, dtype=torch.float32)
    cfg = ll.AntiPaSTORotConfig(r=16, init_std=4e-4, target_roles=())
    d = ll.attach(model, cfg).targets["layer"].d
    assert 2e-4 < float(d.std()) < 8e-4 and type(cfg).__name__ == "AntiPaSTORotConfig"
    again = OneLayer(24, 16, dtype=torch.float32)
    assert torch.equal(ll.attach(again, cfg).targets["layer"].d, d)


def test_changes_of_a_stack_add_up_in_any_order_in_bf16(tmp_path: Any) -> None:
    """All read the same y, so order moves the result by the rounding of one addition each."""
    x = torch.randn(20, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    model = OneLayer(32, 48, dtype=torch.bfloat16)
    names = ["sspace", "antipasto", "lora"]
    for name in names:
        attached(model, name, [x], name=name, size=0.1)
        ll.save(model, tmp_path / name, name=name)
    outputs = []
    for order in (names, names[::-1]):
        fresh = OneLayer(32, 48, dtype=torch.bfloat16)
        for name in order:
            ll.load(fresh, tmp_path / name, name=name)
        outputs.append(fresh(x).float())
    assert float((outputs[0] - outputs[1]).detach().abs().max()) <= 3 * 2**-8 * float(outputs[0].detach().abs().max())


@pytest.mark.parametrize("method", ["lora", "eva", "pissa", "delora", "dora"])
def test_factors_of_zero_hold_coordinates_beyond_fp16(method: str) -> None:
    """At the start B is 0, or cancels: h times its scale beyond 65504 is then nothing, not NaN."""
    model = OneLayer(16, 256, bias=False, dtype=torch.float16)
    model.layer.weight.data.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    x = torch.full((2, 16), 3e4, dtype=torch.float16)
    base = model(x)
    assert base.isfinite().all()
    cfg = tiny(method).replace(**({} if method == "delora" else {"alpha": 64.0}))
    data = [torch.randn(16, 16, generator=torch.Generator().manual_seed(0)).half()]
    ll.attach(model, cfg, data if method == "eva" else None)
    assert torch.allclose(model(x), base, atol=64.0)
