"""Folders that peft itself writes, attached by `ll.import_peft`: the same function, and the same training."""

import copy
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lora_lite as ll
from helpers import anatomy, bits, relative, same_bits, tiny_llama, token_ids

IDS = token_ids()
TARGETS: dict[str, Any] = {"target_modules": ["q_proj", "v_proj", "down_proj"]}
MADE: dict[str, Callable[[], Any]] = {
    "lora": lambda: peft.LoraConfig(r=4, lora_alpha=6, **TARGETS),
    "rslora": lambda: peft.LoraConfig(r=4, lora_alpha=6, use_rslora=True, **TARGETS),
    "patterns": lambda: peft.LoraConfig(
        r=4, lora_alpha=6, rank_pattern={"q_proj": 2, "model.layers.1.mlp.down_proj": 8},
        alpha_pattern={"q_proj": 3, r"^model\.layers\.0\.mlp\.down_proj": 12}, **TARGETS,
    ),
    "anchored": lambda: peft.LoraConfig(
        r=4, lora_alpha=6, alpha_pattern={"^q_proj": 60, "self.attn.v_proj": 60}, **TARGETS
    ),
    "lora_bias": lambda: peft.LoraConfig(r=4, lora_alpha=6, lora_bias=True, **TARGETS),
    "modules_to_save": lambda: peft.LoraConfig(r=4, lora_alpha=6, modules_to_save=["lm_head"], **TARGETS),
    "dora": lambda: peft.LoraConfig(r=4, lora_alpha=6, use_dora=True, **TARGETS),
    "ia3": lambda: peft.IA3Config(feedforward_modules=["down_proj"], **TARGETS),
    "hra": lambda: peft.HRAConfig(r=4, **TARGETS),
    "road_1": lambda: peft.RoadConfig(variant="road_1", group_size=8, **TARGETS),
    "road_4": lambda: peft.RoadConfig(variant="road_4", group_size=16, **TARGETS),
    "delora": lambda: peft.DeloraConfig(
        r=4, delora_lambda=3, rank_pattern={"q_proj": 2}, lambda_pattern={"v_proj": 5}, **TARGETS
    ),
}  # fmt: skip


def theirs_trained(config: Any, base: nn.Module) -> Any:
    """peft's model with every trained tensor moved."""
    theirs = peft.get_peft_model(base, config)  # type: ignore[arg-type]
    rng = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=rng, dtype=torch.float64).to(parameter))
    return theirs.eval()


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS)[0].clone()


def made(folder: Path, kind: str = "lora", dtype: torch.dtype = torch.float32) -> Any:
    theirs = theirs_trained(MADE[kind](), tiny_llama(dtype))
    theirs.save_pretrained(folder)
    return theirs


@pytest.mark.parametrize("kind", MADE)
def test_the_same_function(kind: str, tmp_path: Path) -> None:
    theirs, ours = made(tmp_path, kind), tiny_llama()
    plain = logits(ours)
    att = ll.import_peft(ours, tmp_path)
    assert relative(logits(theirs), plain) > 1e-2
    assert relative(logits(ours), logits(theirs)) < 1e-6
    ll.save(ours, tmp_path / "ours.safetensors")  # and it is one of ours from here on
    again = tiny_llama()
    ll.load(again, tmp_path / "ours.safetensors")
    assert torch.equal(logits(again), logits(ours))
    assert {adapter.facts.name for adapter in att.targets.values()} <= set(ll.methods())
    ll.detach(ours)
    assert torch.equal(logits(ours), plain)


