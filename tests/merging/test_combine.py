"""`ll.combine` against dense arithmetic in fp64, spelled out here, and against peft."""

import itertools
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import lora_lite as ll
from helpers import METHODS, OneLayer, anatomy, attached, bits, perturb, relative, same_bits, tiny_llama, token_ids

AFFINE = [method for method in METHODS if ll.methods()[method].facts.affine]
BATCHES = [torch.randn(64, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(k)) for k in range(12)]
WEIGHTS = {"a": 0.7, "b": -0.3}


def two(first: str = "lora", second: str = "lora") -> OneLayer:
    """A layer (24 x 16) with two trained adapters, a and b, in fp64."""
    model = OneLayer(16, 24)
    for seed, (name, method) in enumerate(zip("ab", (first, second), strict=True)):
        att = attached(model, method, BATCHES, name=name, size=0.0, dtype=torch.float64, seed=seed)
        perturb(att.targets.values(), 0.1, seed)
    return model


def alone(model: OneLayer, name: str) -> tuple[Tensor, Tensor]:
    """(dW, db) of one adapter at c = 1: the layer on the identity, less what it is without adapters."""
    with torch.no_grad(), ll.scale(model, {**dict.fromkeys("ab", 0.0), name: 1.0}):
        b = model(torch.zeros(1, 16, dtype=torch.float64))
        W = (model(torch.eye(16, dtype=torch.float64)) - b).T
    layer = model.layer
    return W - layer.weight, b[0] - layer.bias


def outcome(model: OneLayer) -> tuple[Tensor, Tensor]:
    """(dW, db) of what the model computes now."""
    with torch.no_grad():
        b = model(torch.zeros(1, 16, dtype=torch.float64))
        W = (model(torch.eye(16, dtype=torch.float64)) - b).T
    return W - model.layer.weight, b[0] - model.layer.bias


def best(T: Tensor, rank: int) -> Tensor:
    U, S, Vh = torch.linalg.svd(T, full_matrices=False)
    return U[:, :rank] @ torch.diag(S[:rank]) @ Vh[:rank]


def quiet(model: nn.Module, *given: Any, **options: Any) -> ll.Combined:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ll.LoraLiteWarning)
        return ll.combine(model, *given, **options)


@pytest.mark.parametrize(("first", "second"), list(itertools.combinations_with_replacement(AFFINE, 2)))
def test_the_sum_is_exact_for_every_pair_of_methods(first: str, second: str) -> None:
    model = two(first, second)
    (dA, bA), (dB, bB) = alone(model, "a"), alone(model, "b")
    att = ll.combine(model, WEIGHTS)
    dW, db = outcome(model)
    scale = dA.norm() + dB.norm()
    assert float((dW - (0.7 * dA - 0.3 * dB)).norm() / scale) < 1e-10
    assert float((db - (0.7 * bA - 0.3 * bB)).norm()) < 1e-10 * (1 + float(bA.norm() + bB.norm()))
    [adapter] = att.targets.values()
    assert adapter.facts.name == "lora" and adapter.cfg.alpha == adapter.cfg.r <= 16
    assert max(att.errors.values()) < 1e-9


def test_the_rank_is_that_of_the_sum() -> None:
    model = two()
    for name in "ab":
        with ll.scale(model, {**dict.fromkeys("ab", 0.0), name: 1.0}):
            assert ll.low_rank(model)["layer"].rank == 2
    assert ll.combine(model, WEIGHTS).targets["layer"].cfg.r == 4
    assert quiet(model, {"a": 1.0, "combined": 0.5}, name="again").targets["layer"].cfg.r == 4


@pytest.mark.parametrize("rank", [None, 1, 3, 40])
def test_svd_is_the_best_part_of_the_sum(rank: int | None) -> None:
    model = two("dora", "lora")
    exact = 0.7 * alone(model, "a")[0] - 0.3 * alone(model, "b")[0]
    att = quiet(model, WEIGHTS, "svd", rank=rank)
    r = min(rank or 16, 16)
    assert relative(outcome(model)[0], best(exact, r)) < 1e-10
    assert abs(att.errors["layer"] - relative(best(exact, r), exact)) < 1e-9
    assert f"weight error up to {att.errors['layer']:.2g}" in str(att)


def plain_ties(values: list[Tensor], weights: list[float], density: float) -> Tensor:
    """Entry by entry, as the paper's algorithm 1 has it."""
    k = int(density * values[0].numel())
    trimmed = []
    for value, weight in zip(values, weights, strict=True):
        threshold = sorted(value.abs().flatten().tolist(), reverse=True)[k - 1]
        trimmed.append([weight * entry if abs(entry) >= threshold else 0.0 for entry in value.flatten().tolist()])
    merged = []
    for entries in zip(*trimmed, strict=True):
        sign = 1 if sum(entries) >= 0 else -1
        agreeing = [entry for entry in entries if entry * sign > 0]
        merged.append(sum(agreeing) / len(agreeing) if agreeing else 0.0)
    return torch.tensor(merged, dtype=torch.float64).view_as(values[0])


