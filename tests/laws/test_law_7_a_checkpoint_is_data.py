"""Law 7. A checkpoint is data: one safetensors file, written whole, loaded without calibration, never pickled; what
is saved comes back bit for bit, in a fresh model or in place. (Damaged and hostile files: files/.)
"""

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_lite as ll
from helpers import METHODS, attached, bits, perturb, same_bits, tiny_llama, token_ids

DTYPES = [torch.float32, torch.bfloat16]
NARROW = ll.LoRAConfig(r=2, target_names=("q_proj",))


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(token_ids()).logits


def saved(model: nn.Module, path: Path, cfg: Any = NARROW, **options: Any) -> Path:
    """Attach, perturb, save and detach again."""
    perturb(ll.attach(model, cfg, **options).targets.values())
    ll.save(model, path)
    ll.detach(model)
    return path


def on_disk(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(lora-lite's header, safetensors' header), read by hand; every byte of the file is accounted for."""
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    metadata = header.pop("__metadata__")
    assert list(metadata) == ["lora_lite"]
    assert max(entry["data_offsets"][1] for entry in header.values()) == len(data) - 8 - size
    return json.loads(metadata["lora_lite"]), header


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_round_trip(method: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny_llama(dtype)
    att = attached(model, method, [token_ids()])
    expected = logits(model)
    path = ll.save(model, tmp_path / "adapter.safetensors")

    fresh, generator = tiny_llama(dtype), torch.get_rng_state()
    base = bits(fresh)
    again = ll.load(fresh, path, name="other")
    assert torch.equal(torch.get_rng_state(), generator)
    assert torch.equal(logits(fresh), expected)
    assert same_bits(base, fresh)
    assert list(again.targets) == list(att.targets)
    for key, adapter in att.targets.items():
        assert again.targets[key].cfg == adapter.cfg
        assert same_bits(bits(adapter), again.targets[key])
    assert again.num_trainable == att.num_trainable and again.num_frozen == att.num_frozen
    assert all(p.requires_grad == (".lora." in key) for key, p in fresh.named_parameters())


@pytest.mark.parametrize("method", METHODS)
def test_equal_adapters_give_equal_files(method: str, tmp_path: Path) -> None:
    first, second = tiny_llama(), tiny_llama()
    for model in (first, second):
        attached(model, method, [token_ids()])
    a, b = (ll.save(model, tmp_path / name).read_bytes() for model, name in ((first, "a"), (second, "b")))
    assert a == ll.save(first, tmp_path / "a").read_bytes() == b
    loaded = tiny_llama()
    ll.load(loaded, tmp_path / "a")
    assert ll.save(loaded, tmp_path / "c").read_bytes() == a


@pytest.mark.parametrize("method", METHODS)
def test_a_file_is_json_and_numbers(method: str, tmp_path: Path) -> None:
    model = tiny_llama()
    att = attached(model, method, [token_ids()])
    header, tensors = on_disk(ll.save(model, tmp_path / "adapter.safetensors"))
    assert header["format"] == 2 and header["name"] == "default" and header["train_also"] == []
    assert [each["method"] for each in header["configs"]] == [method]
    assert set(header["targets"]) == set(att.targets)
    stored = {f"{path}.lora.{key}" for path, adapter in att.targets.items() for key in adapter.state_dict()}
    assert set(tensors) == stored | {f"{path}.sketch" for path in att.targets} | {"base"}
    assert {entry["dtype"] for entry in tensors.values()} == {"F32"}


@pytest.mark.parametrize("method", METHODS)
def test_overwrite_in_place(method: str, tmp_path: Path) -> None:
    model = tiny_llama()
    att = attached(model, method, [token_ids()])
    expected = logits(model)
    path = ll.save(model, tmp_path / "adapter.safetensors")
    kept = {key: (p, p.data_ptr()) for key, p in model.named_parameters() if ".lora." in key}
    trained = ll.methods()[method].facts.trained
    optimizer = torch.optim.AdamW(ll.param_groups(model, lr=1e-2)) if trained else None
    perturb(att.targets.values(), seed=5)
    for adapter in att.targets.values():  # frozen tensors come back as well
        for key, value in adapter.state_dict().items():
            value.mul_(1.5 if key not in dict(adapter.named_parameters()) else 1.0)
    assert not torch.equal(logits(model), expected)

    ll.load(model, path, overwrite=True)
    assert torch.equal(logits(model), expected)
    for key, p in model.named_parameters():
        if ".lora." in key:
            assert p is kept[key][0] and p.data_ptr() == kept[key][1]
    if optimizer is not None:
        model(input_ids=token_ids(), labels=token_ids()).loss.backward()
        optimizer.step()
        assert not torch.equal(logits(model), expected)


@pytest.mark.parametrize(
    "live",
    [
        lambda model: ll.attach(model, NARROW.replace(r=3)),
        lambda model: ll.attach(model, NARROW.replace(alpha=1.0)),
        lambda model: ll.attach(model, NARROW.replace(layers=(0,))),
        lambda model: ll.attach(model, NARROW, train_also=("norm.weight",)),
        lambda model: ll.attach(model, ll.DoRAConfig(r=2, target_names=("q_proj",))),
        lambda model: ll.attach(model, [NARROW, ll.LoRAConfig(r=2, target_names=("k_proj",))]),
    ],
    ids=["r", "alpha", "targets", "train_also", "method", "configs"],
)
def test_overwrite_of_another_kind_is_refused(live: Callable[[nn.Module], ll.Attachment], tmp_path: Path) -> None:
    path = saved(tiny_llama(), tmp_path / "adapter.safetensors")
    model = tiny_llama()
    perturb(live(model).targets.values(), seed=3)
    before, expected = bits(model), logits(model)
    with pytest.raises(ll.StateError, match="other configs, targets or train_also than the attached 'default'; detach"):
        ll.load(model, path, overwrite=True)
    assert same_bits(before, model) and torch.equal(logits(model), expected)
    with pytest.raises(ll.StateError, match="named 'default' is attached already"):
        ll.load(model, path)


def test_overwrite_of_nothing_loads(tmp_path: Path) -> None:
    path = saved(tiny_llama(), tmp_path / "adapter.safetensors")
    model, other = tiny_llama(), tiny_llama()
    ll.load(model, path, overwrite=True)
    ll.load(other, path)
    assert torch.equal(logits(model), logits(other))


def test_ranks_that_differ_by_layer(tmp_path: Path) -> None:
    model = tiny_llama()
    cfg = ll.EVAConfig(r=3, rho=2.0)
    att = ll.attach(model, cfg, [token_ids()])
    perturb(att.targets.values())
    ranks = {path: adapter.cfg.r for path, adapter in att.targets.items()}
    assert len(set(ranks.values())) > 1
    expected = logits(model)
    fresh = tiny_llama()
    again = ll.load(fresh, ll.save(model, tmp_path / "adapter.safetensors"))
    assert {path: adapter.A.shape[0] for path, adapter in again.targets.items()} == ranks
    assert torch.equal(logits(fresh), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_several_configs_and_train_also_are_one_file(dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny_llama(dtype)
    att = ll.attach(model, [ll.IA3Config(), ll.IA3FFConfig()], train_also=("lm_head", r"model\.norm\.weight"))
    perturb(att.targets.values())
    with torch.no_grad():
        for p in att.also.values():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(0)).to(p.dtype))
    expected = logits(model)
    path = ll.save(model, tmp_path / "adapter.safetensors")

    fresh = tiny_llama(dtype)
    base, before = bits(fresh), logits(fresh)
    again = ll.load(fresh, path)
    assert list(again.also) == ["model.norm.weight", "lm_head.weight"] or set(again.also) == set(att.also)
    assert {adapter.facts.name for adapter in again.targets.values()} == {"ia3", "ia3_ff"}
    assert torch.equal(logits(fresh), expected)
    ll.detach(fresh)
    assert same_bits(base, fresh) and torch.equal(logits(fresh), before)


def test_trained_weights_that_the_model_does_not_have(tmp_path: Path) -> None:
    model = tiny_llama(attention_bias=True)
    path = saved(model, tmp_path / "bias", train_also=(r"layers\.0\.self_attn\.k_proj\.bias",))
    with pytest.raises(ll.CheckpointError, match=r"does not fit the model: .*k_proj.*bias.* matches no parameter"):
        ll.load(tiny_llama(), path, base="any")
    untied = tiny_llama(tie_word_embeddings=False)
    path = saved(untied, tmp_path / "untied", train_also=("lm_head", "embed_tokens"))
    with pytest.raises(
        ll.CheckpointError, match=r"has values of model\.embed_tokens\.weight and of a parameter .* the same"
    ):
        ll.load(tiny_llama(tie_word_embeddings=True), path, base="any")


def test_a_loaded_adapter_is_free_of_its_file(tmp_path: Path) -> None:
    """Writing over the file in place (cp, rsync --inplace) or cutting it short does not reach a live adapter."""
    path = saved(tiny_llama(), tmp_path / "adapter.safetensors")
    model = tiny_llama()
    ll.load(model, path)
    expected = logits(model)
    size = path.stat().st_size
    with open(path, "r+b") as handle:
        handle.write(b"\xff" * size)
    assert torch.equal(logits(model), expected)
    os.truncate(path, 0)
    assert torch.equal(logits(model), expected)


def test_odd_file_names(tmp_path: Path) -> None:
    model = tiny_llama()
    attached(model, "lora")
    for name in ("[a-z]*.safetensors", "über ünïcode", "no/such/folder/yet/x.safetensors", ".hidden", "a" * 200):
        where = tmp_path / name
        assert ll.save(model, str(where)) == where
        fresh = tiny_llama()
        ll.load(fresh, str(where))
        assert torch.equal(logits(fresh), logits(model))
        assert [found.name for found in where.parent.iterdir() if found.name.endswith(".tmp")] == []


def test_no_file(tmp_path: Path) -> None:
    for where in (tmp_path / "nothing", tmp_path):
        with pytest.raises(FileNotFoundError, match="no adapter file at "):
            ll.load(tiny_llama(), where)
    with pytest.raises(ValueError, match="base = 'none' must be 'same' or 'any'"):
        ll.load(tiny_llama(), tmp_path, base="none")