@pytest.mark.parametrize("kind", MADE)
def test_five_further_steps_move_it_as_they_move_pefts(kind: str, tmp_path: Path) -> None:
    theirs, ours = made(tmp_path, kind, torch.float64), tiny_llama(torch.float64)
    # peft casts what it adds to fp32 unless told not to; both are to start from the same fp64 tensors.
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.data = parameter.data.double()
    theirs.save_pretrained(tmp_path)
    ll.import_peft(ours, tmp_path)
    assert relative(logits(ours), logits(theirs)) < 1e-12
    for model in (ours, theirs):
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.SGD(trained, lr=1e-2, momentum=0.9)
        for _ in range(5):
            optimizer.zero_grad()
            model(input_ids=IDS)[0].square().mean().backward()
            optimizer.step()
    assert relative(logits(ours), logits(theirs)) < 1e-9


def test_ours_to_peft_to_ours(tmp_path: Path) -> None:
    model, back = tiny_llama(), tiny_llama()
    att = ll.attach(model, ll.AntiPaSTOConfig(r=4))
    with torch.no_grad():
        for adapter in att.targets.values():
            for parameter in adapter.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    ll.export_peft(model, tmp_path / "out")
    ll.import_peft(back, tmp_path / "out", name="again")
    assert relative(logits(back), logits(model)) < 1e-6


