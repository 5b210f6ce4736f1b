"""What `ll.export_peft` writes, loaded by peft and transformers onto a fresh base, and held to what servers accept."""

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lora_lite as ll
from helpers import METHODS, anatomy, attached, bits, perturb, relative, same_bits, tiny_llama, token_ids
from lora_lite.interop.verify import verify
from quantized_models import Net, inputs, net
from servers import scaling, vllm_refuses
from zoo import ARCHITECTURES

OWN = {"dora": "DoRA", "ia3": "IA3", "ia3_ff": "IA3", "road": "ROAD"}
PROJECTIONS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
IDS = token_ids()


def logits(model: nn.Module, **batch: Any) -> Tensor:
    with torch.no_grad():
        return model(**(batch or {"input_ids": IDS}))[0].clone()


def by_peft(folder: Path, base: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(base, str(folder)).eval()  # type: ignore[arg-type]


AFFINE = [method for method in METHODS if ll.methods()[method].facts.affine]


@pytest.mark.parametrize("method", AFFINE)
def test_every_method_is_loaded_by_peft(method: str, tmp_path: Path) -> None:
    base, model = tiny_llama(), tiny_llama()
    batches = [{"input_ids": token_ids(8, 40, seed=k)} for k in range(4)]
    names = {"ia3": ("k_proj", "v_proj"), "ia3_ff": ("down_proj",)}.get(method, tuple(PROJECTIONS))
    attached(model, method, batches, target_names=names)
    before, shape = bits(model), anatomy(model)
    done = ll.export_peft(model, tmp_path / "out")
    assert same_bits(before, model) and anatomy(model) == shape
    expected = logits(model)
    assert relative(expected, logits(base)) > 1e-3  # else the comparison would prove little
    assert relative(logits(by_peft(tmp_path / "out", base)), expected) < 1e-5
    assert done.agreement.layers < 1e-5 and done.agreement.logits is not None and done.agreement.logits < 1e-5
    assert done.form == OWN.get(method, "lora") and done.weight_error < 1e-6
    refusal = vllm_refuses(tmp_path / "out", PROJECTIONS)
    assert (refusal is None) == (method not in OWN) == (not done.refused_by), refusal
    if method not in OWN:
        assert scaling(tmp_path / "out") == 1.0
        settings = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
        assert settings["target_modules"] == sorted(names) and settings["task_type"] == "CAUSAL_LM"


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "antipasto_rot", "dora"])
@pytest.mark.parametrize("arch", ["llama", "qwen2", "gpt2", "t5", "bert", "vit", "whisper", "mixtral"])
def test_architectures(arch: str, method: str, tmp_path: Path) -> None:
    made = ARCHITECTURES[arch]
    base, model, batch = made.make(), made.make(), made.inputs()
    heads = {"vit": ("classifier",)}  # of two classes, where a rank of 8 has no room
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cfg = ll.methods()[method].tiny().replace(exclude_names=heads.get(arch, ()))
        perturb(ll.attach(model, cfg).targets.values())
    done = ll.export_peft(model, tmp_path / "out")
    assert done.agreement.logits is not None, "no inputs were made"
    batch.pop("labels")
    if arch in ("t5", "whisper"):
        batch["decoder_input_ids"] = IDS
    expected = logits(model, **batch)
    assert relative(logits(by_peft(tmp_path / "out", base), **batch), expected) < 1e-5
    back = made.make()
    ll.import_peft(back, tmp_path / "out")
    assert relative(logits(back, **batch), expected) < 1e-6


def test_transformers_loads_it_by_itself(tmp_path: Path) -> None:
    base, model = tiny_llama(), tiny_llama()
    attached(model, "antipasto", target_names=("q_proj", "down_proj"))
    ll.export_peft(model, tmp_path / "out")
    base.load_adapter(str(tmp_path / "out"))  # type: ignore[operator]
    assert relative(logits(base), logits(model)) < 1e-5


@pytest.mark.parametrize("c", [0.5, -1.0])
def test_the_coefficient_in_force_and_whole_stacks(c: float, tmp_path: Path) -> None:
    base, model = tiny_llama(), tiny_llama()
    attached(model, "dora", name="a", target_names=("q_proj",))
    attached(model, "lora", name="b", target_names=("q_proj", "v_proj"))
    with ll.scale(model, c):
        whole, alone = ll.export_peft(model, tmp_path / "ab"), ll.export_peft(model, tmp_path / "b", name="b")
        expected = logits(model)
    assert whole.form == alone.form == "lora" and alone.rank == 8
    assert relative(logits(by_peft(tmp_path / "ab", copy.deepcopy(base))), expected) < 1e-5
    with ll.scale(model, {"a": 0.0, "b": c}):
        expected = logits(model)
    assert relative(logits(by_peft(tmp_path / "b", base)), expected) < 1e-5


def test_dora_away_from_one_is_no_dora_of_pefts(tmp_path: Path) -> None:
    model = tiny_llama()
    attached(model, "dora", target_names=("q_proj",))
    with ll.scale(model, 0.5):
        assert ll.export_peft(model, tmp_path / "out").form == "lora"  # a 32 x 32 layer: its full rank is 32


