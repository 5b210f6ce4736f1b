"""What cannot be merged into a folder is refused in a sentence, and nothing is left of it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import lora_lite as ll
from helpers import tiny_llama
from lora_lite.interop import merged_folder, merged_logits
from lora_lite.interop.merged_folder import merge_folder
from model_folders import HEAD, LORA, SHARD, adapter_of, files, in_memory, make, read, same, saved


def another(base: Path) -> None:
    """Another base, of the same architecture."""
    model = tiny_llama(seed=1)
    saved(model, base.parent / "another")
    shutil.rmtree(base)
    (base.parent / "another").rename(base)


def another_norm(base: Path) -> None:
    """A base that differs in a parameter that no adapter acts on."""
    model = read(base)
    with torch.no_grad():
        model.model.norm.weight.normal_()
    model.save_pretrained(base, max_shard_size=SHARD)


def pickled(base: Path) -> None:
    for path in base.glob("*.safetensors*"):
        path.unlink()


def cut_off(base: Path) -> None:
    path = sorted(base.glob("*.safetensors"))[1]
    path.write_bytes(path.read_bytes()[:-1])


def edit(name: str, change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def edited(base: Path) -> None:
        read = json.loads((base / name).read_text())
        change(read)
        (base / name).write_text(json.dumps(read))

    return edited


INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize(
    ("spoil", "error", "words"),
    [
        (another, ll.BaseMismatchError, "another base model; worst layer .*give the model that it was trained on"),
        (another_norm, ll.BaseMismatchError, "model.norm.weight, which the file does not hold, has other values"),
        (pickled, ll.CheckpointError, "pytorch_model.bin: is a pickle, which can run any code"),
        (cut_off, ll.CheckpointError, "is no whole safetensors file"),
        (lambda base: (base / "config.json").unlink(), FileNotFoundError, "no model at .*config.json"),
        (lambda base: (base / "config.json").write_text("["), ll.CheckpointError, "config.json: is no JSON"),
        (lambda base: [pickled(base), (base / "pytorch_model.bin").unlink()], FileNotFoundError, "no weights"),
        (edit(INDEX, lambda index: index.pop("weight_map")), ll.CheckpointError, "has no weight_map"),
        (edit(INDEX, lambda i: i["weight_map"].update(x="../x")), ll.CheckpointError, "is no file beside it"),
        (
            edit(INDEX, lambda i: i["weight_map"].update({"x": next(iter(i["weight_map"].values()))})),
            ll.CheckpointError, "names x, which is not there",
        ),
        (
            edit("config.json", lambda config: config.update(quantization_config={})),
            ll.CheckpointError, "its weights are quantised",
        ),
        (
            edit("config.json", lambda config: config.update(architectures=["GPT2LMHeadModel"], model_type="gpt2")),
            ll.CheckpointError, "has no linear layer|fits another architecture",
        ),
        (
            edit("config.json", lambda config: config.update(num_hidden_layers=1)),
            ll.CheckpointError, "the model has no linear layer model.layers.1",
        ),
        (
            edit("config.json", lambda config: config.update(model_type="no-such")),
            ll.CheckpointError, "transformers makes no LlamaForCausalLM of it",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_merged_is_a_sentence_and_leaves_nothing(
    spoil: Callable[[Path], Any], error: type[Exception], words: str, tmp_path: Path
) -> None:
    base = saved(tiny_llama(), tmp_path / "base")
    adapter = adapter_of(base, LORA)
    spoil(base)
    with pytest.raises(error, match=words):
        merge_folder(base, adapter, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter.safetensors"}


def test_a_weight_that_transformers_converts_as_it_reads_is_refused(tmp_path: Path) -> None:
    base = saved(make("vit"), tmp_path / "base")
    adapter = adapter_of(base, LORA)
    with pytest.raises(ll.CheckpointError, match=r"hold no vit\.layers\.0.*; merge it in memory instead: ll.load"):
        merge_folder(base, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_bias_that_the_architecture_has_no_place_for_is_refused(tmp_path: Path) -> None:
    base = saved(tiny_llama(), tmp_path / "base")
    adapter = adapter_of(base, ll.LoRAConfig(r=2, bias=True))
    with pytest.raises(ll.CheckpointError, match="changes its bias, and the architecture has no place for one"):
        merge_folder(base, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_holds_files_is_left_alone_and_an_empty_one_is_used(tmp_path: Path) -> None:
    base = saved(tiny_llama(), tmp_path / "base")
    adapter = adapter_of(base, LORA)
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    with pytest.raises(ll.CheckpointError, match="is there already and holds files"):
        merge_folder(base, adapter, out)
    assert files(out) == {"mine.txt"}
    (out / "mine.txt").unlink()
    assert merge_folder(base, adapter, out, check=False).unchecked == "not asked for"
    assert same(read(out), in_memory(base, adapter))
    with pytest.raises(ll.CheckpointError, match="is a file"):
        merge_folder(base, adapter, adapter)


@pytest.mark.parametrize("step", ["copy_folder", "fold_layers", "add_tensors", "compare_folders"])
def test_ctrl_c_leaves_nothing(step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = saved(make("llama", tie_word_embeddings=True), tmp_path / "base")
    adapter = adapter_of(base, HEAD)
    real = getattr(merged_folder, step)

    def interrupted(*args: Any) -> None:
        real(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(merged_folder, step, interrupted)
    with pytest.raises(KeyboardInterrupt):
        merge_folder(base, adapter, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter.safetensors"}


def test_a_folder_that_computes_something_else_is_not_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = saved(tiny_llama(), tmp_path / "base")
    adapter = adapter_of(base, LORA)
    with monkeypatch.context() as patched:
        patched.setattr(merged_folder.SafetensorsFolder, "write", lambda *args: None)
        with pytest.raises(ll.StateError, match="computes something else than base and adapter: outputs differ by"):
            merge_folder(base, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(merged_logits, "available_bytes", lambda: 1e3)
    assert "GB, and 0.0 are free" in merge_folder(base, adapter, tmp_path / "out").unchecked
