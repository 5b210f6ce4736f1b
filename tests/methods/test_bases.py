"""Bases against dense decompositions, against peft's CorDA, and what a registered function may return."""

import importlib
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import lora_lite as ll
import textbook
from helpers import OneLayer, relative, tiny_llama, token_ids
from lora_lite.frozen_basis.basis import KINDS
from lora_lite.layers.linear import dense

F64 = torch.float64
SHAPES = [(24, 16), (16, 24), (16, 16)]  # (i, o)


def data(i: int, tokens: int = 60) -> Tensor:
    rng = torch.Generator().manual_seed(5)
    mix = torch.randn(i, i, dtype=F64, generator=rng) * torch.logspace(0, -1, i, dtype=F64)
    return torch.randn(tokens, i, dtype=F64, generator=rng) @ mix + 0.3


def attached(i: int, o: int, basis: Any, X: Tensor | None = None, **changes: Any) -> tuple[OneLayer, Any]:
    model = OneLayer(i, o)
    cfg = ll.AntiPaSTOConfig(**{"r": 8, "basis": basis, "dtype": F64, "target_roles": (), **changes})
    att = ll.attach(model, cfg, None if X is None else [X[:25], X[25:]])
    return model, att.targets["layer"]


@pytest.mark.parametrize(("i", "o"), SHAPES)
def test_corda_half_is_the_root_form_and_the_cholesky_form(i: int, o: int) -> None:
    X, eps = data(i), 0.01
    model, adapter = attached(i, o, ll.Basis("corda", eps=eps), X)
    W, C = dense(model.layer), X.T @ X / len(X) + eps * torch.eye(i, dtype=F64)
    P = adapter.U.T @ W / adapter.S.unsqueeze(1)
    for F in (textbook.root(C), torch.linalg.cholesky(C)):
        U, S, Vh = torch.linalg.svd(W @ F, full_matrices=False)
        sign = (U[:, :8] * adapter.U).sum(0).sign()
        assert relative(adapter.U, U[:, :8] * sign) <= 1e-9
        assert relative(adapter.S, S[:8]) <= 1e-9
        assert relative(P, (Vh @ torch.linalg.inv(F))[:8] * sign.unsqueeze(1)) <= 1e-9


def test_corda_half_is_the_best_rank_r_part_under_the_data() -> None:
    """In least squares of the outputs on the calibration data; the plain SVD and power 1 leave more."""
    X = data(24)
    left = {}
    for basis in ("svd", "corda:power=1.0,eps=0.0", "corda:eps=0.0"):
        model, adapter = attached(24, 16, basis, X if basis != "svd" else None)
        Y = X @ dense(model.layer).T
        left[basis] = float((Y - Y @ adapter.U @ adapter.U.T).norm())
    assert min(left, key=lambda key: left[key]) == "corda:eps=0.0"
    singular = torch.linalg.svdvals(data(24) @ dense(OneLayer(24, 16).layer).T)
    assert left["corda:eps=0.0"] == pytest.approx(float(singular[8:].norm()), rel=1e-9)


