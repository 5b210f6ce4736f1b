"""Heads and embeddings trained beside the adapters, optimiser groups, and what an Attachment counts."""

import copy
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

import lora_lite as ll
from helpers import METHODS, attached, bits, calibration, same_bits, tiny, tiny_llama, token_ids, train

IDS = token_ids()
TIED = {"tie_word_embeddings": True}
CASES: list[Any] = [
    ({}, ("lm_head",), ["lm_head.weight"]),
    ({}, ("embed_tokens", r"^lm_head\.weight$"), ["model.embed_tokens.weight", "lm_head.weight"]),
    ({}, (r"model\.norm",), ["model.norm.weight"]),
    (TIED, ("lm_head",), ["lm_head.weight"]),
    (TIED, ("embed_tokens",), ["model.embed_tokens.weight"]),
    (TIED, ("lm_head", "embed_tokens"), ["lm_head.weight"]),
]


def llama(dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    return tiny_llama(dtype, num_hidden_layers=1, **changes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("changes", "patterns", "names"), CASES)
def test_trained_saved_loaded_and_put_back(
    changes: dict[str, Any], patterns: tuple[str, ...], names: list[str], dtype: torch.dtype, tmp_path: Path
) -> None:
    model = llama(dtype, **changes)
    model.model.norm.weight.requires_grad_(False)
    before, flags = bits(model), {key: p.requires_grad for key, p in model.named_parameters()}
    base = model(IDS).logits
    att = ll.attach(model, tiny("lora"), train_also=patterns)
    assert list(att.also) == names and all(p.requires_grad for p in att.also.values())
    assert torch.equal(model(IDS).logits, base)
    train(model, IDS, lr=1e-2)
    for name in names:
        assert not torch.equal(model.get_parameter(name), llama(dtype, **changes).get_parameter(name))
    changed = {id(p) for key, p in model.named_parameters() if key in before and not torch.equal(p, before[key])}
    assert changed == {id(p) for p in att.also.values()}
    logits = model(IDS).logits

    fresh = llama(dtype, **changes)
    again = ll.load(fresh, ll.save(model, tmp_path / "a.safetensors"))
    assert torch.equal(fresh(IDS).logits, logits)
    assert list(again.also) == names and again.num_trainable == att.num_trainable
    with ll.disabled(model):
        assert torch.equal(model(IDS).logits, base)
    with ll.scale(model, 0):
        assert not torch.equal(model(IDS).logits, base)  # c does not turn them
    assert torch.equal(model(IDS).logits, logits)
    for each in (model, fresh):
        ll.detach(each)
        assert same_bits(before, each) and torch.equal(each(IDS).logits, base)
    assert {key: p.requires_grad for key, p in model.named_parameters()} == flags
    assert all(p.requires_grad for p in fresh.parameters())


@pytest.mark.parametrize("changes", [{}, TIED], ids=["untied", "tied"])
def test_a_second_adapter_leaves_it_trained(changes: dict[str, Any]) -> None:
    model = llama(**changes)
    before = bits(model)
    head = model.lm_head.weight
    ll.attach(model, tiny("lora"), train_also=("lm_head",))
    attached(model, "ia3", name="second")
    assert head.requires_grad
    assert any(head is p for group in ll.param_groups(model, 1e-3) for p in group["params"])
    train(model, IDS)
    trained = head.detach().clone()
    with pytest.raises(ll.TargetError, match=r"lm_head\.weight belongs to an adapter already"):
        ll.attach(model, tiny("ia3"), name="third", train_also=("lm_head",))
    ll.detach(model, "second")
    assert torch.equal(head, trained) and head.requires_grad
    ll.detach(model)
    assert same_bits(before, model) and all(p.requires_grad for p in model.parameters())


def test_two_adapters_with_their_own() -> None:
    model = llama()
    before = bits(model)
    ll.attach(model, tiny("lora"), name="a", train_also=("lm_head",))
    ll.attach(model, tiny("lora"), name="b", train_also=("embed_tokens",))
    train(model, IDS)
    ll.detach(model, "a")
    assert torch.equal(model.lm_head.weight, before["lm_head.weight"]) and not model.lm_head.weight.requires_grad
    assert not torch.equal(model.model.embed_tokens.weight, before["model.embed_tokens.weight"])
    ll.detach(model, "b")
    assert same_bits(before, model)


def test_overwrite_takes_it_along(tmp_path: Path) -> None:
    model = llama()
    ll.attach(model, tiny("lora"), train_also=("lm_head",))
    train(model, IDS)
    path, logits, head = ll.save(model, tmp_path / "a.safetensors"), model(IDS).logits, model.lm_head.weight
    train(model, IDS)
    assert not torch.equal(model(IDS).logits, logits)
    ll.load(model, path, overwrite=True)
    assert torch.equal(model(IDS).logits, logits) and model.lm_head.weight is head


@pytest.mark.parametrize(
    ("patterns", "error", "match"),
    [
        (("lm_haed",), ll.TargetError, r"train_also: 'lm_haed' matches no parameter; near misses: .*lm_head"),
        (("q_proj",), ll.TargetError, r"q_proj.weight belongs to an adapter already, or is quantised; narrow 'q_proj'"),
        ("lm_head", ValueError, r"must be a sequence of regexes, e.g. \('lm_head',\)"),
    ],
)
def test_refusals(patterns: Any, error: type[Exception], match: str) -> None:
    model = llama()
    with pytest.raises(error, match=match):
        ll.attach(model, tiny("lora"), train_also=patterns)
    assert all(p.requires_grad for p in model.parameters())


def test_a_tied_head_cannot_be_adapted_and_trained() -> None:
    model = llama(**TIED)
    cfg = tiny("lora", target_names=("lm_head",), exclude_names=())
    with pytest.raises(ll.TargetError, match=r"embed_tokens\.weight belongs to an adapter already"):
        ll.attach(model, cfg, train_also=("embed_tokens",))


@pytest.mark.parametrize("method", METHODS)
def test_groups_hold_each_trained_tensor_once(method: str) -> None:
    model = llama()
    cfg = tiny(method)
    att = ll.attach(model, cfg, calibration(cfg, [IDS]), train_also=("lm_head", r"model\.norm"))
    groups = ll.param_groups(model, 1e-3, weight_decay=0.1, lora_plus_ratio=16)
    listed = [id(p) for group in groups for p in group["params"]]
    assert len(listed) == len(set(listed))
    assert set(listed) == {id(p) for p in model.parameters() if p.requires_grad}
    assert all(group["params"] for group in groups)
    of = {id(p): group for group in groups for p in group["params"]}
    cls = ll.methods()[method]
    for adapter in att.targets.values():
        for key, p in adapter.named_parameters():
            assert of[id(p)]["weight_decay"] == (0.1 if key in cls.facts.decay else 0.0)
            assert of[id(p)]["lr"] == (1e-3 * 16 if key in cls.facts.lora_plus else 1e-3)
    assert of[id(model.lm_head.weight)]["weight_decay"] == 0.1 and of[id(model.lm_head.weight)]["lr"] == 1e-3
    assert of[id(model.model.norm.weight)]["weight_decay"] == 0.0
    names = {key for adapter in att.targets.values() for key, _ in adapter.named_parameters()}
    assert set(cls.facts.decay) | set(cls.facts.lora_plus) <= names
    torch.optim.AdamW(groups).step()


def test_groups_of_some_adapters() -> None:
    model = llama()
    first = attached(model, "lora", name="a")
    attached(model, "lora", name="b")
    groups = ll.param_groups(model, 1e-3, names=["a"])
    assert {id(p) for group in groups for p in group["params"]} == {
        id(p) for adapter in first.targets.values() for p in adapter.parameters()
    }
    with pytest.raises(ll.StateError, match="no adapter is named 'c'"):
        ll.param_groups(model, 1e-3, names=["c"])
    for field in ("lr", "weight_decay", "lora_plus_ratio"):
        with pytest.raises(ValueError, match=rf"param_groups: {field} = -1.0 must be a finite number >= 0"):
            ll.param_groups(model, **{"lr": 1e-3, field: -1.0})


@pytest.mark.parametrize("method", METHODS)
def test_what_an_attachment_counts(method: str) -> None:
    model = llama()
    cfg, size = tiny(method), sum(p.numel() for p in model.parameters())
    att = ll.attach(model, cfg, calibration(cfg, [IDS]), name="mine", train_also=("lm_head",))
    assert list(att.targets) == [path for path, module in model.named_modules() if "lora" in module._modules]
    assert att.num_trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    stored = sum(v.numel() for k, v in model.state_dict().items() if ".lora.mine." in k)
    assert att.num_frozen == stored - att.num_trainable + model.lm_head.weight.numel()
    assert att.base_size == size
    again = ll.attachment(model, "mine")
    assert again.targets == att.targets and again.num_trainable == att.num_trainable
    lines = att.summary().splitlines()
    assert lines[-2] == (
        f"mine: {att.num_trainable:,} trained ({100 * att.num_trainable / size:.3g}% of the base's {size:,}), "
        f"{att.num_frozen:,} stored frozen, {len(att.targets)} layers; {att.megabytes:.3g} MB in a file"
    )
    assert lines[-1] == str(att.cost)
    assert "train_also        lm_head.weight (61, 32)" in lines
    counts = [int(line.split()[1]) for line in lines if line.startswith(f"{method} ")]
    assert sum(counts) == len(att.targets)
    path, adapter = next(iter(att.targets.items()))
    row = next(line for line in lines if path.replace("0", "*") in line)
    assert all(f"{key} {tuple(value.shape)}" in row for key, value in adapter.state_dict().items())


@pytest.mark.parametrize("changes", [{}, TIED], ids=["untied", "tied"])
def test_a_reference_pass_leaves_the_policys_gradient(changes: dict[str, Any]) -> None:
    """As DPO does: the base's forward pass between the policy's forward and its backward, in another thread's sight."""
    model = llama(**changes)
    base = model(IDS).logits
    ll.attach(model, tiny("lora"), train_also=("lm_head", r"model\.norm"))
    train(model, IDS, lr=1e-2)
    moved = [p for p in model.parameters() if p.requires_grad]

    def policy() -> torch.Tensor:
        return model(IDS).logits.square().mean()

    model.zero_grad()
    expected = torch.autograd.grad(policy(), moved)
    value = policy()
    with ll.disabled(model):
        reference = model(IDS).logits
        with ThreadPoolExecutor(1) as pool:
            assert torch.equal(pool.submit(policy).result(), value)
        found = torch.autograd.grad(value, moved)
        assert torch.equal(model.lm_head(model.model(IDS).last_hidden_state), base)
        with ll.scale(model, 1):
            assert torch.equal(policy(), value)
        assert [id(p) for p in model.parameters() if p.requires_grad] == [id(p) for p in moved]
    assert torch.equal(reference, base)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    other = copy.deepcopy(model)
    with ll.disabled(other):
        assert torch.equal(other(IDS).logits, base) and torch.equal(policy(), value)
    ll.detach(model)
    assert all(type(module._parameters) is dict for module in model.modules())
    assert torch.equal(model(IDS).logits, base)


def test_a_checkpointed_reference_is_the_base_in_backward_too() -> None:
    model = llama()
    att = attached(model, "lora", target_names=("up_proj",))
    assert att.targets
    ll.attach(model, tiny("lora", target_names=("down_proj",)), name="second", train_also=("input_layernorm",))
    train(model, IDS, lr=0.1)
    model.enable_input_require_grads()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.train()
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        embeddings = model.model.embed_tokens(IDS).detach().requires_grad_()
        with ll.disabled(model):
            value = model(inputs_embeds=embeddings).logits.square().mean()
        gradients.append(torch.autograd.grad(value, embeddings)[0])
    assert torch.equal(*gradients)


def test_a_recurrent_network_cannot_be_disabled() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.LSTM(8, 8))
    ll.attach(model, tiny("lora"), train_also=(r"^1\.",))
    with pytest.raises(ll.StateError, match="reads its weights past their names"):
        ll.disabled(model)


@pytest.mark.parametrize("pattern", ["lm_head", "embed_tokens"])
def test_a_tied_head_that_was_trained_far_loads_onto_its_own_base(pattern: str, tmp_path: Path) -> None:
    """Under whichever of its two names it was trained, the file holds it: it is no sample of the base."""
    model = llama(**TIED)
    att = ll.attach(model, tiny("lora"), train_also=(pattern,))
    with torch.no_grad():
        for parameter in att.also.values():
            parameter.normal_()
    ll.save(model, tmp_path / "a.safetensors")
    fresh = llama(**TIED)
    ll.load(fresh, tmp_path / "a.safetensors")
    assert torch.equal(fresh(IDS).logits, model(IDS).logits)
