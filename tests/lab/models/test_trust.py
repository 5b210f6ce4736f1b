"""Code that a model brings along runs where --trust-remote-code is given, in every command, and nowhere else."""

import json
from pathlib import Path

import pytest
from transformers import dynamic_module_utils

from lab_helpers import save_tiny
from lora_lite import cli
from lora_lite.lab.commands.commands import BenchFlags, CostFlags
from lora_lite.lab.studies.study import Study
from lora_lite.lab.training.config import RunConfig

OWN = """
from transformers import LlamaConfig, LlamaForCausalLM
open({ran!r}, "w").close()
class OwnConfig(LlamaConfig):
    model_type = "own"
class Own(LlamaForCausalLM):
    config_class = OwnConfig
"""
BENCH = [
    "--task", "gcd", "--validation-examples", "4", "--test-examples", "4", "--seeds", "1", "--rates", "1", "--steps",
    "1", "--batch-size", "2", "--general-windows", "0", "--other-task", "", "--max-new-tokens", "4", "--no-costs",
    "--no-page",
]  # fmt: skip
TRAIN = [
    "--task", "gcd", "--train-examples", "4", "--test-examples", "2", "--reload-examples", "1", "--steps", "1",
]  # fmt: skip
COMMANDS = {
    "train": ["train", *TRAIN, "lora"],
    "probe": ["train", "--probe", *TRAIN, "lora"],
    "bench": ["bench", *BENCH, "--methods", "lora"],
    "study": ["study", "rotation_axis", "--smoke", *BENCH, "--methods", "lora", "--baseline", "lora", "--layers", "0"],
    "shapes": ["cost", "--shapes", "--methods", "lora"],
}


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model's folder with code of its own; the file "ran" beside it tells that the code ran."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    folder = tmp_path / "model"
    save_tiny(folder)
    path = folder / "config.json"
    auto = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own"}
    path.write_text(json.dumps({**json.loads(path.read_text()), "auto_map": auto, "model_type": "own"}))
    (folder / "own.py").write_text(OWN.format(ran=str(tmp_path / "ran")))
    return folder


@pytest.mark.parametrize("name", COMMANDS)
def test_a_models_own_code_runs_only_where_it_is_asked_for(
    name: str, own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = COMMANDS[name]
    out = [] if name == "shapes" else ["--out", str(tmp_path / "out")]
    flags = ["--model", str(own), *out]
    place = 2 if name == "study" else 1
    asked = [*command[:place], *flags, *command[place:]]
    assert cli.main(asked) == 1
    told = capsys.readouterr().err
    assert "--trust-remote-code" in told and "code of its own" in told
    assert not (tmp_path / "ran").exists()
    assert cli.main([*asked[:place], "--trust-remote-code", *asked[place:]]) == 0
    assert (tmp_path / "ran").exists()


def test_it_is_off_unless_given() -> None:
    assert not any(found.trust_remote_code for found in (RunConfig(), Study(), BenchFlags().study, CostFlags()))


@pytest.mark.parametrize("command", [["train", "lora"], ["bench"], ["study", "methods"], ["cost"]])
def test_every_command_explains_it_alike(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main([*command, "--help"])
    told = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "--trust-remote-code" in told and "give it for models whose code you have read" in told