def test_a_lower_rank_on_request(tmp_path: Path) -> None:
    base, model = tiny_llama(), tiny_llama()
    attached(model, "dora", target_names=("q_proj", "down_proj"), size=0.3)
    done = ll.export_peft(model, tmp_path / "out", rank=4)
    assert done.form == "rank 4" and done.rank == 8 and 0.05 < done.weight_error < 1
    factors = ll.low_rank(model, rank=4)
    assert done.weight_error == max(each.error for each in factors.values())
    error = relative(logits(by_peft(tmp_path / "out", base)), logits(model))
    assert done.agreement.logits is not None and error > 1e-4 and 0.2 < done.agreement.logits / error < 5
    text = (tmp_path / "out" / "README.md").read_text()
    assert f"weight error {done.weight_error:.3g}" in text and "weight error" in str(done)
    assert vllm_refuses(tmp_path / "out", PROJECTIONS) is None


def test_weights_trained_as_well(tmp_path: Path) -> None:
    base, model = tiny_llama(), tiny_llama()
    att = ll.attach(model, ll.LoRAConfig(r=2, target_names=("q_proj",)), train_also=("model.norm", "lm_head"))
    perturb(att.targets.values())
    with torch.no_grad():
        for parameter in att.also.values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    done = ll.export_peft(model, tmp_path / "out")
    assert "modules_to_save" in str(done) and vllm_refuses(tmp_path / "out", PROJECTIONS) == "modules_to_save"
    assert relative(logits(by_peft(tmp_path / "out", base)), logits(model)) < 1e-5
    back = tiny_llama()
    assert set(ll.import_peft(back, tmp_path / "out").also) == {"model.norm.weight", "lm_head.weight"}
    assert relative(logits(back), logits(model)) < 1e-6


@pytest.mark.parametrize("method", ["lora", "pissa", "dora", "antipasto", "road"])
def test_a_base_in_16_bits(method: str, tmp_path: Path) -> None:
    base, model = tiny_llama(torch.bfloat16), tiny_llama(torch.bfloat16)
    attached(model, method, target_names=("q_proj", "v_proj", "down_proj"), size=0.3)
    ll.export_peft(model, tmp_path / "out")
    change = relative(logits(model).float(), logits(base).float())
    error = relative(logits(by_peft(tmp_path / "out", base)).float(), logits(model).float())
    assert change > 0.02 and error < change / 2


@pytest.mark.parametrize("method", ["lora", "antipasto"])
def test_a_base_in_4_bits(method: str, tmp_path: Path) -> None:
    model: Net = net("Linear4bit")
    base, x = copy.deepcopy(model), inputs()
    attached(model, method, [x] * 4, size=0.1)
    ll.export_peft(model, tmp_path / "out", inputs={"x": x})
    with torch.no_grad():
        assert relative(by_peft(tmp_path / "out", base)(x), model(x)) < 1e-3


def test_what_is_not_affine_is_refused(tmp_path: Path) -> None:
    model = tiny_llama()
    attached(model, "sspace", [{"input_ids": token_ids(8, 40, seed=k)} for k in range(4)])
    with pytest.raises(ll.NotAffineError, match="sspace is not affine"):
        ll.export_peft(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_nothing_to_export(tmp_path: Path) -> None:
    model = tiny_llama()
    ll.attach(model, ll.LoRAConfig(r=2))
    with pytest.raises(ll.StateError, match="change nothing"):
        ll.export_peft(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_with_other_files_is_left_alone(tmp_path: Path) -> None:
    model = tiny_llama()
    attached(model, "lora")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ll.CheckpointError, match=r"holds other files \(config.json\)"):
        ll.export_peft(model, tmp_path)
    assert [each.name for each in tmp_path.iterdir()] == ["config.json"]
    ll.export_peft(model, tmp_path / "out")
    ll.export_peft(model, tmp_path / "out")  # again
    with pytest.raises(ll.CheckpointError, match="is a file"):
        ll.export_peft(model, tmp_path / "config.json")


def test_what_peft_computes_otherwise_is_never_written(tmp_path: Path) -> None:
    model = tiny_llama()
    attached(model, "lora", target_names=("q_proj",))
    ll.export_peft(model, tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    key = next(iter(tensors))
    save_file({**tensors, key: 1.01 * tensors[key]}, tmp_path / "out" / "adapter_model.safetensors")
    with pytest.raises(
        ll.StateError, match=r"q_proj: what peft computes of the export differs by .*nothing was written"
    ):
        verify(model, tmp_path / "out", ["default"], None, None)


def test_a_full_rank_beyond_what_servers_take_is_refused(tmp_path: Path) -> None:
    wide = nn.Sequential(nn.Linear(300, 300))
    att = ll.attach(wide, ll.DoRAConfig(r=2, target_roles=()))
    perturb(att.targets.values())
    with (
        ll.scale(wide, 0.5),
        pytest.raises(ll.CheckpointError, match=r"a rank above 256.*give rank=k"),
    ):
        ll.export_peft(wide, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