@pytest.mark.parametrize(("density", "rank"), [(0.3, 16), (0.5, 3), (1.0, None)])
def test_ties(density: float, rank: int | None) -> None:
    model = two("lora", "ia3")
    parts = [alone(model, name) for name in "ab"]
    T = plain_ties([dW for dW, _ in parts], [0.7, -0.3], density)
    b = plain_ties([db for _, db in parts], [0.7, -0.3], density)
    att = quiet(model, WEIGHTS, "ties", rank=rank, density=density)
    dW, db = outcome(model)
    r = min(rank or 2 + 16, 16)
    assert relative(dW, best(T, r)) < 1e-10 and relative(db, b) < 1e-10
    assert abs(att.errors["layer"] - relative(best(T, r), T)) < 1e-9


def test_dare() -> None:
    def made(seed: int, density: float) -> Tensor:
        model = two()
        ll.combine(model, WEIGHTS, "dare", rank=16, seed=seed, density=density)
        return outcome(model)[0]

    model = two()
    dA, dB = (alone(model, name)[0] for name in "ab")
    T = made(0, 0.4)
    candidates = torch.stack([x + y for x in (0 * dA, 0.7 * dA / 0.4) for y in (0 * dB, -0.3 * dB / 0.4)])
    distance, which = (candidates - T).abs().min(0)
    assert float(distance.max()) < 1e-10  # each entry: each source dropped, or kept and scaled up
    kept = [float(torch.isin(which, torch.tensor(on)).float().mean()) for on in ([2, 3], [1, 3])]
    assert all(0.3 < share < 0.5 for share in kept)
    assert torch.equal(T, made(0, 0.4)) and not torch.equal(T, made(1, 0.4))
    assert relative(made(0, 1.0), 0.7 * dA - 0.3 * dB) < 1e-10


