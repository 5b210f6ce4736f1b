"""An adapted tiny Llama under what people do to models: copy, cast, pickle, autocast, spread over devices, resize."""

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_lite as ll
from helpers import METHODS, attached, bits, calibration, perturb, same_bits, tiny, tiny_llama, token_ids, train

IDS = token_ids()


def llama(dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    return tiny_llama(dtype, num_hidden_layers=1, **changes)


def adapted(method: str, dtype: torch.dtype = torch.float32) -> Any:
    model = llama(dtype)
    attached(model, method, [IDS])
    return model


def logits(model: nn.Module) -> Tensor:
    return model(IDS).logits


@pytest.mark.parametrize("method", METHODS)
def test_a_deepcopy_is_independent(method: str) -> None:
    model = adapted(method)
    other = copy.deepcopy(model)
    full = logits(model)
    assert torch.equal(logits(other), full)
    for changed, kept in ((model, other), (other, model)):
        with ll.scale(changed, 0.3):
            assert torch.equal(logits(kept), full) and not torch.equal(logits(changed), full)
        before = bits(changed)
        with torch.no_grad():
            for adapter in ll.attachment(changed).targets.values():
                next(iter(adapter.state_dict().values())).mul_(1.1)
        assert torch.equal(logits(kept), full) and not torch.equal(logits(changed), full)
        for key, tensor in [*changed.named_parameters(), *changed.named_buffers()]:
            tensor.data.copy_(before[key])
    ll.detach(other)
    assert torch.equal(logits(model), full)
    assert torch.equal(logits(other), logits(llama()))


def test_a_deepcopy_trains_alone() -> None:
    model = adapted("lora")
    other = copy.deepcopy(model)
    before = bits(model)
    train(other, IDS)
    assert same_bits(before, model) and not torch.equal(logits(other), logits(model))
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("method", METHODS)
def test_pickle(method: str) -> None:
    model = adapted(method)
    ll.scale(model, 0.7)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    assert torch.equal(logits(again), logits(model))
    with ll.scale(again, 0):
        assert torch.equal(logits(again), logits(llama()))
    ll.detach(again)
    assert list(again.state_dict()) == list(llama().state_dict())


@pytest.mark.parametrize("cast", ["half", "bfloat16", "double", "to"])
@pytest.mark.parametrize("method", METHODS)
def test_casting_the_model_leaves_the_adapter(method: str, cast: str) -> None:
    model = adapted(method)
    tensors = {path: bits(adapter) for path, adapter in ll.attachment(model).targets.items()}
    dtype = {"half": torch.float16, "double": torch.float64}.get(cast, torch.bfloat16)
    model = model.to(dtype) if cast == "to" else getattr(model, cast)()
    assert logits(model).dtype == dtype and torch.isfinite(logits(model)).all()
    for path, adapter in ll.attachment(model).targets.items():
        assert same_bits(tensors[path], adapter)
        assert {t.dtype for t in [*adapter.parameters(), *adapter.buffers()]} == {torch.float32}
    with ll.disabled(model):
        assert torch.equal(logits(model), logits(llama().to(dtype)))


def test_tensors_follow_the_device() -> None:
    model = adapted("dora").to("meta")
    assert all(t.is_meta for t in [*model.parameters(), *ll.attachment(model).targets.popitem()[1].buffers()])


@pytest.mark.parametrize("method", METHODS)
def test_state_dict(method: str) -> None:
    model, plain = adapted(method), llama()
    state = model.state_dict()
    assert set(plain.state_dict()) < set(state)
    base = ll.base_state_dict(model)
    assert list(base) == list(plain.state_dict())
    assert all(torch.equal(base[key], value) for key, value in plain.state_dict().items())
    other = llama()
    attached(other, method, [IDS], seed=5)
    other.load_state_dict(state)
    assert torch.equal(logits(other), logits(model))


def test_save_pretrained_without_adapters(tmp_path: Path) -> None:
    model = adapted("lora")
    model.save_pretrained(tmp_path, state_dict=ll.base_state_dict(model))
    again = type(model).from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(llama()))


