"""The command line, as its user sees it: output, last line, exit code, files."""

import json
from pathlib import Path

import pytest

import lora_lite as ll
from lab_helpers import make_llama, save_tiny, write_rows
from lora_lite import cli
from lora_lite.lab.tasks.catalogue import load_task
from lora_lite.lab.tasks.task import fingerprint

SMALL = ["--task", "gcd", "--train-examples", "16", "--test-examples", "4", "--reload-examples", "2", "--steps", "3"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A local model folder."""
    save_tiny(tmp_path / "model")
    return tmp_path


def train(folder: Path, *flags: str) -> int:
    return cli.main(["train", "--json", "--model", str(folder / "model"), "--out", str(folder / "out"), *SMALL, *flags])


def test_list_names_every_method_with_its_facts(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["list"]) == 0
    table = capsys.readouterr().out
    assert cli.main(["list", "--json"]) == 0
    known = json.loads(capsys.readouterr().out)
    assert known.keys() == ll.methods().keys()
    for name, cls in ll.methods().items():
        assert f"{name} " in table and cls.facts.arxiv in table and known[name]["title"] == cls.facts.title
        assert known[name]["affine"] == cls.facts.affine and known[name]["lr"] == cls.facts.lr


@pytest.mark.parametrize("method", ["lora", "eva", "ia3"])
def test_train_measures_saves_and_ends_with_json(method: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(folder, method) == 0
    printed = capsys.readouterr().out.strip().splitlines()
    summary = json.loads(printed[-1])
    assert 0 <= summary["accuracy_before"] <= 1 and 0 <= summary["accuracy_after"] <= 1
    assert summary["methods"][0]["method"] == method and summary["reloaded_answers_compared"] == 2
    assert summary["training"]["lr"] == ll.methods()[method].facts.lr
    result = json.loads((folder / "out" / "result.json").read_text())
    assert len(result["losses"]) == 3 and len(result["after"]) == 4
    assert result["verifier_failures"] == {"before": 0, "after": 0}
    model = make_llama()
    assert ll.load(model, folder / "out" / "adapter.safetensors").num_trainable == summary["trainable"]
    assert not (folder / "out" / "checkpoints").exists()
    assert printed[-2] == f"talk to it: lora-lite chat {folder / 'out'} --c 1,0"
    assert result["data"]["prompts"] == {"instruction": "Reply with the answer only.", "chat": True}


def test_train_tells_what_was_left_out(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder / "mine.jsonl"
    write_rows(path, [{"question": f"{i}?", "answer": f"{i}" if i % 5 == 0 else ""} for i in range(600)])
    assert train(folder, "--task", str(path), "--max-length", "24", "lora") == 0
    *lines, last = capsys.readouterr().out.strip().splitlines()
    told = " ".join(" ".join(lines).split())
    note = f"480 of 600 rows of {path} left out: without question or answer (480)"
    data = json.loads((folder / "out" / "result.json").read_text())["data"]
    assert data == json.loads(last)["data"] and data["notes"] == [note]
    assert note.replace(" ", "") in told.replace(" ", "")  # a terminal breaks lines where it likes
    kept, too_long = data["tokens"]["kept"], data["tokens"]["too_long"]
    assert kept + too_long == data["examples"]["train"] == 16 and kept and too_long
    assert f"trained on {kept} of 16 examples that were asked for; left out: {too_long} longer than 24 tokens" in told
    task = load_task(str(path))
    assert data["task"] == task.provenance and data["task"]["train"]["left_out"] == {"without question or answer": 480}
    assert data["prints"] == {
        "train": fingerprint(task.examples("train", 16)),
        "test": fingerprint(task.examples("test", 4)),
    }


def test_flags_reach_the_config_wherever_they_stand(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["lora", "--r", "3", "--layers", "1", "--seed", "5", "--lr", "0.01", "--train-also", "lm_head"]
    assert train(folder, *flags) == 0
    summary = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    [method] = summary["methods"]
    assert (method["r"], method["layers"], method["seed"]) == (3, [1], 5)
    assert (summary["training"]["lr"], summary["training"]["seed"]) == (0.01, 5)
    assert summary["trainable"] > make_llama().lm_head.weight.numel()


def test_equal_commands_give_equal_results(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seen = []
    for again in ([], ["--overwrite"]):
        assert train(folder, *again, "lora") == 0
        capsys.readouterr()
        seen.append(
            (
                (folder / "out" / "adapter.safetensors").read_bytes(),
                json.loads((folder / "out" / "result.json").read_text())["losses"],
            )
        )
    assert seen[0] == seen[1]


def test_a_finished_run_is_told_again_and_no_other(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(folder, "lora") == 0
    first = capsys.readouterr().out
    before = {path: path.read_bytes() for path in (folder / "out").iterdir()}
    assert train(folder, "--resume", "lora") == 0
    again = capsys.readouterr()
    assert "is finished" in again.out + again.err
    assert again.out.splitlines()[-1] == first.splitlines()[-1]
    assert first[first.index("held-out items") :].splitlines()[-20:-1] == again.out.splitlines()[-20:-1]
    for other, words in (
        (["--steps", "4", "lora"], "training.steps: 3 there, 4 now"), (["lora", "--r", "2"], "r: 8 there, 2 now"),
        (["dora"], "methods.0.method: 'lora' there, 'dora' now"),
    ):  # fmt: skip
        assert train(folder, "--resume", *other) == 1
        told = capsys.readouterr().err
        assert words in told and "give another --out, or --overwrite" in told and len(told.splitlines()) == 1
    assert {path: path.read_bytes() for path in (folder / "out").iterdir()} == before
    (folder / "out" / "result.json").write_text("{}")
    assert train(folder, "--resume", "lora") == 1
    assert "result.json is damaged, or another version" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "words"),
    [(["lora", "--target-names", "q_prj"], "near misses: q_proj"), (["--task", "gdc", "lora"], "did you mean gcd")],
)
def test_errors_say_what_is_wrong(
    flags: list[str], words: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(folder, *flags) == 1
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "--no-such-flag"], "--no-such-flag"),
        (["train", "lora", "--r", "many"], "many"),
        (["train", "lora", "--r", "0"], "LoRAConfig.r = 0: must be an integer >= 1"),
        (["train", "--steps", "0", "lora"], "TrainConfig.steps = 0"),
        (["train", "--dtype", "float8", "lora"], "must be one of auto"),
        (["what"], "what"),
        ([], "{list,train,generate,chat,export,merge,combine,bench,study,cost,report,inspect-file}"),
    ],
)
def test_flags_that_are_not_understood_exit_with_2(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    assert words in " ".join(capsys.readouterr().err.split())


def test_a_model_that_is_not_there_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--task", "gcd", "--model", "nobody/nothing", "--out", str(tmp_path), "lora"]) == 1
    assert "cannot load a causal language model 'nobody/nothing'" in capsys.readouterr().err


def test_left_over_checkpoints_are_not_overwritten(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "out" / "checkpoints" / "step-2").mkdir(parents=True)
    assert train(folder, "lora") == 1
    assert "give --resume to go on, or another --out" in capsys.readouterr().err


@pytest.mark.parametrize("method", [name for name, cls in ll.methods().items() if cls.facts.trained])
def test_help_explains_every_setting(method: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["train", method, "--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    cls = ll.methods()[method]
    hidden = {*cls.Config.unused, "dtype", "seed"}
    for field in cls.Config().to_dict().keys() - hidden:
        assert f"--{field.replace('_', '-')}" in text


def test_a_method_that_is_not_trained_is_none_to_train(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["train", "sspace"])
    assert stopped.value.code == 2
    assert "sspace is not trained: attach it with calibration_data=ll.Contrast" in capsys.readouterr().err


def test_every_setting_has_a_line_of_help() -> None:
    from lora_lite.lab.commands.flags import field_help

    for cls in ll.methods().values():
        missing = [name for name, text in field_help(cls.Config).items() if not text]
        assert not missing, f"{cls.Config.__name__}: no Args line for {missing}"
