"""Contrastive steering (sspace) against a dense fp64 form, and what it refuses."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_lite as ll
from helpers import OneLayer, relative, tiny_llama, token_ids

F64 = torch.float64
SHAPES = [(24, 16), (16, 24), (16, 16)]  # (i, o)


class Sequences(nn.Module):
    """One layer on (B, T, i) inputs that takes a mask and leaves it alone."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.layer = OneLayer(i, o).layer

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.layer(x)


def sides(i: int, padding: str = "right") -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Two padded batches of four prompts whose padding is large, so that counting it would show."""
    batches = []
    for seed in (0, 1):
        rng = torch.Generator().manual_seed(seed)
        mask = torch.arange(7) < torch.tensor([[7], [4], [1], [6]])
        mask = mask.flip(1) if padding == "left" else mask
        x = torch.randn(4, 7, i, dtype=F64, generator=rng) + seed
        batches.append({"x": torch.where(mask.unsqueeze(2), x, 50.0), "attention_mask": mask.long()})
    return batches[0], batches[1]


def dense_form(
    W: Tensor, b: Tensor, x: Tensor, batches: Any, r: int, tokens: str, gate: str, unit: float | None, c: float
) -> Tensor:
    """y' written with full decompositions and explicit loops over prompts."""
    U, S, _ = torch.linalg.svd(W, full_matrices=False)

    def represent(batch: dict[str, Tensor]) -> Tensor:
        rows = []
        for prompt, mask in zip(batch["x"], batch["attention_mask"].bool(), strict=True):
            s = (prompt[mask] @ W.T) @ U / S.sqrt()
            rows.append(s[-1] if tokens == "last" else s.mean(0))
        return torch.stack(rows).mean(0)

    d = represent(batches[0]) - represent(batches[1])
    kept = d.abs().argsort(descending=True)[:r]
    U, S, d = U[:, kept], S[kept], d[kept]
    s = (x @ W.T) @ U / S.sqrt()
    cosine = (s @ d) / (s.norm(dim=-1) * d.norm())
    cosine = cosine.abs() if gate == "absolute" else cosine
    push = U @ (S.sqrt() * d / d.norm()) * (d.norm() if unit is None else unit)
    return x @ W.T + b + c * cosine.unsqueeze(-1) * push


def steered(i: int, o: int, padding: str = "right", **changes: Any) -> tuple[Sequences, Any, Any]:
    model, batches = Sequences(i, o), sides(i, padding)
    cfg = ll.SSpaceConfig(**{"r": 6, "target_roles": (), "dtype": F64, **changes})
    att = ll.attach(model, cfg, calibration_data=ll.Contrast([batches[0]], [batches[1]]))
    return model, att.targets["layer"], batches


@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("tokens", ["last", "mean"])
@pytest.mark.parametrize(("gate", "unit"), [("signed", None), ("absolute", None), ("signed", 1.0)])
@pytest.mark.parametrize(("i", "o"), SHAPES)
def test_against_the_dense_form(i: int, o: int, gate: str, unit: Any, tokens: str, padding: str, side: str) -> None:
    model, _, batches = steered(i, o, padding, gate=gate, unit=unit, tokens=tokens, side=side)
    W, b = model.layer.weight.detach(), model.layer.bias.detach()
    x = torch.randn(3, 5, i, dtype=F64, generator=torch.Generator().manual_seed(9))
    for c in (1.0, -2.0, 0.3):
        with ll.scale(model, c):
            found = model(x)
        expected = dense_form(W, b, x, batches, 6, tokens, gate, unit, c)
        assert relative(found, expected) <= 1e-9
        assert relative(found, x @ W.T + b) > 1e-3


def test_every_mode_by_default_of_none_and_those_that_differ_most() -> None:
    _, every, _ = steered(24, 16, r=None)
    _, few, _ = steered(24, 16, r=3)
    assert every.r == 16 and torch.equal(few.d.abs(), every.d.abs()[:3])
    assert bool((every.d.abs().diff() <= 0).all())


