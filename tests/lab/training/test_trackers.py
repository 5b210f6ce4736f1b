"""Trackers: what tensorboard's files hold is what the run did; a missing package is said before anything is loaded."""

import importlib.util
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboardX.proto.event_pb2 import Event

import lora_lite as ll
from lab_helpers import make_llama
from lora_lite.lab.training import trackers
from lora_lite.lab.training.loop import learning_rate, train
from lora_lite.lab.training.progress import Progress, TrainConfig
from lora_lite.lab.training.trackers import TrackerError, Trackers, plain, require_trackers
from training_runs import make_items

CPU = torch.device("cpu")


def scalars(folder: Path) -> dict[str, dict[int, float]]:
    """tag -> step -> value, of every event file under a folder."""
    found: dict[str, dict[int, float]] = {}
    for path in sorted(folder.rglob("events.out.tfevents.*")):
        data, at = path.read_bytes(), 0
        while at < len(data):  # a record: its length (8 bytes), a checksum (4), the event, a checksum (4)
            length = int.from_bytes(data[at : at + 8], "little")
            event = Event.FromString(data[at + 12 : at + 12 + length])
            at += 16 + length
            for value in event.summary.value:
                if value.HasField("simple_value"):
                    found.setdefault(value.tag, {})[event.step] = value.simple_value
    return found


def run(folder: Path, steps: int, stop: int | None = None, resume: bool = False) -> Progress:
    """A run, interrupted after step `stop`."""
    model = make_llama()
    ll.attach(model, ll.LoRAConfig(r=2))
    cfg = TrainConfig(steps=steps, batch_size=4, save_every=1, lr=1e-2)
    seen: list[Progress] = []

    def on_step(progress: Progress) -> None:
        tracked.step(progress)
        seen[:] = [progress]
        if progress.step == stop:
            raise KeyboardInterrupt

    with Trackers(["tensorboard"], folder, {"training": {"lr": 1e-2}, "task": "gcd"}, CPU) as tracked:
        try:
            train(model, make_items(), 0, cfg, folder / "checkpoints", resume, on_step=on_step)
        except KeyboardInterrupt:
            return seen[0]
        tracked.finish({"accuracy": 0.25, "seconds": {"train": 2}, "task": "gcd"})
    return seen[0]


def test_tensorboard_gets_the_numbers_of_the_run(tmp_path: Path) -> None:
    progress = run(tmp_path, 4)
    found = scalars(tmp_path)
    assert found["train/loss"] == pytest.approx({k + 1: v for k, v in enumerate(progress.losses)})
    cfg = TrainConfig(steps=4, lr=1e-2)
    assert found["train/learning_rate"] == pytest.approx({k + 1: learning_rate(cfg, 1e-2, k) for k in range(4)})
    assert found["train/gradient_norm"][4] == pytest.approx(progress.grad_norm) and progress.grad_norm > 0
    speeds = found["train/tokens_per_second"]
    assert list(speeds) == [1, 2, 3, 4]
    mean = progress.tokens / progress.seconds
    assert min(speeds.values()) <= mean * 1.01 and max(speeds.values()) >= mean * 0.99
    assert found["final/accuracy"] == {4: 0.25} and found["final/seconds.train"] == {4: 2.0}
    assert "final/task" not in found
    settings = next(tmp_path.rglob("hparams.yml")).read_text()
    assert "task: gcd" in settings and "training.lr: 0.01" in settings


def test_a_resumed_run_goes_on_in_the_same_place(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", 4)
    run(tmp_path / "stopped", 4, stop=2)
    time.sleep(1.1)  # tensorboardX names files by the second; a process that is started again takes longer than that
    resumed = run(tmp_path / "stopped", 4, resume=True)
    assert resumed.losses == whole.losses
    losses = {k + 1: v for k, v in enumerate(whole.losses)}
    assert scalars(tmp_path / "stopped")["train/loss"] == pytest.approx(losses)


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_missing_package_is_said_at_once(name: str, tmp_path: Path) -> None:
    assert importlib.util.find_spec(name) is None, f"{name} is installed: this test needs it to be missing"
    with pytest.raises(TrackerError, match=rf"--report-to {name}: its package is missing; pip install {name}$"):
        require_trackers(["tensorboard", name])
    with pytest.raises(TrackerError, match=name):
        Trackers([name], tmp_path, {}, CPU)
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_tracker_is_an_error() -> None:
    with pytest.raises(TrackerError, match=r"tensorbord: no such tracker; there are tensorboard, wandb, trackio"):
        require_trackers(["tensorbord"])


def test_every_tracker_is_one_that_accelerate_knows() -> None:
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    assert set(trackers.PACKAGES) <= set(LOGGER_TYPE_TO_CLASS)


def test_without_names_nothing_is_written(tmp_path: Path) -> None:
    with Trackers([], tmp_path, {}, CPU) as tracked:
        tracked.step(Progress([1.0], tokens=3, seconds=1.0))
        tracked.finish({"accuracy": 1})
    assert list(tmp_path.iterdir()) == []


def test_settings_become_flat_and_plain() -> None:
    settings: dict[str, Any] = {"run": {"out": Path("x"), "lr": 0.1, "on": True}, "none": None}
    assert plain(settings) == {"run.out": "x", "run.lr": 0.1, "run.on": True, "none": "None"}
