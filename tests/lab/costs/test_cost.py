"""Costs: what shapes give is what attaching and saving give, for every method; ratios; peaks; whole measurements."""

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import LlamaConfig

import lora_lite as ll
from lab_helpers import make_llama, save_tiny
from lora_lite.lab.costs import measure
from lora_lite.lab.costs.cost import cost_table, costs, measured_costs, shape_costs
from lora_lite.lab.costs.measure import (
    MeasureError,
    Workload,
    base_step,
    child_peak,
    ratio,
    step_peak,
    take_turns,
    twin_tree,
)
from lora_lite.lab.findings.findings import Cost
from lora_lite.lab.models.base import Base
from lora_lite.lab.numerals import Interval

CPU = torch.device("cpu")
SMALL = Workload(batch_size=2, tokens=8, rounds=3, calibration_batches=2)


def tensor_bytes(path: Path) -> int:
    """Bytes of the tensors in a file, those aside that tell the base's other weights."""
    return sum(tensor.nbytes for key, tensor in load_file(path).items() if key != "base")


@pytest.fixture
def folder(tmp_path: Path) -> str:
    """A tiny model with its tokenizer, as `load_model` reads it."""
    save_tiny(tmp_path / "model")
    return str(tmp_path / "model")


# ---- shapes


@pytest.mark.parametrize("method", ll.methods())
def test_what_shapes_tell_is_what_attaching_and_saving_give(method: str, tmp_path: Path) -> None:
    cfg = ll.methods()[method].tiny()
    model = make_llama()
    row = shape_costs(model, {"arm": [cfg]})["arm"]
    att = ll.attach(model, cfg, SMALL.calibration(model, [cfg]))
    assert (row["trainable"], row["targets"]) == (att.num_trainable, len(att.targets))
    assert row["stored_bytes"] == tensor_bytes(ll.save(model, tmp_path / "whole.safetensors"))
    if row["stored_bytes_without_basis"] is not None:
        bare = tensor_bytes(ll.save(model, tmp_path / "bare.safetensors", basis=False))
        assert row["stored_bytes_without_basis"] == bare < row["stored_bytes"]
    elif next(iter(att.targets.values())).rebuildable:
        with pytest.raises(ll.CheckpointError):
            ll.save(model, tmp_path / "bare.safetensors", basis=False)


def test_a_70b_takes_no_weights() -> None:
    hidden, inner, layers = 8192, 28672, 80
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=64,
        num_key_value_heads=8, vocab_size=128256,
    )  # fmt: skip
    rows = shape_costs(config, {"lora": [ll.LoRAConfig(r=16)], "antipasto": [ll.AntiPaSTOConfig()]})
    kv = hidden // 8
    shapes = 2 * [(hidden, hidden)] + 2 * [(hidden, kv)] + 2 * [(hidden, inner)] + [(inner, hidden)]
    assert rows["lora"]["trainable"] == rows["lora"]["macs_token"] == layers * sum(16 * (i + o) for i, o in shapes)
    assert rows["antipasto"]["trainable"] == layers * len(shapes) * 256
    assert rows["antipasto"]["macs_token"] == layers * sum(256 * (min(i, o) + o) for i, o in shapes)
    linear = layers * sum(i * o for i, o in shapes) + hidden * 128256
    assert linear < rows["lora"]["base_macs_token"] < 1.01 * linear  # the rest is attention


def test_several_configs_are_one_arm_and_a_misfit_does_not_stop_the_others() -> None:
    both = [ll.IA3Config(), ll.IA3FFConfig()]
    arms = {
        "both": both, "ia3": both[:1], "ia3_ff": both[1:], "too large": [ll.PiSSAConfig(r=100)],
        "twice": [ll.LoRAConfig(), ll.DoRAConfig()], "nowhere": [ll.LoRAConfig(target_names=("q_prj",))],
    }  # fmt: skip
    rows = shape_costs(make_llama().config, arms)
    for field in ("trainable", "targets", "stored_bytes"):
        assert rows["both"][field] == rows["ia3"][field] + rows["ia3_ff"][field]
    assert (
        "TargetError" in rows["too large"]["error"] and "r = 100 is larger than the rank" in rows["too large"]["error"]
    )
    assert "selected by two configs" in rows["twice"]["error"] and "near misses: q_proj" in rows["nowhere"]["error"]
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(cost_table(rows))
    text = console.export_text()
    assert f"{rows['both']['trainable']:,}" in text and "nowhere: does not fit: TargetError" in text
    assert "tokens/s" not in text  # nothing was measured


def test_moved_ranks_keep_their_mean() -> None:
    rows = shape_costs(make_llama().config, {str(rho): [ll.EVAConfig(r=2, rho=rho)] for rho in (1.0, 2.0)})
    assert rows["1.0"] == rows["2.0"]


# ---- time