@pytest.fixture
def pefts_corda(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """peft's module; it imports `dataclass` from the package attrs, where the standard library's serves."""
    if importlib.util.find_spec("attr") is None:
        monkeypatch.setitem(sys.modules, "attr", types.SimpleNamespace(dataclass=dataclass))  # type: ignore[arg-type]
    yield importlib.import_module("peft.tuners.lora.corda")


@pytest.mark.parametrize(("i", "o"), SHAPES)
def test_corda_one_is_pefts(i: int, o: int, pefts_corda: Any) -> None:
    """peft damps C by a hundredth of its mean diagonal, and works in fp32."""
    import peft

    X = data(i).float().double()
    C = X.T @ X / len(X)
    model, adapter = attached(i, o, ll.Basis("corda", power=1.0, eps=0.01 * float(C.diagonal().mean())), X)
    layer = torch.nn.Linear(i, o)
    layer.weight.data.copy_(model.layer.weight)
    layer.covariance_matrix = C.float()
    theirs = pefts_corda.collect_eigens_for_layer(layer, peft.LoraConfig())
    U, S, V = (value.double() for value in (theirs.U_WC, theirs.S_WC, theirs.V_WC))
    sign = (U[:, :8] * adapter.U).sum(0).sign()
    assert relative(adapter.U, U[:, :8] * sign) <= 1e-4
    assert relative(adapter.S, S[:8]) <= 1e-4
    P = adapter.U.T @ dense(model.layer) / adapter.S.unsqueeze(1)
    assert relative(P, (V[:, :8] * sign).T) <= 1e-3


@pytest.mark.parametrize("pool", ["rms", "mean_abs"])
@pytest.mark.parametrize(("i", "o"), SHAPES)
def test_wanda_keeps_the_directions_that_the_data_uses(i: int, o: int, pool: str) -> None:
    X = data(i)
    model, adapter = attached(i, o, ll.Basis("wanda", pool=pool), X)
    U, S, P = textbook.basis(f"wanda:pool={pool}", dense(model.layer), X, 8)
    assert relative(adapter.U, textbook.aligned((U, S, P), adapter.U)[0]) <= 1e-9
    assert relative(adapter.S, S) <= 1e-9
    assert bool((adapter.S.diff() < 0).all())
    assert not torch.equal(adapter.S, torch.linalg.svdvals(dense(model.layer))[:8])  # others than the largest


def test_padding_does_not_count() -> None:
    """Of a padded batch and of the same prompts alone come the same bases."""
    ids = token_ids(4, 9)
    mask = torch.arange(9) < torch.tensor([[9], [7], [9], [8]])
    padded = [{"input_ids": ids * mask, "attention_mask": mask.long()}]
    alone = [{"input_ids": row[keep].unsqueeze(0)} for row, keep in zip(ids, mask, strict=True)]
    for basis in ("corda", "corda:power=1.0", "asvd", "wanda", "wanda:pool=mean_abs"):
        found = []
        for batches in (padded, alone):
            cfg = ll.AntiPaSTOConfig(r=8, basis=basis, dtype=F64)
            found.append(ll.attach(tiny_llama(F64), cfg, batches).targets)
        for path in found[0]:
            projections = [each[path].U @ each[path].U.T for each in found]
            assert relative(projections[0], projections[1]) <= 1e-7, (basis, path)


def test_bases_are_orthonormal_and_their_scale_falls() -> None:
    for basis in ("svd", "asvd", "corda", "corda:power=1.0"):
        _, adapter = attached(24, 16, basis, None if basis == "svd" else data(24))
        assert relative(adapter.U.T @ adapter.U, torch.eye(8, dtype=F64)) <= 1e-12
        assert bool((adapter.S.diff() < 0).all()) and bool((adapter.S > 0).all())


@pytest.fixture
def registered() -> Iterator[Any]:
    before = dict(KINDS)
    yield ll.register_basis
    KINDS.clear()
    KINDS.update(before)


def test_a_basis_of_ones_own(registered: Any) -> None:
    @registered("tail")
    def tail(W: Tensor, stats: Any) -> tuple[Tensor, Tensor]:
        U, S, _ = torch.linalg.svd(W, full_matrices=False)
        return U.flip(1), S.flip(0)

    model, adapter = attached(24, 16, "tail", r=3)
    S = torch.linalg.svdvals(dense(model.layer))
    assert relative(adapter.S, S.flip(0)[:3]) <= 1e-12
    for method in (ll.AntiPaSTORotConfig, ll.AntiPaSTODPLRConfig, ll.LoRAXSConfig):
        ll.attach(OneLayer(24, 16), method(r=8, basis="tail", target_roles=()))


def test_a_basis_that_reads_statistics_and_settings(registered: Any) -> None:
    @registered("outputs", needs=["output_moment"])
    def outputs(W: Tensor, stats: Any, eps: float) -> tuple[Tensor, Tensor]:
        values, U = torch.linalg.eigh(stats.mean("output_moment") + eps * torch.eye(len(W), dtype=F64))
        return U.flip(1), values.flip(0).sqrt()

    X = data(24)
    model, adapter = attached(24, 16, "outputs:eps=0.5", X)
    Y = X @ dense(model.layer).T
    values = torch.linalg.eigvalsh(Y.T @ Y / len(Y)).flip(0)
    assert relative(adapter.S, (values[:8] + 0.5).sqrt()) <= 1e-9
    with pytest.raises(ValueError, match=r"Basis\.power = 1\.0: must be left alone: basis 'outputs' reads \['eps'\]"):
        ll.Basis("outputs", power=1.0)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda W: (W[:, :3], torch.ones(3)), r"returned U \(16, 3\) and S \(3,\), expected \(16, n\)"),
        (lambda W: (torch.eye(24)[:, :16], torch.ones(16)), r"returned U \(24, 16\)"),
        (lambda W: (torch.eye(16), torch.ones(16, 1)), r"S \(16, 1\)"),
        (lambda W: (2 * torch.eye(16), torch.ones(16)), r"U\^T U differs from I by 3\.0e\+00"),
        (lambda W: (torch.eye(16) * torch.nan, torch.ones(16)), r"differs from I by nan"),
        (lambda W: (torch.eye(16), -torch.ones(16)), "S is < 0"),
    ],
)
def test_a_basis_that_is_none(make: Any, words: str, registered: Any) -> None:
    registered("odd")(lambda W, stats: make(W))
    model = OneLayer(24, 16)
    with pytest.raises(ll.TargetError, match=rf"layer: basis 'odd'.*{words}"):
        ll.attach(model, ll.AntiPaSTOConfig(r=8, basis="odd", target_roles=()))
    assert not hasattr(model.layer, "lora") and model.layer.weight.requires_grad


