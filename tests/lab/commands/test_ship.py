"""`export` and `merge`: what they write is what the library writes, from the shell; and what is refused."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from torch import Tensor
from transformers import AutoTokenizer, LlamaForCausalLM

import lora_lite as ll
from helpers import perturb, relative
from lab_helpers import make_llama, make_tokenizer
from lora_lite import cli
from lora_lite.lab.models import snapshot
from lora_lite.lab.models.load import load_model

IDS = torch.randint(0, 256, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def run(tmp_path: Path, model: str) -> Path:
    """The folder of a run on the tiny model, which its record names."""
    trained(make_llama(), tmp_path / "run")
    (tmp_path / "run" / "result.json").write_text(json.dumps({"run": {"model": model}}))
    return tmp_path / "run"


def trained(model: Any, folder: Path, cfg: Any = None) -> Path:
    perturb(ll.attach(model, cfg or ll.LoRAConfig(r=4)).targets.values(), 0.1)
    return ll.save(model, folder / "adapter.safetensors")


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[dict[str, Any], str, str]]:
    """A command: (its line of JSON, the words of the rest of its output, its remarks)."""

    def call(*arguments: object, code: int = 0) -> tuple[dict[str, Any], str, str]:
        capsys.readouterr()
        assert cli.main([*map(str, arguments), "--json"]) == code, capsys.readouterr().err
        shown = capsys.readouterr()
        *lines, last = shown.out.splitlines(keepends=True) or [""]
        return json.loads(last or "{}"), " ".join("".join(lines).split()), shown.err

    return call


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def adapted(folder: str | Path, adapter: Path, c: float = 1.0) -> Tensor:
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ll.load(model, adapter)
    with ll.scale(model, c):
        return logits(model)


# ---- export


def test_an_export_is_read_by_peft(command: Callable, run: Path, model: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    said, shown, _ = command("export", run, "--to", "peft", out, "--c", "-0.5", "--dtype", "float32")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(model), str(out))
    assert relative(logits(theirs), adapted(model, run / "adapter.safetensors", -0.5)) < 1e-5
    assert said["form"] == "lora" and said["rank"] == 8 and said["c"] == -0.5 and said["model"] == model
    assert said["agreement"]["logits"] < 1e-5 and "loaded by peft" in shown


def test_an_export_of_full_rank_is_cut_to_a_rank(command: Callable, tmp_path: Path, model: str) -> None:
    adapter = trained(make_llama(), tmp_path, ll.IA3Config(target_names=("k_proj",)))
    flags = ["--to", "peft", "--model", model, "--dtype", "float32"]
    said, shown, _ = command("export", adapter, tmp_path / "out", *flags, "--rank", "2")
    assert said["form"] == "rank 2" and 0 < said["weight_error"] < 1 and "weight error" in shown
    assert command("export", adapter, tmp_path / "own", *flags)[0]["form"] == "IA3"
    words = command("export", adapter, tmp_path, *flags, code=1)[2]
    assert "holds other files" in words


# ---- merge


def test_a_merged_folder_is_read_by_transformers(command: Callable, run: Path, model: str, tmp_path: Path) -> None:
    said, shown, _ = command("merge", model, run, tmp_path / "out", "--c", "0.5")
    merged = LlamaForCausalLM.from_pretrained(tmp_path / "out")
    assert relative(logits(merged), adapted(model, run / "adapter.safetensors", 0.5)) < 1e-5
    assert AutoTokenizer.from_pretrained(tmp_path / "out").eos_token == "<eos>"
    assert said["agreement"]["error"] < 1e-5 < said["agreement"]["change"] and len(said["rounding"]) == 14
    assert "14 layers merged" in shown and "loaded by transformers, its outputs differ by" in shown
    assert command("merge", model, run, tmp_path / "two", "--no-check")[0]["unchecked"] == "not asked for"
    assert "is there already" in command("merge", model, run, tmp_path / "two", code=1)[2]
    assert "was trained on another base model" in command("merge", other(tmp_path), run, tmp_path / "3", code=1)[2]
    assert "there is no folder './nowhere'" in command("merge", "./nowhere", run, tmp_path / "3", code=1)[2]
    assert not (tmp_path / "3").exists() and not list(tmp_path.glob(".*"))


def other(tmp_path: Path) -> Path:
    model = make_llama()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_()
    model.save_pretrained(tmp_path / "other")
    make_tokenizer().save_pretrained(tmp_path / "other")
    return tmp_path / "other"


@pytest.mark.parametrize("weights", ["original", "dequantised"])
@pytest.mark.parametrize("quantization", ["4bit", "8bit"])
def test_what_was_trained_on_a_quantised_base_is_merged_both_ways(
    quantization: str, weights: str, command: Callable, model: str, tmp_path: Path
) -> None:
    base, _ = load_model(model, quantization=quantization)
    adapter = trained(base, tmp_path, ll.LoRAConfig(r=2, target_names=("q_proj", "up_proj")))
    flags = ["--quantization", quantization, "--weights", weights, "--dtype", "float32"]
    said, shown, _ = command("merge", model, adapter, tmp_path / "out", *flags)
    merged, loading = LlamaForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not loading["missing_keys"] and merged.dtype == torch.float32
    assert all(type(module) is torch.nn.Linear for module in merged.modules() if hasattr(module, "in_features"))
    error = said["quantized"]
    assert error["dequantised"] < error["original"] and error["quantization"] == quantization
    assert f"against the {quantization} base with its adapter, outputs differ by" in shown
    found = relative(logits(merged), logits(base))
    assert 0.3 * error[weights] < found + 1e-6 < 3 * error[weights] + 1e-5
    assert AutoTokenizer.from_pretrained(tmp_path / "out").eos_token == "<eos>"
    assert ("agreement" in said) == (weights == "original")


def test_a_model_of_the_hub_is_fetched(
    command: Callable, run: Path, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def fetch(name: str, **options: Any) -> str:
        asked.append((name, options))
        return model

    monkeypatch.setattr(snapshot, "snapshot_download", fetch)
    command("merge", "owner/name", run, tmp_path / "out")
    [(name, options)] = asked
    assert name == "owner/name" and "*.bin" in options["ignore_patterns"]
    assert (tmp_path / "out" / "model.safetensors").is_file()

    def silent(name: str, **options: Any) -> str:
        raise LocalEntryNotFoundError("no network")

    monkeypatch.setattr(snapshot, "snapshot_download", silent)
    words = command("merge", "owner/name", run, tmp_path / "two", code=1)[2]
    assert "no folder of that name, no copy in the hub cache, and HF_HUB_OFFLINE is set" in words


# ---- flags


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["export", "a", "b"], "--to"),
        (["export", "a", "b", "--to", "gguf"], "invalid choice"),
        (["export", "a", "b", "--to", "peft", "--rank", "0"], "rank = 0: must be at least 1"),
        (["merge", "a", "b"], "OUT"),
        (["merge", "a", "b", "c", "--c", "nan"], "c = nan: must be a finite number"),
        (["merge", "a", "b", "c", "--weights", "dequantised"], "none without --quantization"),
    ],
)
def test_flags_that_are_not_understood_exit_with_2(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    assert words in " ".join(capsys.readouterr().err.replace("│", " ").split())


@pytest.mark.parametrize("name", ["export", "merge"])
def test_help_has_examples(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main([name, "--help"])
    told = capsys.readouterr().out
    assert stopped.value.code == 0 and told.count(f"    lora-lite {name} ") >= 3


@pytest.mark.slow
def test_the_embedded_model_is_merged(smollm: Any, command: Callable, tmp_path: Path) -> None:
    model, tokenizer = smollm
    names = ("model.layers.0.mlp.down_proj", "model.layers.29.self_attn.q_proj")
    adapter = trained(model, tmp_path, ll.LoRAConfig(r=4, target_names=names))
    expected = logits(model)
    ll.detach(model)
    said = command("merge", "smollm2", adapter, tmp_path / "out")[0]
    merged = LlamaForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert relative(logits(merged), expected) < 1e-2 and said["left_out"] == ["checksums.json"]
    assert AutoTokenizer.from_pretrained(tmp_path / "out").vocab_size == tokenizer.vocab_size