@pytest.mark.parametrize("method", METHODS)
def test_autocast(method: str) -> None:
    model = llama()
    with torch.autocast("cpu", torch.bfloat16):
        base = logits(model)
        cfg = tiny(method)
        att = ll.attach(model, cfg, calibration(cfg, [IDS]))
        adapters = list(att.targets.values())
        bound = max(adapter.identity_bound(adapter.cfg, torch.bfloat16) for adapter in adapters)
        with ll.scale(model, 1.0 if adapters[0].facts.trained else 0.0):
            start = logits(model)
        assert start.dtype == base.dtype
        assert float((start - base).abs().max().detach() / base.abs().max().detach()) <= bound * len(adapters)
        perturb(adapters)
        with ll.disabled(model):
            assert torch.equal(logits(model), base)
        full = logits(model)
        value = full.float().square().mean()
    assert full.dtype == base.dtype
    if adapters[0].facts.trained:
        value.backward()
    for adapter in adapters:
        for p in adapter.parameters():
            assert p.grad is not None and p.grad.dtype == torch.float32 and torch.isfinite(p.grad).all()
    # Against the same in fp32: no further off than bf16's 8 bits over a few layers explain.
    assert float((full - logits(model)).norm().detach() / logits(model).norm().detach()) < 0.02


class ByKeyword(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(input=x)


class TwoInputs(nn.Linear):
    def forward(self, input: Tensor, *, mask: Tensor | None = None) -> Tensor:
        return super().forward(input if mask is None else input * mask)


class ByTwoKeywords(ByKeyword):
    def __init__(self) -> None:
        super().__init__()
        self.layer = TwoInputs(4, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(mask=x.sign(), input=x)


@pytest.mark.parametrize("method", METHODS)
def test_layers_called_by_keyword(method: str) -> None:
    model, x = ByKeyword(), torch.randn(12, 8)
    attached(model, method, [x])
    assert torch.equal(model(x), model.layer(x)) and not torch.equal(model(x), nn.Linear.forward(model.layer, x))


def test_a_layer_whose_input_cannot_be_told_is_refused() -> None:
    model = ByTwoKeywords()
    attached(model, "lora")
    with pytest.raises(ll.TargetError, match=r"TwoInputs was called with 0 .* its input cannot be identified"):
        model(torch.randn(5, 4))
    assert model.layer(torch.randn(5, 4), mask=torch.ones(4)).shape == (5, 6)


class Squeezing(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).mean(-1)


class Router(nn.Linear):
    """Returns scores and choices, as routers do."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores = super().forward(x)
        return scores, scores.argmax(-1)


def test_linear_layers_that_are_none() -> None:
    model = nn.Sequential(nn.Linear(4, 4), Router(4, 3))
    att = ll.attach(model, ll.LoRAConfig(r=2, target_roles=()))
    assert list(att.targets) == ["0"]
    odd = nn.Sequential(Squeezing(4, 4))
    ll.attach(odd, ll.LoRAConfig(r=2, target_roles=()))
    with pytest.raises(ll.TargetError, match=r"Squeezing\(4 -> 4\) mapped \(5, 4\) to \(5,\), so it is no plain"):
        odd(torch.randn(5, 4))


def test_fused_experts_are_named() -> None:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        hidden_size=32, intermediate_size=64, moe_intermediate_size=16, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, vocab_size=61, num_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    model = Qwen3MoeForCausalLM(config).eval()
    with pytest.warns(ll.LoraLiteWarning, match=r"fused 3-D weights stay without .*layers.0.mlp.experts.gate_up_proj"):
        att = ll.attach(model, ll.LoRAConfig(r=2))
    kinds = {path.rsplit(".", 1)[-1] for path in att.targets}
    assert kinds == {"q_proj", "k_proj", "v_proj", "o_proj"}  # the router is none
    experts = sum(p.numel() for key, p in model.named_parameters() if "experts" in key)
    base = sum(p.numel() for p in ll.base_state_dict(model).values())
    assert f"out of reach of hooks: {100 * experts / base:.3g}% of the base" in att.summary()
    assert "layers.0.mlp.experts.gate_up_proj" in att.summary()
    ll.check(model, [IDS])


def test_a_resized_layer_is_noticed(tmp_path: Path) -> None:
    model = llama()
    attached(model, "lora", target_names=("lm_head", "q_proj"), exclude_names=())
    path = ll.save(model, tmp_path / "a.safetensors")
    model.resize_token_embeddings(70)
    match = "adapter 'default': the layer lm_head was replaced since attach and its adapter is gone; detach and attach"
    for call in (
        lambda: ll.save(model, tmp_path / "b.safetensors"),
        lambda: ll.merge(model),
        lambda: ll.check(model, [IDS]),
        lambda: ll.param_groups(model, 1e-3),
    ):
        with pytest.raises(ll.StateError, match=match):
            call()
    assert path.exists() and not (tmp_path / "b.safetensors").exists()
    ll.detach(model)
    att = ll.attach(model, ll.LoRAConfig(r=2, target_names=("lm_head",), exclude_names=(), target_roles=()))
    assert att.targets["lm_head"].B.shape == (70, 2)