def test_the_bias_takes_no_part() -> None:
    model, adapter, batches = steered(24, 16)
    other = Sequences(24, 16)
    other.layer.bias.data += 3.0
    cfg = adapter.cfg
    again = ll.attach(other, cfg, calibration_data=ll.Contrast([batches[0]], [batches[1]])).targets["layer"]
    assert relative(again.d, adapter.d) <= 1e-9
    x = torch.randn(5, 24, dtype=F64, generator=torch.Generator().manual_seed(9))
    assert relative(other(x) - 3.0, model(x)) <= 1e-9


def test_a_token_that_points_against_d_is_pushed_against_it() -> None:
    model, adapter, _ = steered(24, 16)
    W = model.layer.weight.detach()
    direction = adapter.U @ (adapter.S.sqrt() * adapter.d / adapter.d.norm())
    x = torch.linalg.pinv(W) @ direction
    pushes = {}
    for gate in ("signed", "absolute"):
        model, adapter, _ = steered(24, 16, gate=gate)
        with ll.disabled(model):
            base = model(torch.stack([x, -x]))
        pushes[gate] = (model(torch.stack([x, -x])) - base) @ direction
    along = float(adapter.d.norm() * direction.norm() ** 2)
    assert pushes["signed"].tolist() == pytest.approx([along, -along])
    assert pushes["absolute"].tolist() == pytest.approx([along, along])


@pytest.mark.parametrize("kind", ["zero", "rank one", "tiny"])
def test_small_singular_values_and_zero_norms(kind: str) -> None:
    model = Sequences(24, 16)
    U, S, Vh = torch.linalg.svd(model.layer.weight.detach(), full_matrices=False)
    S = {"zero": 0 * S, "rank one": S * (torch.arange(16) < 1), "tiny": S * torch.logspace(0, -12, 16)}[kind]
    model.layer.weight.data.copy_(U @ torch.diag(S) @ Vh)
    batches = sides(24)
    model.layer.bias.data.zero_()
    contrast = ll.Contrast([batches[0]], [batches[1]])
    cfg = ll.SSpaceConfig(r=None, target_roles=())
    if kind == "zero":
        with pytest.raises(ll.CalibrationError, match="give the same outputs in every layer"):
            ll.attach(model, cfg, calibration_data=contrast)
        return
    adapter = ll.attach(model, cfg, calibration_data=contrast).targets["layer"]
    x = torch.randn(5, 24, dtype=F64)
    x[0] = 0.0  # no direction at all: nothing to push
    y = model(x)
    assert torch.isfinite(y).all() and not y[0].any()
    assert not adapter.d[adapter.S == 0].any() and int((adapter.S > 0).sum()) == int((S / S.max() >= 1e-4).sum())


def test_defaults_steer_what_writes_into_the_residual_stream(tmp_path: Path) -> None:
    model, ids = tiny_llama(), token_ids()
    base = model(ids).logits
    contrast = ll.Contrast([{"input_ids": ids}], [{"input_ids": token_ids(seed=5)}])
    att = ll.attach(model, ll.SSpaceConfig(), calibration_data=contrast)
    assert {path.rsplit(".", 1)[-1] for path in att.targets} == {"o_proj", "down_proj"}
    assert att.num_trainable == 0 and att.cost is not None and att.cost.tokens == 3
    ll.check(model, [ids])
    steered = model(ids).logits
    assert not torch.equal(steered, base)
    with ll.scale(model, torch.tensor([0.0, 1.0, 0.0])):
        rows = model(ids).logits
    assert torch.equal(rows[0], base[0]) and not torch.equal(rows[1], base[1])
    path = ll.save(model, tmp_path / "a.safetensors")
    fresh = tiny_llama()
    ll.load(fresh, path)  # no prompts
    assert torch.equal(fresh(ids).logits, steered)
    for fold in (ll.merge, ll.merged_weights):
        with pytest.raises(ll.NotAffineError, match="sspace is not affine"):
            fold(model)