def test_pissa_comes_in_converted_and_is_refused_unconverted(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=4, lora_alpha=4, init_lora_weights="pissa", **TARGETS)
    theirs: Any = peft.get_peft_model(tiny_llama(), config)  # type: ignore[arg-type]
    theirs.save_pretrained(tmp_path / "start")
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.1)
    theirs.peft_config["default"].init_lora_weights = "pissa"
    expected = logits(theirs.eval())
    theirs.save_pretrained(tmp_path / "raw")
    theirs.peft_config["default"].init_lora_weights = True
    theirs.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    ours = tiny_llama()
    with pytest.raises(
        ll.CheckpointError, match=r"init_lora_weights = 'pissa'.*path_initial_model_for_weight_conversion"
    ):
        ll.import_peft(ours, tmp_path / "raw")
    ll.import_peft(ours, tmp_path / "converted")
    assert relative(logits(ours), expected) < 1e-5


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def retensor(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    path = folder / "adapter_model.safetensors"
    save_file({key: value.contiguous() for key, value in change(load_file(path)).items()}, path)


def as_pickle(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps({}))


def as_link(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()
    os.symlink("/dev/zero", folder / "adapter_model.safetensors")


FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
HOSTILE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "type": (lambda f: edit(f, peft_type="VERA"), "peft_type 'VERA' has no method here"),
    "no type": (lambda f: edit(f, peft_type=None), "peft_type None has no method here"),
    "field": (
        lambda f: edit(f, alora_invocation_tokens=[1]),
        r"alora_invocation_tokens = \[1\] of a LORA is not under",
    ),
    "new field": (lambda f: edit(f, twist=2.0), "twist = 2.0 of a LORA is not understood here"),
    "rank": (lambda f: edit(f, r=10**9), "down_proj: has the tensors"),
    "rank 0": (lambda f: edit(f, r=0), "down_proj: LoRAConfig.r = 0"),
    "rank text": (lambda f: edit(f, r="x"), r"down_proj: (LoRAConfig\.r = 'x'|Type-check)"),
    "alpha": (lambda f: edit(f, lora_alpha=float("inf")), "down_proj: LoRAConfig.alpha = inf"),
    "pattern": (lambda f: edit(f, rank_pattern={"(a+)+$": 4}), "rank_pattern names layers by the regex"),
    "type list": (lambda f: edit(f, peft_type=["LORA"]), "has no method here"),
    "pattern list": (lambda f: edit(f, rank_pattern=["q_proj"]), "rank_pattern must map names of layers to numbers"),
    "dora set": (lambda f: edit(f, use_dora=True), "has the tensors"),
    "twice": (
        lambda f: retensor(f, lambda t: t | {k.removeprefix("base_model.model."): 3 * v for k, v in t.items()}),
        "with and without 'base_model.model.'",
    ),
    "bias": (
        lambda f: retensor(f, lambda t: {**t, FIRST.replace("lora_A.weight", "bias"): torch.zeros(32)}),
        "which is of an adapted layer",
    ),
    "shape": (lambda f: retensor(f, lambda t: {**t, FIRST: torch.zeros(4, 31)}), "q_proj: has the tensors .*31"),
    "half": (lambda f: retensor(f, lambda t: {k: v for k, v in t.items() if k != FIRST}), "q_proj: has the tensors"),
    "nan": (lambda f: retensor(f, lambda t: {**t, FIRST: torch.full((4, 32), torch.nan)}), "is not finite"),
    "integers": (lambda f: retensor(f, lambda t: {**t, FIRST: torch.zeros(4, 32).int()}), "dtype torch.int32"),
    "large": (lambda f: retensor(f, lambda t: {**t, "x": torch.zeros(2**25)}), "more than any adapter of this model"),
    "extra": (lambda f: retensor(f, lambda t: {**t, "base_model.model.lm_haed.weight": torch.zeros(2)}), "lm_head"),
    "keys": (
        lambda f: retensor(f, lambda t: {k.replace("model.layers", "h"): v for k, v in t.items()}),
        "6 of 6 layers are not in this .*, such as h.0.mlp.down_proj; nearest here: .*layers.0.mlp.down_proj",
    ),
    "pickle": (as_pickle, "adapter_model.bin: is a pickle"),
    "device": (as_link, "is no regular file"),
    "cut": (
        lambda f: (f / "adapter_model.safetensors").write_bytes((f / "adapter_model.safetensors").read_bytes()[:900]),
        "no whole safetensors",
    ),
    "no json": (lambda f: (f / "adapter_config.json").write_text("{"), "is no JSON"),
    "nested": (lambda f: (f / "adapter_config.json").write_text("[" * 100_000), "is no JSON"),
    "list": (lambda f: (f / "adapter_config.json").write_text("[]"), "must hold an object"),
    "long": (lambda f: (f / "adapter_config.json").write_text(" " * 5 * 2**20), "more than the settings of an adapter"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("peft")
    made(where)
    return where


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_damaged_folder_is_refused_and_the_model_left_alone(kind: str, folder: Path, tmp_path: Path) -> None:
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    damage, words = HOSTILE[kind]
    damage(tmp_path)
    model = tiny_llama()
    before, shape = bits(model), anatomy(model)
    with pytest.raises(ll.CheckpointError, match=words):
        ll.import_peft(model, tmp_path)
    assert same_bits(before, model) and anatomy(model) == shape


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no folder at"):
        ll.import_peft(tiny_llama(), tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"no adapter_config\.json in"):
        ll.import_peft(tiny_llama(), tmp_path)


def test_the_inner_model_is_told_from_the_outer(folder: Path) -> None:
    inner: Any = tiny_llama().model
    with pytest.raises(ll.CheckpointError, match=r"It has layers\.0.*pass the model around this one"):
        ll.import_peft(inner, folder)


def test_another_name_of_the_base_is_a_warning(folder: Path, tmp_path: Path) -> None:
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    edit(tmp_path, base_model_name_or_path="someone/llama-7b")
    model: Any = tiny_llama()
    model.config._name_or_path = "someone/qwen-7b"
    with pytest.warns(ll.LoraLiteWarning, match="trained on 'someone/llama-7b'"):
        ll.import_peft(model, tmp_path)


def test_beside_one_of_ours(folder: Path) -> None:
    model = tiny_llama()
    ll.attach(model, ll.LoRAConfig(r=2), name="own")
    ll.import_peft(model, folder, name="theirs")
    bare = copy.deepcopy(model)
    with ll.scale(model, {"own": 1.0, "theirs": 0.0}):
        off = logits(model)
    ll.detach(bare, "theirs")
    assert torch.equal(off, logits(bare))
    with pytest.raises(ll.StateError, match="is attached already"):
        ll.import_peft(model, folder, name="own")