def test_base_and_arm_share_weights_but_not_adapters() -> None:
    base = make_llama()
    ids = SMALL.ids(base)
    before = base(ids).logits
    arm = twin_tree(base)
    att = ll.attach(arm, ll.LoRAConfig(r=2))
    with torch.no_grad():
        for adapter in att.targets.values():
            adapter.B.add_(1.0)
    assert torch.equal(base(ids).logits, before) and not torch.equal(arm(ids).logits, before)
    assert {id(p) for p in base.parameters()} < {id(p) for p in arm.parameters()}


def test_the_bases_step_goes_back_through_every_layer_and_trains_nothing() -> None:
    base = make_llama()
    for p in base.parameters():
        p.requires_grad_(False)
    reached: list[str] = []
    for name, module in base.named_modules():
        if name.endswith("_proj"):
            module.register_full_backward_hook(lambda module, gin, gout, name=name: reached.append(name))
    base_step(base, SMALL.ids(base))
    assert len(reached) == 14 and all(p.grad is None for p in base.parameters())


def test_contestants_take_turns_after_a_warm_up() -> None:
    calls: list[str] = []
    contestants = {name: (lambda name=name: calls.append(name)) for name in "ab"}
    seconds = take_turns(contestants, 3, CPU)
    assert calls == ["a", "b"] * 4 and {name: len(found) for name, found in seconds.items()} == {"a": 3, "b": 3}


def test_a_ratio_is_taken_round_by_round() -> None:
    # The machine is 10 times slower in one round; ratios of sums or of medians would show it.
    assert ratio([2.0, 30.0, 4.0], [1.0, 10.0, 1.0]) == {"mean": 3.0, "low": 2.5, "high": 3.5}
    assert ratio([3.0], [2.0]) == {"mean": 1.5, "low": 1.5, "high": 1.5}


@pytest.mark.parametrize(("field", "value"), [("batch_size", 0), ("tokens", 1), ("rounds", 0)])
def test_a_workload_without_work_is_an_error(field: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"Workload.{field}"):
        Workload(**{field: value})


# ---- memory


@pytest.mark.skipif(not measure.CLEAR.exists(), reason="only Linux can start the peak of resident memory again")
def test_a_peak_is_that_of_the_step_and_not_of_what_came_before() -> None:
    megabytes = 10**6 // 4  # values
    torch.ones(600 * megabytes)
    idle = step_peak(lambda: None, CPU)
    assert idle < step_peak(lambda: torch.ones(600 * megabytes), CPU) - 500
    assert step_peak(lambda: None, CPU) < idle + 200


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["none", "4bit"])
def test_an_arm_measured_from_end_to_end(folder: str, quantization: str) -> None:
    ballast = torch.ones(2**30 // 2)  # 2 GB here, which must not show in the children's peaks
    row = measured_costs(Base(folder, torch.float32, CPU, quantization), [ll.EVAConfig(r=2)], SMALL)
    assert json.loads(json.dumps(row)) == row
    assert 50 < row["base_peak_memory_mb"] < 1900 and 50 < row["peak_memory_mb"] < 1900, ballast.nbytes
    shapes = shape_costs(make_llama(), {"eva": [ll.EVAConfig(r=2)]})["eva"]
    assert row["trainable"] == shapes["trainable"] and row["stored_bytes"] > shapes["stored_bytes"]
    assert set(row["attach_seconds"]) == {"calibration", "factorisation", "build"} and row["load_seconds"] > 0
    known = {key: value for key, value in row.items() if key in Cost.__dataclass_fields__}
    cost = Cost(**{**known, "forward": Interval(**row["forward"]), "step": Interval(**row["step"])})
    assert cost.step is not None and 0.2 < cost.step.low <= cost.step.mean <= cost.step.high < 20
    assert cost.tokens_per_second is not None and cost.tokens_per_second > 1
    assert row["measured_with"]["quantization"] == quantization and row["provenance"]["threads"] == 1


@pytest.mark.slow
def test_a_method_that_is_not_trained_has_no_step(folder: str) -> None:
    arms = {"sspace": [ll.SSpaceConfig()], "pissa": [ll.PiSSAConfig(r=99)]}
    rows: Any = costs(Base(folder, torch.float32, CPU), arms, workload=SMALL)
    assert rows["sspace"]["forward"]["mean"] > 0 and "step" not in rows["sspace"]
    assert rows["sspace"]["peak_memory_mb"] is None and "r = 99" in rows["pissa"]["error"]


@pytest.mark.slow
def test_a_child_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(MeasureError, match=r"ended with code 1: .*(nowhere|To fix it)"):
        child_peak(Base(str(tmp_path / "nowhere"), torch.float32, CPU), SMALL)


@pytest.mark.slow
@pytest.mark.skipif(not measure.STATUS.exists(), reason="Linux's own figures")
def test_what_getrusage_tells_a_child_is_its_parents_memory() -> None:
    """Why `step_peak` reads another figure: if this fails, it need not."""
    ballast = torch.ones(2**30 // 4)
    code = "import resource; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)"
    told = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert told > 1000, ballast.nbytes
