"""Models in 4 and 8 bits, through bitsandbytes on the CPU."""

import copy
import sys
from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import _convert_weight_packed_for_cpu
from bitsandbytes.nn import Linear4bit
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from transformers import LlamaForCausalLM

import lora_lite as ll
from lab_helpers import make_llama, save_tiny
from lora_lite.lab.findings.analysis import analyse
from lora_lite.lab.models.load import ModelError, load_model
from lora_lite.lab.provenance import base_fingerprint
from lora_lite.lab.studies.bench import run_study
from lora_lite.lab.studies.study import Study
from lora_lite.lab.training.evaluate import generate
from lora_lite.lab.training.progress import TrainConfig
from lora_lite.layers.packing import forbid_packing


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("quantization", "stored", "bound"), [("4bit", torch.uint8, 0.2), ("8bit", torch.int8, 0.02)])
def test_a_quantised_model_is_near_the_plain_one_and_can_be_adapted(
    quantization: str, stored: torch.dtype, bound: float, dtype: torch.dtype, tmp_path: Path
) -> None:
    folder = save_tiny(tmp_path)
    model, _ = load_model(folder, dtype, quantization=quantization)
    plain, _ = load_model(folder, dtype)
    linear = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert {name for name, module in linear.items() if module.weight.dtype != stored} == {"lm_head"}
    assert model.lm_head.weight.dtype == model.get_input_embeddings().weight.dtype == dtype
    assert not model.training
    ids = torch.randint(0, 256, (3, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        base, exact = model(ids).logits, plain(ids).logits
    assert base.dtype == dtype
    assert 0 < (base - exact).norm() < bound * exact.norm()

    att = ll.attach(model, ll.LoRAConfig(r=4))
    assert len(att.targets) == len(linear) - 1
    with torch.no_grad():
        assert torch.equal(model(ids).logits, base)
    ll.check(model, [{"input_ids": ids}])
    with torch.no_grad():
        for adapter in att.targets.values():
            adapter.B.normal_(generator=torch.Generator().manual_seed(2))
    out = model(ids, labels=ids)
    assert (out.logits - base).norm() > 0.05 * base.norm()
    out.loss.backward()
    gradients = [p.grad for adapter in att.targets.values() for p in adapter.parameters()]
    assert all(grad is not None and grad.isfinite().all() and grad.any() for grad in gradients)
    with ll.disabled(model), torch.no_grad():
        assert torch.equal(model(ids).logits, base)


def test_a_quantised_model_answers(tmp_path: Path) -> None:
    model, tokenizer = load_model(save_tiny(tmp_path), quantization="4bit", device="cpu")
    found = generate(model, tokenizer, [[1, 2, 3], [4]], max_new_tokens=5)
    assert len(found) == 2 and all(count <= 5 for _, count in found)


def test_four_bits_are_nf4_computed_in_the_dtype_asked_for(tmp_path: Path) -> None:
    model, _ = load_model(save_tiny(tmp_path), torch.bfloat16, quantization="4bit")
    layer = model.model.layers[0].mlp.up_proj
    assert layer.weight.quant_state.quant_type == "nf4" and layer.compute_dtype == torch.bfloat16


@pytest.mark.parametrize("quantization", ["5bit", "", "4BIT"])
def test_an_unknown_quantization_names_those_that_there_are(quantization: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=f"one of none, 4bit, 8bit, got '{quantization}'"):
        load_model(str(tmp_path), quantization=quantization)


def test_quantising_without_bitsandbytes_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # what Python itself does for a package that is barred
    with pytest.raises(ModelError, match=r"'8bit' needs bitsandbytes.*pip install 'bitsandbytes>="):
        load_model(str(tmp_path), quantization="8bit")
    assert load_model(save_tiny(tmp_path))[0].dtype == torch.float32  # plain models need none


@pytest.mark.parametrize("quantization", ["4bit", "8bit"])
def test_a_study_on_a_quantised_base(quantization: str, tmp_path: Path) -> None:
    study = Study(
        methods=("lora[r=2],antipasto[r=4]",), model=save_tiny(tmp_path / "model"), quantization=quantization,
        task="gcd", validation_examples=2, test_examples=2, seeds=1, rates=1, general_windows=1, window_tokens=16,
        other_task="", max_new_tokens=2, costs=False, training=TrainConfig(steps=2, batch_size=2),
    )  # fmt: skip
    ledger = run_study(study, tmp_path / "out")
    assert {record["status"] for record in ledger.records()} == {"done"}  # the base's bits stayed, run after run
    found = analyse(tmp_path / "out")
    assert found.quantization == quantization and found.missing == ()


def test_the_print_of_a_quantised_base_follows_its_bits() -> None:
    model = make_llama()
    quantize_(model, Int8WeightOnlyConfig())
    first = base_fingerprint(model)
    assert base_fingerprint(model) == first
    weight = model.model.layers[0].mlp.up_proj.weight
    with torch.no_grad():
        weight.qdata[0, 0] ^= 1
    assert base_fingerprint(model) != first


def test_the_print_of_a_base_is_the_same_once_bitsandbytes_has_packed_it() -> None:
    """As it does on some processors, in the first eval forward."""
    layer = Linear4bit(128, 64, quant_type="nf4").to("cpu")
    model = torch.nn.Sequential(layer)
    first = base_fingerprint(model)
    layer.weight.data, _ = _convert_weight_packed_for_cpu(layer.weight.data, layer.weight.quant_state)
    assert base_fingerprint(model) == first


@pytest.mark.parametrize("keep", [False, True], ids=["for good", "for a while"])
@pytest.mark.parametrize("targets", [(), ("q_proj",)], ids=["all layers", "some layers"])
@pytest.mark.parametrize("quantization", ["4bit", "8bit"])
def test_a_merged_model_reads_back(quantization: str, targets: tuple[str, ...], keep: bool, tmp_path: Path) -> None:
    model, _ = load_model(save_tiny(tmp_path / "base"), quantization=quantization)
    att = ll.attach(model, ll.LoRAConfig(r=2, target_names=targets, target_roles=()))
    for adapter in att.targets.values():
        torch.nn.init.normal_(adapter.B, generator=torch.Generator().manual_seed(1))
    before, flags = copy.deepcopy(model.config.to_dict()), dict(vars(model))
    ll.merge(model, keep=keep)
    ids = torch.randint(0, 256, (2, 8), generator=torch.Generator().manual_seed(1))
    model.save_pretrained(tmp_path / "merged")
    again = LlamaForCausalLM.from_pretrained(tmp_path / "merged").eval()
    forbid_packing(again)
    with torch.no_grad():
        expected = model(ids).logits
        assert (again(ids).logits - expected).norm() <= 1e-5 * expected.norm()
    assert hasattr(model.config, "quantization_config") == bool(targets)
    if keep:
        ll.unmerge(model)
        assert model.config.to_dict() == before and vars(model).keys() == flags.keys()
