"""Laws 1-4 and 8 of the design, over every registered method: read-only base, identity, one coefficient, all or
nothing, and initial values that depend on the seed and the path alone."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_lite as ll
from helpers import (
    METHODS,
    OneLayer,
    anatomy,
    attached,
    bits,
    calibration,
    perturb,
    relative,
    same_bits,
    tiny,
    tiny_llama,
    token_ids,
    train,
)

SHAPES = [(16, 24), (24, 16), (16, 16)]
BASE_DTYPES = [torch.float32, torch.bfloat16, torch.float16]
IDS = token_ids()


def llama(dtype: torch.dtype = torch.float32) -> nn.Module:
    return tiny_llama(dtype, num_hidden_layers=1, attention_bias=True, mlp_bias=True)


def inputs(i: int, dtype: torch.dtype, rows: int = 5) -> Tensor:
    return torch.randn(rows, 7, i, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).to(dtype)


def attach_tiny(model: nn.Module, method: str, batches: Any, name: str = "default", **changes: Any) -> ll.Attachment:
    cfg = tiny(method, **changes)
    return ll.attach(model, cfg, calibration(cfg, batches), name=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_nothing_but_merge_writes_the_base(method: str, dtype: torch.dtype, tmp_path: Any) -> None:
    model = llama(dtype)
    for index, p in enumerate(model.parameters()):
        p.requires_grad_(index % 3 > 0)  # flags of both kinds, so that a blanket restore would show
    before, shape_before, keys = bits(model), anatomy(model), list(model.state_dict())
    att = attach_tiny(model, method, [IDS])
    assert same_bits(before, model)
    own = {id(p) for adapter in att.targets.values() for p in adapter.parameters()}
    assert {id(p) for p in model.parameters() if p.requires_grad} == own

    adapters = [adapter for adapter in att.targets.values() if adapter.facts.trained]
    if adapters:
        perturb(adapters)
        values = [bits(adapter) for adapter in adapters]
        train(model, IDS)
        assert not any(same_bits(value, adapter) for value, adapter in zip(values, adapters, strict=True))
    ll.save(model, tmp_path / "a.safetensors")
    ll.load(model, tmp_path / "a.safetensors", name="second")
    with ll.scale(model, -2):
        model(IDS)
    assert same_bits(before, model)

    ll.detach(model, "second")
    ll.detach(model)
    assert same_bits(before, model)
    assert anatomy(model) == shape_before and list(model.state_dict()) == keys


@pytest.mark.parametrize("dtype", BASE_DTYPES, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_identity_at_attach_of_one_layer(method: str, dtype: torch.dtype) -> None:
    for i, o in SHAPES:
        for bias in (True, False):
            model, x = OneLayer(i, o, bias, dtype), 3 * inputs(i, dtype)
            base = model(x)
            att = attach_tiny(model, method, [x])
            adapter = att.targets["layer"]
            with ll.scale(model, 1.0 if adapter.facts.trained else 0.0):
                found = model(x)
            error = float((found - base).abs().max().detach() / base.abs().max().detach())
            assert found.dtype == dtype
            assert error <= adapter.identity_bound(adapter.cfg, dtype)


@pytest.mark.parametrize("dtype", BASE_DTYPES, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_identity_at_attach_of_a_model(method: str, dtype: torch.dtype) -> None:
    model = llama(dtype)
    base = model(IDS).logits
    att = attach_tiny(model, method, [IDS])
    adapters = list(att.targets.values())
    with ll.scale(model, 1.0 if adapters[0].trained else 0.0):
        found = model(IDS).logits
    assert torch.isfinite(base).all()
    bound = max(adapter.identity_bound(adapter.cfg, dtype) for adapter in adapters)
    if bound == 0:
        assert torch.equal(found, base)
    else:  # errors of layers in sequence at most add up here, since norms keep the residual stream's size
        assert float((found - base).abs().max() / base.abs().max()) <= bound * len(adapters)


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
    assert torch.equal(x1, x) == (ll.methods()[method].before is None)
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


class Broken(RuntimeError):
    pass


def _fault(method: str, where: str, monkeypatch: pytest.MonkeyPatch, data: list[Tensor]) -> Any:
    """Make the third layer's `where` raise, or the calibration data after its first batch. Returns the data."""
    if where == "calibration":

        def batches() -> Any:
            yield data[0]
            raise Broken

        return batches()
    original, calls = getattr(ll.methods()[method], where), []

    def fault(*args: Any, **kwargs: Any) -> None:
        calls.append(args)
        if len(calls) == 3:
            raise Broken
        original(*args, **kwargs)

    monkeypatch.setattr(ll.methods()[method], where, fault)
    return data


@pytest.mark.parametrize("first", [False, True], ids=["bare", "adapted"])
@pytest.mark.parametrize("method", METHODS)
def test_attach_is_all_or_nothing(method: str, first: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault in the middle leaves bits, flags, hooks, modes and attributes as they were."""
    model = nn.Sequential(nn.Linear(16, 24), nn.Linear(24, 16), nn.Dropout(), nn.Linear(16, 16), nn.Linear(16, 8))
    data = [torch.randn(12, 16)]
    cfg = tiny(method)
    if first:
        attached(model, "lora", name="first")
    before, shape_before = bits(model), anatomy(model)
    moments = ["init", "derive", *(["calibration"] if ll.methods()[method].needs(cfg) else [])]
    for where in moments:
        with monkeypatch.context() as patch, pytest.raises(Broken):
            ll.attach(model, cfg, calibration(cfg, _fault(method, where, patch, data)), name="second")
        assert same_bits(before, model) and set(before) == set(bits(model))
        assert anatomy(model) == shape_before
    attach_tiny(model, method, data, name="second")


@pytest.mark.parametrize("cfg", [ll.RoadConfig(group_size=12, target_roles=()), ll.LoRAXSConfig(r=20, target_roles=())])
def test_a_layer_that_does_not_fit_leaves_all_others_bare(cfg: Any) -> None:
    model = nn.Sequential(nn.Linear(24, 24), nn.Linear(24, 16))
    before, shape_before = bits(model), anatomy(model)
    with pytest.raises(ll.TargetError, match=r"^1: (group_size|r) = \d+"):
        ll.attach(model, cfg)
    assert same_bits(before, model) and anatomy(model) == shape_before


@pytest.mark.parametrize("method", METHODS)
def test_initial_values_need_no_luck(method: str) -> None:
    found = []
    for seed in (1, 2):
        model = llama()
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        att = attach_tiny(model, method, [IDS])
        assert torch.equal(torch.get_rng_state(), state)
        found.append(att)
    assert found[0].targets.keys() == found[1].targets.keys()
    for path, adapter in found[0].targets.items():
        assert same_bits(bits(adapter), found[1].targets[path])


def test_initial_values_follow_seed_and_path() -> None:
    def values(seed: int, **changes: Any) -> dict[str, Tensor]:
        att = attach_tiny(llama(), "lora", [], seed=seed, **changes)
        return {path: adapter.A for path, adapter in att.targets.items()}

    first, second, part = values(0), values(1), values(0, target_names=("k_proj",))
    assert all(not torch.equal(first[path], second[path]) for path in first)
    assert all(torch.equal(first[path], part[path]) for path in part)  # whatever else is adapted
    same_shape = [A for A in first.values() if A.shape == next(iter(first.values())).shape]
    assert all(not torch.equal(same_shape[0], A) for A in same_shape[1:])
