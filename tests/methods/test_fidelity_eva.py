"""EVA and the calibration pass it needs: against dense decompositions of the pooled inputs, and against peft."""

import math
import weakref
from collections.abc import Iterator
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import lora_lite as ll
from helpers import relative, tiny_llama, token_ids
from lora_lite.calibration.collector import calibrate

F64 = torch.float64
COMMON: dict[str, Any] = {"dtype": F64, "target_roles": ()}


class TwoLayers(nn.Module):
    """Two layers with different inputs, of which one is much more concentrated than the other."""

    def __init__(self, dtype: torch.dtype = F64) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first, self.second = nn.Linear(24, 12, dtype=dtype), nn.Linear(12, 16, dtype=dtype)
        self.unused = nn.Linear(4, 4, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


class SideBySide(TwoLayers):
    """The two layers read different features of the same input."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.first(x[:, :24].contiguous()), self.second(x[:, 24:].contiguous())], dim=1)


def spread_data(rows: int = 400) -> Tensor:
    """Inputs with well separated variances and a mean that is not zero."""
    rng = torch.Generator().manual_seed(0)
    deviations = torch.logspace(0, -1.5, 24, dtype=F64)
    return torch.randn(rows, 24, dtype=F64, generator=rng) * deviations + torch.randn(24, dtype=F64, generator=rng)


def padded_batches(count: int = 3) -> list[dict[str, Tensor]]:
    """Token ids with padding on the right of most rows."""
    batches = []
    for k in range(count):
        ids = token_ids(rows=4, length=9, seed=10 + k)
        mask = torch.arange(9) < torch.tensor([[9], [7], [4], [8]])
        batches.append({"input_ids": ids * mask, "attention_mask": mask.long()})
    return batches


def pooled_inputs(model: nn.Module, batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """path -> what each linear layer read, one row a token that is no padding."""
    seen: dict[str, list[Tensor]] = {}
    handles = []
    for path, layer in model.named_modules():
        if isinstance(layer, nn.Linear):

            def keep(_: nn.Module, args: tuple[Tensor], path: str = path) -> None:
                seen.setdefault(path, []).append(args[0].detach())

            handles.append(layer.register_forward_pre_hook(keep))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    for handle in handles:
        handle.remove()
    masks = [batch["attention_mask"].bool() for batch in batches]
    return {path: torch.cat([x[m] for x, m in zip(xs, masks, strict=True)]) for path, xs in seen.items()}


def directions(X: Tensor, centered: bool) -> tuple[Tensor, Tensor]:
    """(right singular vectors as rows, shares of the total energy), by a dense SVD of the data itself."""
    X = X.double()
    _, S, Vh = torch.linalg.svd(X - X.mean(0) if centered else X, full_matrices=False)
    return Vh, S.square() / S.square().sum()


def misaligned(A: Tensor, V: Tensor) -> float:
    """1 - |cosine| of the worst pair of rows."""
    return float((1 - (A.double() * V).sum(1).abs() / A.double().norm(dim=1)).abs().max())


@pytest.mark.parametrize("centered", [False, True], ids=["moment", "covariance"])
def test_A_holds_the_leading_singular_vectors_of_the_pooled_inputs(centered: bool) -> None:
    model, batches = tiny_llama(F64), padded_batches()
    inputs = pooled_inputs(model, batches)
    att = ll.attach(model, ll.EVAConfig(r=4, centered=centered, **COMMON), batches)
    assert len(att.targets) == 14
    for path, adapter in att.targets.items():
        V, _ = directions(inputs[path], centered)
        assert misaligned(adapter.A.detach(), V[:4]) <= 1e-10, path
        assert relative(adapter.A.detach() @ adapter.A.detach().T, torch.eye(4, dtype=F64)) <= 1e-12
        assert not adapter.B.any()
    wrong, _ = directions(inputs["model.layers.0.mlp.down_proj"], not centered)
    assert misaligned(att.targets["model.layers.0.mlp.down_proj"].A.detach(), wrong[:4]) > 1e-3


def test_padding_is_left_out() -> None:
    """The same tokens with other padding ids give the same directions; counted as tokens, padding changes them."""
    batches = padded_batches()
    other = [{**b, "input_ids": b["input_ids"] + 5 * (1 - b["attention_mask"])} for b in batches]
    unmasked = [{"input_ids": b["input_ids"]} for b in other]  # (the embedding of id 0 is zero)
    cfg = ll.EVAConfig(r=4, target_names=("layers.0.self_attn.q_proj",), **COMMON)
    first, second, third = (
        ll.attach(tiny_llama(F64), cfg, data).targets["model.layers.0.self_attn.q_proj"].A.detach()
        for data in (batches, other, unmasked)
    )
    assert torch.equal(first, second)
    assert misaligned(first, third) > 1e-3


def side_by_side_data() -> Tensor:
    """The second layer's input is the more concentrated one, so that it deserves fewer ranks."""
    second = spread_data()[:, ::2].flip(0) * torch.logspace(0, -1.5, 12, dtype=F64)
    return torch.cat([spread_data(), second], dim=1).float()


def pefts_eva(rho: float, r: int) -> Any:
    """peft's own EVA. One batch again and again, for its incremental decomposition depends on their order."""
    config = peft.LoraConfig(
        r=r,
        lora_alpha=2 * r,
        init_lora_weights="eva",
        target_modules=["first", "second"],
        eva_config=peft.EvaConfig(rho=rho),
    )
    model = peft.get_peft_model(SideBySide(torch.float32), config)
    peft.initialize_lora_eva_weights(
        model,
        [{"x": side_by_side_data()}] * 4,
        forward_fn=lambda m, batch: m(**batch),
        prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=None,
        show_progress_bar=False,
    )
    return model.base_model.model


@pytest.mark.parametrize("rho", [1.0, 2.0])
def test_centered_eva_is_pefts(rho: float) -> None:
    """Directions, ranks and scaling. peft centres, and decomposes in fp32 with a randomised method: 1e-4, no less."""
    theirs = pefts_eva(rho, r=3)
    model = SideBySide(torch.float32)
    cfg = ll.EVAConfig(r=3, alpha=6.0, rho=rho, centered=True, target_roles=(), exclude_names=("unused",))
    att = ll.attach(model, cfg, [side_by_side_data()])
    ranks = {path: adapter.cfg.r for path, adapter in att.targets.items()}
    assert ranks == ({"first": 3, "second": 3} if rho == 1 else {"first": 4, "second": 2})
    for path, adapter in att.targets.items():
        wrapped = getattr(theirs, path)
        A = wrapped.lora_A["default"].weight.detach().double()
        assert A.shape == adapter.A.shape
        assert misaligned(adapter.A.detach(), A) < 1e-4
        assert math.isclose(adapter.cfg.scaling, wrapped.scaling["default"])


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("centered", [False, True])
def test_ranks_follow_the_explained_variance(centered: bool, rslora: bool) -> None:
    model, batches = tiny_llama(F64), padded_batches()
    inputs = pooled_inputs(model, batches)
    inputs.pop("lm_head")
    r, rho = 3, 2.0
    shares = sorted(
        ((float(s), path) for path, X in inputs.items() for s in directions(X, centered)[1][: int(r * rho)]),
        reverse=True,
    )[: r * len(inputs)]
    expected = {path: sum(1 for _, owner in shares if owner == path) for path in inputs}
    cfg = ll.EVAConfig(r=r, rho=rho, alpha=5.0, centered=centered, rslora=rslora, **COMMON)
    att = ll.attach(model, cfg, batches)
    assert {path: att.targets[path].cfg.r if path in att.targets else 0 for path in inputs} == expected
    assert len(set(expected.values())) > 1
    for path, adapter in att.targets.items():
        assert adapter.A.shape[0] == adapter.B.shape[1] == expected[path]
        assert misaligned(adapter.A.detach(), directions(inputs[path], centered)[0][: expected[path]]) <= 1e-10
        assert math.isclose(adapter.cfg.scaling, cfg.scaling)  # whatever its rank


def test_a_layer_that_explains_too_little_gets_no_adapter() -> None:
    """Two directions of one layer explain half of its input each, any of the other's twelve only about a twelfth."""
    x = torch.randn(2000, 36, dtype=F64, generator=torch.Generator().manual_seed(0))
    x[:, 2:24] = 0.0
    model = SideBySide()
    att = ll.attach(model, ll.EVAConfig(r=1, rho=2.0, exclude_names=("unused",), **COMMON), [x])
    assert {path: adapter.cfg.r for path, adapter in att.targets.items()} == {"first": 2}
    assert not hasattr(model.second, "lora")


def test_layers_that_read_the_same_input_share_their_statistics() -> None:
    model, batches = tiny_llama(F64), padded_batches()
    q, k, v, o = names = [f"model.layers.1.self_attn.{p}_proj" for p in "qkvo"]
    layers = {path: model.get_submodule(path) for path in names}
    need = frozenset({"input_moment", "input_covariance"})
    shared, _ = calibrate(model, layers, dict.fromkeys(layers, need), batches)
    assert shared[q].input is shared[k].input is shared[v].input
    assert shared[o].input is not shared[q].input
    for path, layer in layers.items():
        alone = calibrate(model, {path: layer}, {path: need}, batches)[0][path]
        assert alone.tokens == shared[path].tokens == 3 * (9 + 7 + 4 + 8)
        for name in need:
            assert torch.equal(alone.mean(name), shared[path].mean(name))


def test_memory_does_not_grow_with_the_data() -> None:
    def most_alive(count: int) -> int:
        model, seen, most = TwoLayers(), [], 0
        for layer in (model.first, model.second):
            layer.register_forward_pre_hook(lambda _, args: seen.append(weakref.ref(args[0])))

        def batches() -> Iterator[Tensor]:
            nonlocal most
            for _ in range(count):
                yield spread_data(20)
                most = max(most, sum(ref() is not None for ref in seen))

        cfg = ll.EVAConfig(r=2, exclude_names=("unused",), **COMMON)
        ll.attach(model, cfg, batches())
        assert len(seen) == 2 * count
        assert not any(ref() is not None for ref in seen)
        return most

    assert most_alive(40) == most_alive(3)


def state_of(model: nn.Module) -> Any:
    """What a failed calibration must leave: modes, hooks, flags, modules, and no trace of an adapter."""
    modules = dict(model.named_modules())
    modes = {path: module.training for path, module in modules.items()}
    hooks = {path: (len(m._forward_pre_hooks), len(m._forward_hooks)) for path, m in modules.items()}
    flags = {key: p.requires_grad for key, p in model.named_parameters()}
    return modes, hooks, flags, "_lora_lite" in model.__dict__


ERRORS = {
    "none": (None, "give attach"),
    "empty": ([], "is empty"),
    "too few tokens": ([spread_data(2)], "2 calibration tokens cannot give r = 3"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_data_that_cannot_serve_is_an_error(case: str) -> None:
    data, words = ERRORS[case]
    model = TwoLayers()
    before = state_of(model)
    with pytest.raises(ll.CalibrationError, match=words):
        ll.attach(model, ll.EVAConfig(r=3, exclude_names=("unused",), **COMMON), data)
    assert state_of(model) == before


def test_a_layer_that_no_batch_reaches_is_an_error() -> None:
    model = TwoLayers()
    before = state_of(model)
    with pytest.raises(ll.CalibrationError, match="reached 1 of 3 targets, such as unused"):
        ll.attach(model, ll.EVAConfig(r=3, **COMMON), [spread_data()])
    assert state_of(model) == before


def test_a_failure_midway_leaves_the_model_as_it_was() -> None:
    def batches() -> Iterator[Tensor]:
        yield spread_data(10)
        raise OSError("the disk is gone")

    model = TwoLayers()
    model.second.eval()  # modes are mixed, and come back as they were
    before = state_of(model)
    cfg = ll.EVAConfig(r=3, exclude_names=("unused",), **COMMON)
    with pytest.raises(OSError, match="the disk is gone"):
        ll.attach(model, cfg, batches())
    assert state_of(model) == before
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        ll.attach(model, cfg, [torch.zeros(5, 7, dtype=F64)])
    assert state_of(model) == before
    ll.attach(model, cfg, [spread_data()])


def test_data_that_nothing_needs_is_noted() -> None:
    with pytest.warns(ll.LoraLiteWarning, match="nothing here uses it"):
        ll.attach(TwoLayers(), ll.LoRAConfig(r=2, **COMMON), [spread_data()])


def test_padding_that_cannot_be_told_is_noted() -> None:
    class Pooled(TwoLayers):
        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            return super().forward(x.mean(1))

    batch = {"x": spread_data(40).unflatten(0, (8, 5)), "attention_mask": torch.ones(8, 5)}
    cfg = ll.EVAConfig(r=2, exclude_names=("unused",), **COMMON)
    ll.attach(Pooled(), cfg, [batch])  # nothing is padded: nothing to note
    batch["attention_mask"][0, 3:] = 0
    with pytest.warns(ll.LoraLiteWarning, match="padding mask does not fit the inputs"):
        ll.attach(Pooled(), cfg, [batch])