def in_peft(base: nn.Module, folders: list[Path], weights: list[float], **options: Any) -> dict[str, Tensor]:
    """dW by layer of what peft's `add_weighted_adapter` makes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.PeftModel.from_pretrained(base, str(folders[0]), adapter_name="a")  # type: ignore[arg-type]
        model.load_adapter(str(folders[1]), adapter_name="b")
        model.add_weighted_adapter(["a", "b"], weights, "mixed", **options)  # type: ignore[operator]
    layers = {path: layer for path, layer in model.base_model.model.named_modules() if hasattr(layer, "lora_A")}
    return {path: layer.get_delta_weight("mixed").detach() for path, layer in layers.items()}  # type: ignore[operator]


@pytest.mark.parametrize(
    ("method", "theirs", "weights", "density"),
    [
        ("svd", "svd", [0.7, 0.3], None),
        ("ties", "ties_svd", [0.8, 0.8], 0.5),  # with unequal weights peft elects without them
        ("ties", "ties_svd", [1.0, 1.0], 0.25),
        ("dare", "dare_linear_svd", [0.7, 0.3], 1.0),  # what is dropped depends on the generator
    ],
)
def test_peft_agrees(method: str, theirs: str, weights: list[float], density: float | None, tmp_path: Path) -> None:
    base, model = tiny_llama(), tiny_llama()
    for seed, name in enumerate("ab"):
        att = attached(model, "lora", name=name, target_names=("q_proj", "down_proj"), size=0.0, r=8)
        perturb(att.targets.values(), 0.3, seed)
        ll.export_peft(model, tmp_path / name, name=name)
    options: dict[str, Any] = {} if density is None else {"density": density}
    expected = in_peft(
        base, [tmp_path / name for name in "ab"], weights, combination_type=theirs, svd_rank=6, **options
    )
    quiet(model, dict(zip("ab", weights, strict=True)), method, rank=6, **options)
    found = ll.low_rank(model)
    assert found.keys() == expected.keys() and len(found) == 4
    for path, change in found.items():
        assert relative((change.B @ change.A).float(), expected[path]) < 1e-4, path


def test_the_model_computes_it_and_the_sources_are_kept(tmp_path: Path) -> None:
    model = tiny_llama()
    attached(model, "lora", name="a", target_names=("q_proj",), size=0.3)
    attached(model, "delora", name="b", target_names=("q_proj", "down_proj"), size=0.3)
    before = bits(model)
    ids = token_ids()
    with torch.no_grad():
        ll.scale(model, {"a": 0.7, "b": 1.0})
        att = ll.combine(model, {"a": 0.7, "b": 1.0}, name="both")
        combined = model(ids)[0]
        ll.scale(model, {"a": 0.7, "b": 1.0, "both": 0.0})
        assert relative(combined, model(ids)[0]) < 1e-5
    assert same_bits(before, model) and len(att.targets) == 4
    assert {adapter.cfg.dtype for adapter in att.targets.values()} == {torch.float32}
    ll.save(model, tmp_path / "both.safetensors", name="both")
    other = tiny_llama()
    ll.load(other, tmp_path / "both.safetensors")
    assert relative(other(ids)[0], combined) < 1e-6


def test_a_large_layer_is_cut_by_iteration() -> None:
    model = OneLayer(1100, 1040, dtype=torch.float32)
    for seed, name in enumerate("ab"):
        att = attached(model, "lora", name=name, size=0.0)
        perturb(att.targets.values(), 0.3, seed)
    with ll.scale(model, {"a": 1.0, "b": 0.0}):
        B, A = ll.low_rank(model)["layer"]
    T = 0.5 * (B @ A)
    T = torch.where(T.abs() >= T.abs().flatten().topk(int(0.9 * T.numel())).values[-1], T, 0.0)
    att = quiet(model, {"a": 0.5}, "ties", density=0.9)
    lost = torch.linalg.svdvals(T)[2:].norm() / T.norm()
    assert float(lost) <= att.errors["layer"] < 1.001 * float(lost)


def test_a_change_of_the_bias_alone() -> None:
    model = OneLayer(16, 24)
    att = ll.attach(model, ll.LoRAConfig(r=2, bias=True, target_roles=(), dtype=torch.float64), name="a")
    with torch.no_grad():
        att.targets["layer"].b.add_(1.0)  # type: ignore[operator]
    made = ll.combine(model, {"a": 0.25})  # alpha / r = 8 multiplies b as well
    assert made.targets["layer"].cfg.r == 1 and made.targets["layer"].cfg.bias
    dW, db = outcome(model)
    assert float(dW.abs().max()) < 1e-14 and relative(db, torch.full_like(db, 0.25 * 8)) < 1e-12


def test_layers_that_nothing_changes_get_no_adapter() -> None:
    model = tiny_llama()
    att = ll.attach(model, ll.LoRAConfig(r=2), name="a")
    with pytest.raises(ll.StateError, match="change nothing"):
        ll.combine(model, {"a": 1.0})
    path = next(iter(att.targets))
    perturb([att.targets[path]])
    assert list(ll.combine(model, {"a": 1.0}).targets) == [path]


def test_much_loss_is_warned_of() -> None:
    model = two("dora", "ia3")
    with pytest.warns(ll.LoraLiteWarning, match=r"of the worst layer's change is lost \(svd"):
        ll.combine(model, WEIGHTS, "svd", rank=1)


@pytest.mark.parametrize(
    ("given", "options", "error", "message"),
    [
        ({"a": 1.0}, {"method": "mean"}, ValueError, "method = 'mean' must be one of sum, svd, ties, dare"),
        ({}, {}, ValueError, "names no adapter"),
        ({"a": float("nan")}, {}, ValueError, "the weight of 'a' is nan"),
        ({"a": 1.0}, {"rank": 4}, ValueError, 'rank = 4 is not for "sum"'),
        ({"a": 1.0}, {"method": "svd", "rank": 0}, ValueError, "rank = 0 must be at least 1"),
        ({"a": 1.0}, {"method": "ties", "density": 0.0}, ValueError, "density = 0.0 must be above 0"),
        ({"z": 1.0}, {}, ll.StateError, "no adapter is named 'z'"),
        ({"a": 1.0}, {"name": "b"}, ll.StateError, "'b' is attached already"),
        ({"a": 0.0}, {}, ll.StateError, "change nothing"),
    ],
)
def test_what_cannot_be_combined(given: Any, options: Any, error: type[Exception], message: str) -> None:
    model = two()
    before, shape = bits(model), anatomy(model)
    with pytest.raises(error, match=message):
        ll.combine(model, given, **options)
    assert same_bits(before, model) and anatomy(model) == shape


def test_train_also_and_methods_that_are_not_affine_are_refused() -> None:
    model = tiny_llama()
    ll.attach(model, ll.LoRAConfig(r=2), name="a", train_also=("model.norm",))
    with pytest.raises(ll.StateError, match=r"'a' trains model.norm.weight as well"):
        ll.combine(model, {"a": 1.0})
    model = OneLayer(16, 24)
    attached(model, "sspace", BATCHES, name="s")
    with pytest.raises(ll.NotAffineError, match="sspace is not affine"):
        ll.combine(model, {"s": 1.0})


def test_within_a_block_it_is_refused_and_nothing_changes() -> None:
    model = two()
    ll.scale(model, {"a": 0.25})
    before, shape, x = bits(model), anatomy(model), BATCHES[0]
    expected = model(x)
    with ll.scale(model, 0.5), pytest.raises(ll.StateError, match="leave the block first"):
        ll.combine(model, WEIGHTS)
    assert same_bits(before, model) and anatomy(model) == shape
    assert torch.equal(model(x), expected)


def test_an_interrupt_leaves_everything_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = two()
    before, shape, expected = bits(model), anatomy(model), model(BATCHES[0])

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lora_lite.merging.combine.Combined", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ll.combine(model, WEIGHTS)
    assert same_bits(before, model) and anatomy(model) == shape and torch.equal(model(BATCHES[0]), expected)
