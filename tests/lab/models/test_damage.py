"""A folder that holds no whole model: one line that names the file, and nothing about a network."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from lab_helpers import save_tiny
from lora_lite.lab.models.embedded import ModelError
from lora_lite.lab.models.load import load_model


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("name", "damage", "words"),
    [
        ("model.safetensors", cut, "model.safetensors is damaged or cut off"),
        ("model.safetensors", Path.unlink, "it has no weights (model.safetensors)"),
        ("config.json", Path.unlink, "config.json is missing"),
        ("config.json", cut, "config.json is damaged"),
        ("tokenizer.json", cut, "tokenizer.json is damaged"),
        ("tokenizer.json", lambda path: path.write_text('{"model": 3}'), "tokenizer.json is damaged"),
        ("tokenizer_config.json", lambda path: path.write_text("[]"), "tokenizer_config.json is damaged"),
    ],
)
def test_the_damaged_file_is_named(name: str, damage: Callable[[Path], object], words: str, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path)
    damage(tmp_path / name)
    with pytest.raises(ModelError, match=re.escape(words)) as caught:
        load_model(folder)
    told = str(caught.value)
    assert "\n" not in told and "network" not in told and "hub" not in told


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    index = '{"metadata": {}, "weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}'
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ModelError, match=r"model-00001-of-00002\.safetensors is missing"):
        load_model(folder)