class Words:
    """A tokenizer of a word a token."""

    pad_token_id: int | None = 0

    def __call__(self, texts: list[str], return_tensors: str, padding: bool) -> dict[str, Tensor]:
        ids = [[1 + sum(map(ord, word)) % 60 for word in text.split()] for text in texts]
        length = max(map(len, ids))
        assert padding or len(texts) == 1
        mask = [[1] * len(row) + [0] * (length - len(row)) for row in ids]
        return {
            "input_ids": torch.tensor([row + [0] * (length - len(row)) for row in ids]),
            "attention_mask": torch.tensor(mask),
        }


class Unpadded(Words):
    pad_token_id = None


def test_prompts_as_strings() -> None:
    """In batches of any size, and one by one where the tokenizer cannot pad: the same directions."""
    positive, negative = ["a b c", "so good", "yes", "well done then"], ["a b d", "too bad", "no", "not at all then"]
    found = []
    for tokenizer, size in ((Words(), 4), (Words(), 3), (Unpadded(), 8)):
        contrast = ll.Contrast(positive, negative, tokenizer, size)
        assert len(contrast) == {4: 2, 3: 4, 8: 8}[size]
        att = ll.attach(tiny_llama(F64), ll.SSpaceConfig(dtype=F64), calibration_data=contrast)
        found.append({path: adapter.U @ adapter.d for path, adapter in att.targets.items()})
    for path, direction in found[0].items():
        assert all(relative(each[path], direction) <= 1e-9 for each in found[1:])


def ids_of(seed: int, rows: int = 3) -> dict[str, Tensor]:
    return {"input_ids": token_ids(rows, seed=seed)}


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: ll.Contrast([], ["a"], Words()), r"Contrast\.positive is empty"),
        (lambda: ll.Contrast([ids_of(1)], []), r"Contrast\.negative is empty"),
        (lambda: ll.Contrast("good", "bad", Words()), r"Contrast\.positive is one string: give a list"),
        (lambda: ll.Contrast(["a"], ["b"]), "need a tokenizer"),
        (lambda: ll.Contrast(["a"], [ids_of(1)], Words()), "both sets must be strings"),
        (lambda: ll.Contrast(["a", "b"], ["c"], Words()), "2 positive and 1 negative prompts"),
        (lambda: ll.Contrast(["a", "b"], ["b", "a"], Words()), "the positive and the negative prompts are the same"),
        (lambda: ll.Contrast([ids_of(1)], [ids_of(2, rows=2)]), "3 positive and 2 negative prompts"),
        (lambda: ll.Contrast([ids_of(1)], [ids_of(1)]), "give the same outputs in every layer"),
        (lambda: [ids_of(1)], r"needs calibration_data=ll\.Contrast"),
        (lambda: None, "needs contrast_last"),
    ],
)
def test_contrasts_that_are_none(make: Any, words: str) -> None:
    model = tiny_llama()
    with pytest.raises(ll.CalibrationError, match=words):
        ll.attach(model, ll.SSpaceConfig(), calibration_data=make())
    assert not any("lora" in path for path, _ in model.named_modules())


def test_a_prompt_of_padding_alone() -> None:
    batches = sides(24)
    batches[0]["attention_mask"][1] = 0
    with pytest.raises(ll.CalibrationError, match="a prompt consists of padding alone"):
        ll.attach(Sequences(24, 16), ll.SSpaceConfig(target_roles=()), ll.Contrast([batches[0]], [batches[1]]))


def test_a_contrast_is_data_for_other_methods_too() -> None:
    batches = [ids_of(1, rows=8), ids_of(2, rows=8)]
    found = []
    for data in (ll.Contrast(batches[:1], batches[1:]), batches):
        att = ll.attach(tiny_llama(), ll.AntiPaSTOCorDAConfig(r=8), calibration_data=data)
        found.append(next(iter(att.targets.values())).U)
    assert torch.equal(*found)
