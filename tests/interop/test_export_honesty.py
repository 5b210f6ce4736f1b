"""What a peft folder cannot say is refused, and what it can is not lost: tied and shared weights, heads, names."""

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_export_peft import by_peft, logits
from torch import Tensor, nn
from transformers import LlamaForSequenceClassification

import lora_lite as ll
from helpers import OneLayer, attached, perturb, relative, tiny_llama
from lora_lite.interop.verify import verify


def moved(model: nn.Module, *patterns: str, dtype_size: float = 0.1) -> nn.Module:
    """The model with a LoRA on its queries, and whole parameters trained as well."""
    att = ll.attach(model, ll.LoRAConfig(r=2, target_names=("q_proj",)), train_also=patterns)
    perturb(att.targets.values())
    with torch.no_grad():
        for parameter in att.also.values():
            parameter.add_(dtype_size * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return model


@pytest.mark.parametrize("trained", ["lm_head", "embed_tokens"])
def test_tied_weights_trained_as_well_stay_tied(trained: str, tmp_path: Path) -> None:
    base, model, back = (tiny_llama(tie_word_embeddings=True) for _ in range(3))
    moved(model, trained)
    ll.export_peft(model, tmp_path / "out")
    assert relative(logits(by_peft(tmp_path / "out", base)), logits(model)) < 1e-5
    ll.import_peft(back, tmp_path / "out")
    assert relative(logits(back), logits(model)) < 1e-6


def test_weights_that_peft_untied_are_refused(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
    theirs: Any = peft.get_peft_model(tiny_llama(tie_word_embeddings=True), config)  # type: ignore[arg-type]
    theirs.save_pretrained(tmp_path)
    with pytest.raises(ll.CheckpointError, match=r"which peft trained apart from .*untie them first"):
        ll.import_peft(tiny_llama(tie_word_embeddings=True), tmp_path)


def test_an_inner_model_is_not_exported_as_the_whole(tmp_path: Path) -> None:
    model: Any = tiny_llama()
    attached(model.model, "lora", target_names=("q_proj",))
    with pytest.raises(ll.StateError, match="attached to model within this LlamaForCausalLM"):
        ll.export_peft(model, tmp_path / "out")
    ll.export_peft(model.model, tmp_path / "inner")


@pytest.mark.parametrize("method", ["ia3", "lora", "dora"])
def test_values_that_are_not_finite_are_never_written(method: str, tmp_path: Path) -> None:
    model = tiny_llama()
    att = attached(model, method, target_names=("k_proj",))
    with torch.no_grad():
        next(iter(att.targets.values())).get_parameter({"ia3": "l"}.get(method, "B")).fill_(torch.nan)
    with pytest.raises(ll.StateError, match="not finite"):
        ll.export_peft(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_half_of_the_change_is_more_than_rounding(tmp_path: Path) -> None:
    """In bf16 a small change lies within what rounding alone may do; a folder without it still has no effect."""
    model = tiny_llama(torch.bfloat16)
    attached(model, "lora", target_names=("q_proj",), size=0.02)
    ll.export_peft(model, tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    save_file({key: torch.zeros_like(value) for key, value in tensors.items()},
              tmp_path / "out" / "adapter_model.safetensors")  # fmt: skip
    with pytest.raises(ll.StateError, match="what peft computes of the export differs"):
        verify(model, tmp_path / "out", ["default"], None, None)


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(16, 16)
        self.b = self.a

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)))


class Averages(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f, self.n = nn.Linear(16, 16), nn.BatchNorm1d(16)

    def forward(self, x: Tensor) -> Tensor:
        return self.n(self.f(x))


def test_a_layer_of_two_names_is_refused(tmp_path: Path) -> None:
    model = Shared()
    attached(model, "lora")
    with pytest.raises(ll.CheckpointError, match=r"the layer a is used under 2 names \(a, b\)"):
        ll.export_peft(model, tmp_path / "out")


def test_moved_averages_are_refused(tmp_path: Path) -> None:
    model = Averages()
    attached(model, "lora")
    model.train()(torch.randn(20, 16))
    with pytest.raises(ll.StateError, match="training moved running averages"):
        ll.export_peft(model.eval(), tmp_path / "out")


@pytest.mark.parametrize("rank", [None, 4])
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_no_change_is_no_export(method: str, rank: int | None, tmp_path: Path) -> None:
    model = tiny_llama()
    ll.attach(model, ll.methods()[method].tiny().replace(target_names=("q_proj",)))
    with pytest.raises(ll.StateError, match="change nothing"):
        ll.export_peft(model, tmp_path / "out", rank=rank)
    assert all(change.rank == 0 for change in ll.low_rank(model, rank=4).values())


def test_another_adapters_head_is_not_passed_over(tmp_path: Path) -> None:
    model = moved(tiny_llama(), "lm_head")
    attached(model, "lora", name="b", target_names=("v_proj",))
    with pytest.raises(ll.StateError, match=r"adapter 'default' trained lm_head\.weight as well"):
        ll.export_peft(model, tmp_path / "out", name="b")


@pytest.mark.parametrize("head", [(), ("score",)])
def test_classifiers_with_and_without_a_trained_head(head: tuple[str, ...], tmp_path: Path) -> None:
    def classifier() -> Any:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return LlamaForSequenceClassification(tiny_llama().config).eval()  # type: ignore[arg-type]

    model, base = classifier(), classifier()
    moved(model, *head)
    done = ll.export_peft(model, tmp_path / "out")
    assert done.agreement.logits is not None
    assert relative(logits(by_peft(tmp_path / "out", base)), logits(model)) < 1e-5


class Names(nn.Module):
    """Two modules called proj, one of which is no linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.ModuleDict({"proj": nn.Linear(16, 16)})
        self.b = nn.ModuleDict({"proj": nn.Sequential(nn.ReLU(), nn.Linear(16, 16)), "a": nn.ModuleDict()})

    def forward(self, x: Tensor) -> Tensor:
        return self.b["proj"](self.a["proj"](x))


def test_a_name_that_others_share_is_written_as_a_path(tmp_path: Path) -> None:
    model = Names()
    base, x = copy.deepcopy(model), torch.randn(5, 16)
    perturb(ll.attach(model, ll.LoRAConfig(r=2, target_roles=(), target_names=("a.proj",))).targets.values())
    ll.export_peft(model, tmp_path / "out", inputs={"x": x})
    with torch.no_grad():
        assert relative(by_peft(tmp_path / "out", base)(x), model(x)) < 1e-5


def test_files_of_others_are_left_alone(tmp_path: Path) -> None:
    model = tiny_llama()
    attached(model, "lora", target_names=("q_proj",))
    (tmp_path / "README.md").write_text("my notes")
    with pytest.raises(ll.CheckpointError, match="no earlier export of ours"):
        ll.export_peft(model, tmp_path)
    assert (tmp_path / "README.md").read_text() == "my notes"


def test_the_global_generator_is_untouched(tmp_path: Path) -> None:
    model = tiny_llama()
    attached(model, "lora", target_names=("q_proj",))
    before = torch.get_rng_state()
    ll.export_peft(model, tmp_path / "out")
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("bias", [0.0, 300.0])
def test_rounding_of_a_large_bias_is_no_rank(bias: float) -> None:
    model = OneLayer(256, 256, dtype=torch.float32)
    with torch.no_grad():
        model.layer.weight.normal_(std=0.02)
        model.layer.bias.fill_(bias)
    attached(model, "lora", size=0.005)
    assert ll.low_rank(model)["layer"].rank == 2
