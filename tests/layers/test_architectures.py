"""Many architectures of transformers, tiny: attach, check, train, save, load, detach; or a clear refusal."""

import contextlib
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lora_lite as ll
from helpers import anatomy, bits, same_bits
from zoo import ARCHITECTURES, Arch

# One of a kind each: Conv1D, mixture of experts, shared layers, encoder-decoder, vision, state space.
FAST = ("gpt2", "qwen3_moe", "albert", "t5", "vit", "mamba")
CASES = [pytest.param(name, marks=[] if name in FAST else pytest.mark.slow) for name in ARCHITECTURES]
CONFIG = ll.LoRAConfig(r=2)


def logits(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        output = model.eval()(**batch)
    return output.logits_per_image if "logits_per_image" in output else output.logits


def attach(model: nn.Module, arch: Arch) -> ll.Attachment:
    """Attach with the default targets, or by the way out that the refusal names; fused weights must be reported."""
    cfg = CONFIG
    if not arch.targets:
        with pytest.raises(ll.TargetError, match=r"does not say d_model .*LoRAConfig\(d_model=.*target_roles=\(\)"):
            ll.attach(model, cfg)
        cfg = cfg.replace(target_roles=())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ll.LoraLiteWarning)
        att = ll.attach(model, cfg)
    said = [str(warning.message) for warning in caught if issubclass(warning.category, ll.LoraLiteWarning)]
    assert len(said) == arch.fused + bool(arch.inner), said
    if arch.fused:
        assert any("fused 3-D weights stay without an adapter" in words for words in said)
        assert "out of reach of hooks" in att.summary()
    assert len(att.left_out) == arch.inner
    assert all(f"{arch.inner} linear layers left out" in words for words in said if "fused" not in words)
    return att


def embeddings(model: nn.Module) -> set[nn.Module]:
    """The input embedding and the output head, as far as the model has them."""
    found = set()
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        with contextlib.suppress(NotImplementedError):
            found.add(getattr(model, getter)())
    return found - {None}


def train(model: nn.Module, batch: dict[str, Any], steps: int = 2) -> None:
    optimizer = torch.optim.AdamW(ll.param_groups(model, lr=1e-2))
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()


@pytest.mark.parametrize("name", CASES)
def test_architecture(name: str, tmp_path: Path) -> None:
    arch = ARCHITECTURES[name]
    model, batch = arch.make(), arch.inputs()
    base = logits(model, batch)  # first: at their first call some models give themselves hooks
    before, form = bits(model), anatomy(model)

    att = attach(model, arch)
    assert len(att.targets) == arch.targets or not arch.targets
    assert not embeddings(model) & {model.get_submodule(path) for path in att.targets}
    # torch.matmul picks its kernel by requires_grad too (on transposed inputs), so the base is compared frozen.
    assert torch.equal(logits(model, batch), logits(arch.make().requires_grad_(False), batch))

    report = ll.check(model, [batch])
    assert report.effect > 0
    assert report.rows_independent is not False
    assert all(layer.modes == {True, False} for layer in report.layers["default"].values())

    started = {path: bits(adapter) for path, adapter in att.targets.items()}
    train(model, batch)
    for path, adapter in att.targets.items():
        moved = [key for key, value in adapter.named_parameters() if not torch.equal(value, started[path][key])]
        assert sorted(moved) == ["A", "B"], f"{path} did not learn"
    trained = logits(model, batch)
    assert not torch.equal(trained, base)

    fresh = arch.make()
    ll.load(fresh, ll.save(model, tmp_path / "adapter.safetensors"))
    assert torch.equal(logits(fresh, batch), trained)

    ll.detach(model)
    model.eval()
    assert same_bits(before, model)
    assert anatomy(model) == form
    assert torch.equal(logits(model, batch), base)


@pytest.mark.parametrize("name", ["mamba", pytest.param("falcon_mamba", marks=pytest.mark.slow)])
def test_a_weight_read_without_its_layer_is_found(name: str) -> None:
    """Mamba multiplies with dt_proj.weight itself, so that no hook sees it."""
    arch = ARCHITECTURES[name]
    model = arch.make()
    ll.attach(model, CONFIG.replace(target_roles=()))
    with pytest.raises(ll.CheckError, match=r"layers\.0\.mixer\.dt_proj never ran.*without calling the layer.*exclude"):
        ll.check(model, [arch.inputs()])
    ll.detach(model)
    ll.attach(model, CONFIG.replace(target_roles=(), exclude_names=("lm_head", "dt_proj")))
    ll.check(model, [arch.inputs()])


class FastPath(nn.Module):
    """As Mamba with its training kernel: in one mode the second layer's weight is read without calling the layer."""

    def __init__(self, fast_in_training: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.fast_in_training = fast_in_training

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        fast = self.training == self.fast_in_training
        return F.linear(h, self.second.weight, self.second.bias) if fast else self.second(h)


@pytest.mark.parametrize("in_training", [True, False])
def test_a_fast_path_in_one_mode_only_is_found(in_training: bool) -> None:
    model = FastPath(in_training)
    ll.attach(model, CONFIG.replace(target_roles=()))
    words = "ran in eval mode but not in train mode" if in_training else "ran in train mode but not in eval mode"
    with pytest.raises(ll.CheckError, match=f"second {words}"):
        ll.check(model, [torch.randn(3, 4, 6)])
    ll.detach(model)
    ll.attach(model, CONFIG.replace(target_roles=(), target_names=("first",)))
    ll.check(model, [torch.randn(3, 4, 6)])


def test_layers_skipped_at_random_in_training_are_no_finding() -> None:
    arch = ARCHITECTURES["wav2vec2"]
    model = Arch(arch.model, arch.config, {**arch.settings, "layerdrop": 0.3}, arch.targets).make()
    ll.attach(model, CONFIG)
    torch.manual_seed(0)
    report = ll.check(model, [arch.inputs()])
    assert len({layer.calls for layer in report.layers["default"].values()}) > 1  # some were skipped indeed


def test_an_embedding_table_alone_has_no_target() -> None:
    with pytest.raises(ll.TargetError, match="Embedding has no linear layer"):
        ll.attach(nn.Embedding(5, 4), CONFIG)


def test_a_convolution_has_no_target() -> None:
    arch = ARCHITECTURES["convnext"]
    with pytest.raises(ll.TargetError, match=r"'dwconv' matches no linear layer; near misses: .*pwconv1"):
        ll.attach(arch.make(), CONFIG.replace(target_names=("dwconv",)))
