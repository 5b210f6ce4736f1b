"""What a new user meets in the first hour: quick help, hints, files of their own, a hub that is silent."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lora_lite as ll
from lora_lite import cli

OWN = """
import dataclasses
import lora_lite as ll

@dataclasses.dataclass(frozen=True)
class MineConfig(ll.AdapterConfig):
    pass

@ll.register(MineConfig, ll.Facts("mine", "My own method", "0000.00000", 1e-3, (1e-4, 1e-2)))
class Mine(ll.methods()["lora"]):
    def __init__(self, cfg, i, o):
        super().__init__(ll.LoRAConfig(r=cfg.r), i, o)
"""


def program(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lora_lite.cli", *arguments]
    env = {**os.environ, **environment}
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, env=env)


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["list", "--help"], ["inspect-file", "--help"]])
def test_help_does_not_wait_for_torch(arguments: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "lora_lite.cli", *arguments],
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0 and "lora" in done.stdout
    assert not [line for line in done.stderr.splitlines() if line.split("|")[-1].strip() in ("torch", "transformers")]


def test_list_fits_80_columns(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["list"]) == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--task", "gcd", "lora", "--rank", "4"], "there is no --rank; did you mean --r?"),
        (["--task", "gcd", "lroa"], "there is no method 'lroa'; did you mean lora?"),
        (
            ["--task", "gcd", "--target-modules", "q_proj", "lora"],
            "there is no --target-modules; did you mean --target-names?",
        ),
        (["lora"], "nothing says what to learn: give --preset demo, or --task"),
    ],
)
def test_hints(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["train", *arguments])
    assert stopped.value.code == 2 and words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--task", "gcd", "--model", "./no-such"], "there is no folder './no-such'"),
        (["--task", "gcd", "--model", __file__], "is a file"),
        (["--task", "data/no-such"], "there is no file or folder 'data/no-such'"),
        (["--task", "no-such.jsonl"], "there is no file or folder 'no-such.jsonl'"),
    ],
)
def test_what_is_missing_is_said_to_be(
    arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["train", "--out", str(tmp_path / "out"), *arguments, "lora"]) == 1
    told = capsys.readouterr().err
    assert words in told and len(told.splitlines()) == 1


@pytest.mark.parametrize("asked", [["--task", "gcd", "--model", "nobody/nothing"], ["--task", "gsm8k"]])
def test_a_silent_hub_is_said_at_once_in_a_line(asked: list[str], tmp_path: Path) -> None:
    done = program(
        "train", *asked, "--out", str(tmp_path / "out"), "lora",
        HF_ENDPOINT="http://127.0.0.1:9", HF_HUB_OFFLINE="0", HF_HOME=str(tmp_path / "hub"),
    )  # fmt: skip
    assert done.returncode == 1
    [line] = done.stderr.strip().splitlines()  # no warning of another package either
    assert "http://127.0.0.1:9 does not answer" in line


def test_the_folder_is_named_for_what_is_asked() -> None:
    from lora_lite.lab.training.config import RunConfig

    spec = r"word_sequence_reversal:drop=^.*comma\.\s*,min_words=3"
    for run, name in (
        (RunConfig(task="a/mine.jsonl", model="Qwen/Qwen3-0.6B"), "runs/mine-lora-Qwen3-0.6B"),
        (RunConfig(task=spec), "runs/word_sequence_reversal-lora-smollm2"),
        (RunConfig(task="jsonl:path=mine.csv,score=numeric"), "runs/mine-lora-smollm2"),
        (RunConfig(task="gcd", out=Path("here")), "here"),
    ):
        assert str(run.named([ll.LoRAConfig()]).out) == name


def test_own_methods_are_known_to_every_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "mine.py"
    path.write_text(OWN)
    assert cli.main(["list", "--json", "--import", str(path)]) == 0
    assert json.loads(capsys.readouterr().out)["mine"]["title"] == "My own method"
    with pytest.raises(SystemExit):
        cli.main(["train", "--import", str(path), "mine", "--help"])
    assert "My own method" in capsys.readouterr().out
    path.write_text("1 / 0")
    assert cli.main(["--import", str(path), "list"]) == 1
    assert "mine.py: ZeroDivisionError" in capsys.readouterr().err
    assert cli.main(["list", "--import", str(tmp_path / "none.py")]) == 1
    assert "there is no such file" in capsys.readouterr().err


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Linear(16, 8), torch.nn.LayerNorm(8))
    ll.attach(model, ll.LoRAConfig(r=2, target_roles=()), train_also=("2.bias",))
    return ll.save(model, tmp_path / "a.safetensors")


def test_inspect_file_tells_what_a_file_holds(adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect-file", str(adapter), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["base"]["name"] == "Sequential" and len(found["base"]["fingerprint"]) == 16
    assert found["trained_values"] == 2 * 2 * (8 + 16) + 8 and found["frozen_values"] == 0 and found["layers"] == 2
    assert found["train_also"] == {"2.bias": [8]} and found["methods"][0]["config"]["r"] == 2
    assert found["targets"] == {"lora r=2 * (8 -> 16)": 1, "lora r=2 * (16 -> 8)": 1}
    assert cli.main(["inspect-file", str(adapter)]) == 0
    told = capsys.readouterr().out
    assert (
        "lora (r = 2)" in told
        and "104 trained" in told
        and "Sequential" in told
        and max(map(len, told.splitlines())) < 200
    )


def test_inspect_file_is_safe_on_damaged_files(adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = adapter.read_bytes()
    damaged = [
        b"",
        whole[:100],
        whole[:-4],
        whole[:-1] + bytes([whole[-1] ^ 1]),
        b"\xff" * 100,
        whole.replace(b"lora", b"lara"),
    ]
    for data in damaged:
        adapter.write_bytes(data)
        assert cli.main(["inspect-file", str(adapter)]) == 1
        told = capsys.readouterr().err
        assert told.startswith("lora-lite: CheckpointError: ") and len(told.splitlines()) == 1
    assert cli.main(["inspect-file", str(adapter.parent / "none")]) == 1
    assert "no adapter file" in capsys.readouterr().err
