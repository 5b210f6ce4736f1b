"""A run that was stopped goes on with `resume`, to the bits of one that was not; and with no other method."""

from dataclasses import replace
from pathlib import Path

import pytest

import lora_lite as ll
from lora_lite.lab.training import run as runs
from lora_lite.lab.training.config import RunConfig
from lora_lite.lab.training.progress import Progress, TrainConfig
from lora_lite.lab.training.trackers import Trackers


def test_a_stopped_run_goes_on_to_the_same_bits(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"train_examples": 16, "test_examples": 4, "reload_examples": 2}
    run = RunConfig(model=model, task="gcd", dtype="float32", device="cpu", out=tmp_path / "whole", **sizes)
    training = TrainConfig(steps=4, batch_size=4, save_every=1)
    whole = runs.finetune(run, ll.LoRAConfig(r=2), training)

    def stop(self: Trackers, progress: Progress) -> None:
        if progress.step == 2:
            raise KeyboardInterrupt

    stopped = replace(run, out=tmp_path / "stopped")
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Trackers, "step", stop)
        runs.finetune(stopped, ll.LoRAConfig(r=2), training)
    with pytest.raises(ll.LoraLiteError):
        runs.finetune(replace(stopped, resume=True), ll.DoRAConfig(r=2), training)
    resumed = runs.finetune(replace(stopped, resume=True), ll.LoRAConfig(r=2), training)
    assert resumed.progress.losses == whole.progress.losses and resumed.after.records == whole.after.records
    assert not (tmp_path / "stopped" / "checkpoints").exists()
    assert {*resumed.summary["seconds"]} == {
        "load", "evaluate_before", "attach", "train", "evaluate_after", "reload",
    }  # fmt: skip
