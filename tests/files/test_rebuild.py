"""Files without a basis: rebuilt from the base, re-signed, verified, or refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

import lora_lite as ll
from helpers import OneLayer, bits, calibration, perturb, relative, same_bits, tiny, tiny_llama, token_ids
from lora_lite.frozen_basis import rebuild

F64 = torch.float64
X = torch.randn(60, 24, generator=torch.Generator().manual_seed(5)) * torch.logspace(0, -1, 24)


def saved(path: Path, method: str = "antipasto", basis: str = "svd", i: int = 24, o: int = 16) -> tuple[Any, Tensor]:
    """(a file without basis, the adapted layer's outputs)."""
    model = OneLayer(i, o, dtype=torch.float32)
    cfg = tiny(method, basis=basis)
    x = X[:, :i]
    att = ll.attach(model, cfg, calibration(cfg, [x]))
    perturb(att.targets.values(), 0.3)
    return ll.save(model, path / "thin.safetensors", basis=False), model(x).detach()


def keys(path: Path) -> set[str]:
    with safe_open(path, "pt") as handle:
        return set(handle.keys())


@pytest.mark.parametrize(("i", "o"), [(24, 16), (16, 24)])
@pytest.mark.parametrize("basis", ["svd", "wanda", "wanda:pool=mean_abs"])
@pytest.mark.parametrize("method", ["antipasto", "antipasto_rot", "antipasto_dplr", "lora_xs"])
def test_round_trip(method: str, basis: str, i: int, o: int, tmp_path: Path) -> None:
    path, expected = saved(tmp_path, method, basis, i, o)
    assert {"layer.lora.U.index", "layer.lora.U.sketch", "layer.lora.S"} < keys(path)
    assert "layer.lora.U" not in keys(path)
    model = OneLayer(i, o, dtype=torch.float32)
    ll.load(model, path)
    assert relative(model(X[:, :i]).detach(), expected) <= 1e-5


def test_a_plain_file_holds_u_and_s_and_no_projector(tmp_path: Path) -> None:
    model = tiny_llama(hidden_size=64, intermediate_size=128)
    att = ll.attach(model, ll.AntiPaSTOConfig(r=32))
    full, thin = ll.save(model, tmp_path / "full"), ll.save(model, tmp_path / "thin", basis=False)
    own = {key.rsplit(".", 1)[-1] for key in keys(full) if ".lora." in key}
    assert own == {"g", "U", "S"}
    with safe_open(full, "pt") as handle:
        size = sum(handle.get_tensor(key).nbytes for key in keys(full) if ".lora." in key)
    assert att.megabytes == size / 1e6 and f"{att.megabytes:.3g} MB in a file" in att.summary()
    assert thin.stat().st_size < full.stat().st_size / 2


@pytest.mark.parametrize("how", ["signs", "more digits"])
def test_what_another_machine_may_choose_is_undone(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, expected = saved(tmp_path, "antipasto_dplr")
    original = rebuild.left_directions

    def elsewhere(W: Tensor, r: int) -> tuple[Tensor, Tensor]:
        U, S = original(W.double() if how == "more digits" else W, r)
        return (U * (-1.0) ** torch.arange(r), S) if how == "signs" else (U, S)

    monkeypatch.setattr(rebuild, "left_directions", elsewhere)
    model = OneLayer(24, 16, dtype=torch.float32)
    ll.load(model, path)
    assert relative(model(X).detach(), expected) <= 1e-5


def permuted(W: Tensor) -> Tensor:
    """The same singular vectors with their values in another order."""
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    order = torch.arange(len(S)).roll(1)
    return U @ torch.diag(S[order]) @ Vh


@pytest.mark.parametrize("base", ["same", "any"])
@pytest.mark.parametrize(
    "change", [lambda W: torch.randn(W.shape, generator=torch.Generator().manual_seed(1)), permuted]
)
def test_another_base_is_refused(change: Any, base: str, tmp_path: Path) -> None:
    path, _ = saved(tmp_path)
    model = OneLayer(24, 16, dtype=torch.float32)
    model.layer.weight.data.copy_(change(model.layer.weight.data))
    before = bits(model)
    with pytest.raises(ll.BaseMismatchError, match=r"layer: the basis rebuilt from this model differs|another base"):
        ll.load(model, path, base=base)
    assert same_bits(before, model) and not hasattr(model.layer, "lora")


def test_another_dtype_or_a_quantised_base_is_refused(tmp_path: Path) -> None:
    """Rounding W turns its weaker directions by more than a thousandth. A file with its basis loads into both."""
    import bitsandbytes

    path, expected = saved(tmp_path)
    half = OneLayer(24, 16, dtype=torch.bfloat16)
    quantised = OneLayer(24, 16, dtype=torch.float32)
    plain = quantised.layer
    four: Any = bitsandbytes.nn.Linear4bit(24, 16, compute_dtype=torch.float32, quant_type="nf4")
    four.load_state_dict(plain.state_dict())
    quantised.layer = four.to("cpu")
    for model in (half, quantised):
        with pytest.raises(ll.BaseMismatchError, match="the very weights and dtype it was trained on, or save it with"):
            ll.load(model, path)
        assert not hasattr(model.layer, "lora")
    trained = OneLayer(24, 16, dtype=torch.float32)
    ll.load(trained, path)
    whole = ll.save(trained, tmp_path / "whole.safetensors")
    for model, tolerance in ((half, 0.02), (quantised, 0.3)):
        ll.load(model, whole)
        assert relative(model(X.to(model.layer.bias.dtype)).detach().float(), expected) < tolerance


@pytest.mark.parametrize("basis", ["corda", "asvd"])
def test_a_basis_that_the_weight_does_not_tell(basis: str, tmp_path: Path) -> None:
    with pytest.raises(ll.CheckpointError, match=r"basis=False\): layer: direction \d+ of the basis is no singular"):
        saved(tmp_path, "antipasto", basis)
    assert not list(tmp_path.iterdir())


def test_equal_singular_values_load_right_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any rotation of their directions is as good a decomposition, but not the one trained on."""
    model = OneLayer(24, 16, dtype=torch.float32)
    U, S, Vh = torch.linalg.svd(model.layer.weight.detach(), full_matrices=False)
    S[1:3] = S[1]
    model.layer.weight.data.copy_(U @ torch.diag(S) @ Vh)
    weight = model.layer.weight.detach().clone()
    att = ll.attach(model, tiny("antipasto"))
    perturb(att.targets.values(), 0.3)
    path = ll.save(model, tmp_path / "a", basis=False)
    original, turn = rebuild.left_directions, torch.tensor([[0.8, -0.6], [0.6, 0.8]], dtype=F64)

    def elsewhere(W: Tensor, r: int) -> tuple[Tensor, Tensor]:
        U, S = original(W, r)
        U[:, 1:3] = U[:, 1:3] @ turn
        return U, S

    monkeypatch.setattr(rebuild, "left_directions", elsewhere)
    other = OneLayer(24, 16, dtype=torch.float32)
    other.layer.weight.data.copy_(weight)
    with pytest.raises(ll.BaseMismatchError, match=r"2 of 8 directions, by up to"):
        ll.load(other, path)


def test_methods_without_a_basis_do_not_mind(tmp_path: Path) -> None:
    model = tiny_llama()
    att = ll.attach(model, ll.DoRAConfig(r=2))
    perturb(att.targets.values())
    expected = model(token_ids()).logits
    path = ll.save(model, tmp_path / "a", basis=False)
    fresh = tiny_llama()
    ll.load(fresh, path)
    assert torch.equal(fresh(token_ids()).logits, expected)
