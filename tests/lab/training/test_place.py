"""The folder of a run: what may be resumed and overwritten, damaged checkpoints, full disks, and two runs at once."""

import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import lora_lite as ll
import training_runs
from lab_helpers import make_llama
from lora_lite.lab.errors import RunError
from lora_lite.lab.folders import make_folder
from lora_lite.lab.locks import hold
from lora_lite.lab.models.devices import pick_device
from lora_lite.lab.training import checkpoints
from lora_lite.lab.training.checkpoints import CheckpointWriteError, last_checkpoint
from lora_lite.lab.training.config import RunConfig
from lora_lite.lab.training.loop import train
from lora_lite.lab.training.place import Place
from lora_lite.lab.training.progress import TrainConfig


def made(out: Path, *names: str) -> None:
    for name in names:
        path = out / name
        path.mkdir(parents=True) if name.startswith("checkpoints") else (out.mkdir(exist_ok=True), path.touch())


@pytest.mark.parametrize(
    ("there", "flags", "words"),
    [
        ((), {"resume": True}, "nothing to resume; look at --out"),
        (("result.json", "adapter.safetensors"), {"resume": True}, "holds a finished run"),
        (("result.json", "checkpoints/step-3"), {"resume": True}, "holds a finished run"),
        (("result.json", "adapter.safetensors"), {}, "holds a finished run.*give another --out"),
        (("adapter.safetensors",), {}, "holds an adapter.*give another --out"),
        (("checkpoints/step-3",), {}, "give --resume to go on"),
        (("checkpoints/step-3",), {"resume": True}, ""),
        (("result.json", "checkpoints/step-3"), {"overwrite": True}, ""),
        ((), {}, ""),
    ],
)
def test_which_folders_a_run_may_use(there: tuple[str, ...], flags: dict, words: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    made(out, *there)
    place = Place(out, **{"resume": False, "overwrite": False, **flags})
    if words:
        with pytest.raises(RunError, match=words):
            place.require_fit()
        assert out.exists() == bool(there)
    else:
        place.require_fit()
        with place.taken(), pytest.raises(RunError, match=rf"another run .*process {os.getpid()} on"), place.taken():
            raise AssertionError("two runs in one folder")


def test_a_lock_is_free_when_its_process_is_killed(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    source = (
        "import sys, time, pathlib; from lora_lite.lab.locks import hold\n"
        "with hold(pathlib.Path(sys.argv[1])) as holder:\n    print(repr(holder), flush=True); time.sleep(600)\n"
    )
    other = subprocess.Popen([sys.executable, "-c", source, str(path)], stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None
    with other, other.stdout:
        try:
            assert other.stdout.readline() == "''\n"
            with hold(path) as holder:
                assert f"process {other.pid} on" in holder
        finally:
            other.send_signal(signal.SIGKILL)
    with hold(path) as holder:
        assert holder == ""


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


DAMAGES: list[Callable[[Path], object]] = [
    cut,
    Path.unlink,
    lambda path: path.write_bytes(b""),
    lambda path: path.write_bytes(b"\0" * path.stat().st_size),
    lambda path: path.write_bytes(b"[]"),
]


@pytest.mark.parametrize("name", [checkpoints.ADAPTER, checkpoints.OPTIMIZER, checkpoints.PROGRESS])
def test_a_damaged_checkpoint_is_discarded_and_said_to_be(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    training_runs.run(tmp_path / "whole", steps=4, save_every=2)
    for number, damage in enumerate(DAMAGES):
        folder = tmp_path / str(number)
        shutil.copytree(tmp_path / "whole", folder)
        damage(folder / "step-4" / name)
        assert last_checkpoint(folder) is None and not list(folder.iterdir())
        assert "is damaged" in "".join(capsys.readouterr())
    cut((tmp_path / "whole") / "step-4" / name)
    resumed, fresh = (training_runs.run(folder, steps=4, resume=True)[0] for folder in (tmp_path / "whole", None))
    assert resumed == fresh


def test_a_full_disk_at_a_checkpoint_is_a_sentence_and_keeps_the_one_before(tmp_path: Path) -> None:
    training_runs.run(tmp_path, steps=2, save_every=2)
    before = {path: path.read_bytes() for path in (tmp_path / "step-2").iterdir()}
    former = resource.getrlimit(resource.RLIMIT_FSIZE)
    largest = max(map(len, before.values()))
    for size in (largest // 2, largest - 1):
        model = make_llama()
        ll.attach(model, training_runs.CONFIG)
        cfg = TrainConfig(steps=1, batch_size=4, save_every=1)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, former[1]))
        try:
            with pytest.raises(CheckpointWriteError, match=r"step 1 cannot be written \(File too large\); step-2 is"):
                train(model, training_runs.make_items(), 0, cfg, tmp_path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, former)
        assert {path.name for path in tmp_path.iterdir()} == {"step-2"}
        assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize("device", ["foo", "cuda:99", "meta", "cpu:x", "cuda:-1"])
def test_a_device_that_is_not_here_is_a_sentence(device: str) -> None:
    with pytest.raises(RunError, match=f"--device {device}: cannot be used here"):
        pick_device(device)


def test_a_home_folder_in_flags(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert RunConfig(out=Path("~/runs")).out == tmp_path / "runs"


@pytest.mark.parametrize("below", ["file/out", "n" * 300])
def test_a_folder_that_cannot_be_made_is_a_sentence(below: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match=r"cannot write to .*(Not a directory|File name too long)\): give another --out"):
        place = Place(tmp_path / below, resume=False, overwrite=False)
        place.require_fit()
        with place.taken():
            raise AssertionError("a folder in a file")
    with pytest.raises(RunError, match=r"cannot write to /proc/x \(No such file or directory\)"):
        make_folder(Path("/proc/x"))
    with pytest.raises(RunError, match=r"cannot write to /proc/.lock"), hold(Path("/proc/.lock")):
        raise AssertionError("a lock in /proc")
