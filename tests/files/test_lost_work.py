"""What training changes is in the file, or it is said that it is not: nothing learnt is lost in silence."""

import copy
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import lora_lite as ll
from helpers import METHODS, attached, bits, perturb, same_bits, tiny, tiny_llama, token_ids
from lora_lite.files import format as adapter_file

IDS = token_ids()
ATTENTION = tiny("lora", target_names=("q_proj",))


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


# A model's own `save_pretrained`, whose folder would load as the bare base.


def whole(model: Any) -> Any:
    return model


def pickled(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("same", [whole, copy.deepcopy, pickled])
def test_save_pretrained_is_refused_while_adapters_act(same: Callable[[Any], Any], tmp_path: Path) -> None:
    model: Any = tiny_llama()
    attached(model, "lora", [IDS])
    model = same(model)
    with pytest.raises(ll.StateError, match=r"ll\.save\(model, file\).*ll\.merge\(model\)"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
    expected = logits(model)
    ll.merge(model)
    model.save_pretrained(tmp_path / "merged")
    again, info = type(model).from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not info["unexpected_keys"]
    torch.testing.assert_close(logits(again), expected, atol=1e-5, rtol=1e-4)
    ll.unmerge(model)
    ll.detach(model)
    assert "save_pretrained" not in vars(model)
    model.save_pretrained(tmp_path / "base")
    assert torch.equal(logits(type(model).from_pretrained(tmp_path / "base")), logits(tiny_llama()))


def test_save_pretrained_of_a_part_or_of_a_model_around(tmp_path: Path) -> None:
    model = nn.Sequential(tiny_llama(), nn.Linear(4, 4))
    ll.attach(model, tiny("lora", target_names=("q_proj",)))
    with pytest.raises(ll.StateError, match="plain transformers would load the bare base"):
        model[0].save_pretrained(tmp_path)  # type: ignore[operator]
    around: Any = tiny_llama()
    ll.attach(around.model, tiny("lora"))
    with pytest.warns(ll.LoraLiteWarning, match="plain transformers would load the bare base"):
        around.save_pretrained(tmp_path)


def test_a_trainers_checkpoint_warns_and_resumes(tmp_path: Path) -> None:
    model = tiny_llama()
    att = attached(model, "lora", [IDS])
    rows = [{"input_ids": IDS[0], "labels": IDS[0]}] * 4

    def trainer(steps: int) -> transformers.Trainer:
        arguments = transformers.TrainingArguments(
            str(tmp_path), max_steps=steps, save_steps=1, per_device_train_batch_size=2, report_to=[], use_cpu=True
        )
        return transformers.Trainer(model, arguments, train_dataset=rows)  # type: ignore[arg-type]

    with pytest.warns(ll.LoraLiteWarning, match=r"this checkpoint resumes training .*ll\.save\(model, file\)"):
        trainer(1).train()
    after, B = logits(model), att.targets["model.layers.0.self_attn.q_proj"].get_parameter("B")
    with torch.no_grad():
        B.zero_()
    with pytest.warns(ll.LoraLiteWarning):
        trainer(1).train(resume_from_checkpoint=True)
    assert torch.equal(logits(model), after)


# Parameters that train beside the adapters.


def test_a_parameter_unfrozen_by_hand_is_not_left_out_in_silence(tmp_path: Path) -> None:
    model: Any = tiny_llama()
    ll.attach(model, tiny("lora"))
    model.model.norm.weight.requires_grad_(True)
    with pytest.raises(ll.StateError, match=r"norm\.weight requires a gradient, but belongs to no adapter.*1 such"):
        ll.save(model, tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())
    model.model.norm.weight.requires_grad_(False)
    ll.save(model, tmp_path / "a.safetensors")
    model.score = nn.Linear(4, 2)  # as a head put on after attach
    with pytest.raises(ll.StateError, match=r"score\.weight requires a gradient.*2 such"):
        ll.save(model, tmp_path / "a.safetensors")
    ll.detach(model)
    ll.attach(model, tiny("lora", target_names=("q_proj",)), train_also=("score", "norm"))
    ll.save(model, tmp_path / "a.safetensors")


def classifier(seed: int) -> Any:
    """One backbone, and a new random head for each seed."""
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=61, num_labels=3,
        pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForSequenceClassification(config)
    torch.manual_seed(seed)
    nn.init.normal_(model.score.weight)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_another_random_head_is_another_base(dtype: torch.dtype, tmp_path: Path) -> None:
    model = classifier(1)
    attached(model, "lora", [IDS], target_names=("q_proj",))
    file = ll.save(model, tmp_path / "a.safetensors")
    assert ll.load(classifier(1).to(dtype), file).targets
    other = classifier(2).to(dtype)
    before = bits(other)
    with pytest.raises(ll.BaseMismatchError, match=r"score\.weight, which the file does not hold, .*train_also"):
        ll.load(other, file)
    assert same_bits(before, other)
    assert ll.load(other, file, base="any").targets
    ll.detach(model)
    ll.attach(model, ATTENTION, train_also=("score",))
    with torch.no_grad():
        model.score.weight.normal_()
    ll.save(model, file)
    other = classifier(3)
    ll.load(other, file)
    assert torch.equal(logits(other), logits(model))


def test_a_head_that_another_adapter_trains_is_the_same_base(tmp_path: Path) -> None:
    model = classifier(1)
    ll.attach(model, ATTENTION, name="with_head", train_also=("score",))
    with torch.no_grad():
        model.score.weight.normal_()
    attached(model, "lora", [IDS], name="other", target_names=("q_proj",))
    file = ll.save(model, tmp_path / "a.safetensors", name="other")
    assert ll.load(model, file, name="again").targets
    assert ll.load(classifier(1), file).targets


def test_a_backbone_serves_under_another_head(tmp_path: Path) -> None:
    model = tiny_llama()
    attached(model, "lora", [IDS], target_names=("q_proj",))
    file = ll.save(model, tmp_path / "a.safetensors")
    other: Any = tiny_llama()
    other.lm_head = nn.Linear(32, 5)
    assert ll.load(other, file).targets


def test_new_rows_of_an_embedding_are_another_base(tmp_path: Path) -> None:
    def resized(seed: int) -> Any:
        model: Any = tiny_llama()
        torch.manual_seed(seed)
        model.resize_token_embeddings(70, mean_resizing=False)
        return model

    model = resized(1)
    attached(model, "lora", [IDS], target_names=("q_proj",))
    file = ll.save(model, tmp_path / "a.safetensors")
    assert ll.load(resized(1), file).targets
    with pytest.raises(ll.BaseMismatchError, match="embed_tokens"):
        ll.load(resized(2), file)


@pytest.mark.parametrize("path", ["model.norm", "model.layers.0.self_attn.q_proj"])
def test_what_was_trained_and_frozen_again_is_not_left_out_in_silence(path: str, tmp_path: Path) -> None:
    model = tiny_llama()
    attached(model, "lora", [IDS])
    weight = model.get_submodule(path).weight
    weight.requires_grad_(True)
    with torch.no_grad():
        weight.mul_(1.01)
    weight.requires_grad_(False)
    with pytest.raises(ll.StateError, match=f"{path}.weight has changed since attach"):
        ll.save(model, tmp_path / "a.safetensors")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_cast_changes_no_parameter(dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny_llama()
    attached(model, "lora", [IDS])
    model.to(dtype)
    ll.save(model, tmp_path / "a.safetensors")
    model.float()
    ll.save(model, tmp_path / "a.safetensors")


# Running averages, which a training pass moves.


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first, self.bn, self.second = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.bn(self.first(x)))


X = torch.linspace(-2, 3, 60).reshape(10, 6)


def trained(**options: Any) -> Normed:
    model = Normed()
    att = ll.attach(model, tiny("lora", target_names=("first", "second")), **options)
    perturb(att.targets.values())
    model.train()
    for _ in range(3):
        model(X).square().sum().backward()
    return model.eval()


@pytest.mark.parametrize("also", [(), ("bn",)])
def test_moved_running_averages_are_in_the_file(also: tuple[str, ...], tmp_path: Path) -> None:
    base, model = Normed().eval(), trained(train_also=also)
    assert not torch.equal(model.bn.running_mean, base.bn.running_mean)
    file = ll.save(model, tmp_path / "a.safetensors")
    again = Normed().eval()
    before = bits(again)
    ll.load(again, file)
    assert torch.equal(again(X), model(X)) and again.bn.num_batches_tracked == 3
    with ll.disabled(again):
        assert torch.equal(again(X), base(X))
    ll.load(again, file, overwrite=True)
    ll.detach(again)
    assert same_bits(before, again) and torch.equal(again(X), base(X))


def test_a_disabled_model_moves_no_running_average() -> None:
    model = trained()
    before = bits(model)
    model.train()
    with ll.disabled(model):
        model(X)
    assert same_bits(before, model)


def test_running_averages_of_two_adapters_do_not_meet(tmp_path: Path) -> None:
    file = ll.save(trained(), tmp_path / "a.safetensors")
    model = trained()
    assert ll.load(model, file, name="same").targets
    model.train()(X)
    before = bits(model)
    with pytest.raises(ll.StateError, match=r"bn\.running_mean, which another adapter's training moved"):
        ll.load(model, file, name="other")
    assert same_bits(before, model)


def test_running_averages_fit_the_model(tmp_path: Path) -> None:
    file = ll.save(trained(), tmp_path / "a.safetensors")
    model: Any = Normed()
    model.bn = nn.LayerNorm(8)
    with pytest.raises(ll.CheckpointError, match=r"holds bn\.running_mean \(8,\), which the model has not"):
        ll.load(model, file, base="any")


# Trainers that cast, and files that would not load.


@pytest.mark.parametrize("method", METHODS)
def test_parameters_that_a_trainer_cast_are_saved_in_the_configs_dtype(method: str, tmp_path: Path) -> None:
    """TRL casts what is trained to bf16 on a quantised base."""
    model = tiny_llama()
    adapters = attached(model, method, [IDS]).targets
    for p in [p for adapter in adapters.values() for p in adapter.parameters() if p.requires_grad]:
        p.data = p.data.to(torch.bfloat16)
    fresh = tiny_llama()
    for path, adapter in ll.load(fresh, ll.save(model, tmp_path / "a.safetensors")).targets.items():
        for key, p in adapter.named_parameters():
            assert p.dtype == torch.float32 and torch.equal(p, adapters[path].get_parameter(key).float())


def test_a_file_that_load_would_refuse_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama()
    attached(model, "lora", [IDS])
    file = ll.save(model, tmp_path / "a.safetensors")
    content = file.read_bytes()
    monkeypatch.setattr(adapter_file.Room, "values", property(lambda room: 1000))
    with pytest.raises(ll.CheckpointError, match="was not written, for `load` would refuse it"):
        ll.save(model, file)
    assert file.read_bytes() == content


def test_running_averages_that_the_dtype_cannot_hold_are_refused(tmp_path: Path) -> None:
    def fresh() -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 8))

    model = fresh()
    ll.attach(model, ll.LoRAConfig(r=2, target_roles=()))
    model[1].running_var.fill_(1e6)  # type: ignore[index, union-attr, operator]
    ll.save(model, tmp_path / "a.safetensors")
    with pytest.raises(ll.CheckpointError, match=r"1\.running_var has values up to 1e\+06"):
        ll.load(fresh().half(), tmp_path / "a.safetensors")


# Layers whose weight a training pass reads without calling them.


class Fused(nn.Module):
    """With labels, the loss reads the head's weight, as fused losses do."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(6, 8), nn.Linear(8, 5)

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        h = self.body(x).relu()
        if labels is None:
            return self.head(h)
        return nn.functional.cross_entropy(h @ self.head.weight.T, labels)


def test_an_adapter_that_training_skips_is_reported() -> None:
    model, labels = Fused(), torch.zeros(10, dtype=torch.long)
    ll.attach(model, tiny("lora", target_names=("body", "head")))
    ll.check(model, [X])
    model.train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            model(X, labels).backward()
        model(X).sum().backward()  # and then it does run
        for _ in range(3):
            model(X, labels).backward()
    with pytest.warns(ll.LoraLiteWarning, match="1 adapters did not run in the last 4 training passes, .* on head"):
        model(X, labels).backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(X, labels).backward()
        model.eval()(X)