def test_names_that_are_taken_and_statistics_that_are_not_there(registered: Any) -> None:
    with pytest.raises(ValueError, match=r"register_basis\('svd'\): already taken by svd"):
        registered("svd")(lambda W, stats: None)
    with pytest.raises(
        ValueError, match=r"register_basis\('new'\): no statistic \['outputs'\]; there are \[.*'response'"
    ):
        registered("new", needs=["outputs"])(lambda W, stats: None)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("pca", r"Basis\.kind = 'pca': must be one of svd, wanda, asvd, corda"),
        (5, r"Basis\.kind = 5"),
        ("svd:power=1.0", r"Basis\.power = 1\.0: must be left alone: basis 'svd' reads no setting"),
        ("corda:power=0", r"Basis\.power = 0\.0: must be a number > 0"),
        ("corda:power=big", r"basis 'corda:power=big': 'power=big' is no setting=number"),
        ("corda:rank=3", r"basis 'corda:rank=3': unknown settings \['rank'\]"),
        ("corda:eps=-1", r"Basis\.eps = -1\.0: must be a number >= 0"),
        ("wanda:pool=max", r"Basis\.pool = 'max': must be 'rms' or 'mean_abs'"),
        (
            "corda:pool=mean_abs",
            r"Basis\.pool = 'mean_abs': must be left alone: basis 'corda' reads \['eps', 'power'\]",
        ),
    ],
)
@pytest.mark.usefixtures("as_installed")
def test_a_basis_that_cannot_be_understood(value: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ll.AntiPaSTOConfig(basis=value)


@pytest.mark.parametrize("text", ["svd", "wanda", "wanda:pool=mean_abs", "asvd:power=0.25", "corda:power=1.0,eps=0.0"])
def test_a_basis_as_text_and_back(text: str) -> None:
    basis = ll.Basis.parse(text)
    assert str(basis) == text and ll.Basis.parse(basis) is basis
    assert ll.AntiPaSTOConfig(basis=text) == ll.AntiPaSTOConfig(basis=basis)


@pytest.mark.parametrize("basis", ["asvd", "corda", "corda:power=1.0", "wanda", "wanda:pool=mean_abs"])
def test_too_few_tokens(basis: str) -> None:
    with pytest.raises(
        ll.CalibrationError, match="layer: 7 calibration tokens cannot determine r = 8 directions; give more"
    ):
        ll.attach(OneLayer(24, 16), ll.AntiPaSTOConfig(r=8, basis=basis, target_roles=()), [data(24, 7)])


def test_presets_are_the_gain_on_another_basis() -> None:
    assert ll.AntiPaSTOCorDAConfig().basis == ll.Basis("corda")
    assert ll.AntiPaSTOASVDConfig().basis == ll.Basis("asvd")
    for name in ("corda", "asvd"):
        X, found = data(24), []
        for method, changes in (("antipasto", {"basis": name}), (f"antipasto_{name}", {})):
            cfg = ll.methods()[method].Config(r=8, target_roles=(), **changes)
            found.append(ll.attach(OneLayer(24, 16), cfg, [X]).targets["layer"].state_dict())
        assert all(torch.equal(value, found[1][key]) for key, value in found[0].items())
