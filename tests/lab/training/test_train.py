"""The training loop: its schedule, its sums, and that an interrupted run ends with the bits of a whole one."""

import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from two_processes import CASES, trained

import lora_lite as ll
from lab_helpers import make_llama
from lora_lite.lab.training.loop import TrainingError, last_checkpoint, learning_rate, train
from lora_lite.lab.training.progress import TrainConfig
from training_runs import CONFIG, make_items, run


@pytest.mark.parametrize(
    ("step", "expected"),
    [(0, 0.5), (1, 1.0), (2, 1.0), (6, 0.1 + 0.9 * 0.5), (9, 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 7 / 8)))],
)
def test_the_learning_rate_rises_and_follows_a_cosine(step: int, expected: float) -> None:
    assert learning_rate(TrainConfig(steps=10, warmup=0.2, final_lr=0.1), 1.0, step) == pytest.approx(expected)


def test_training_lowers_the_loss_and_touches_the_adapter_alone() -> None:
    model = make_llama()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    ll.attach(model, ll.LoRAConfig(r=8))
    progress = train(model, make_items(4), 0, TrainConfig(steps=30, batch_size=4, lr=2e-2, save_every=0))
    assert progress.losses[-1] < 0.9 * progress.losses[0]
    assert progress.tokens == 30 * sum(map(len, make_items(4)))
    base = ll.base_state_dict(model)
    assert base.keys() == before.keys() and all(torch.equal(value, base[key]) for key, value in before.items())


def test_accumulation_gives_the_step_of_the_whole_batch() -> None:
    (whole, _), (parts, _) = (run(None, accumulation=n, steps=1, batch_size=8) for n in (1, 4))
    assert parts[0] == pytest.approx(whole[0], rel=1e-5)


@pytest.mark.slow
def test_two_processes_take_the_steps_of_one(tmp_path: Path) -> None:
    """Each answer token of a batch weighs the same, whichever process reads it; so says each process's loss too."""
    program = Path(__file__).parent / "two_processes.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(program)]
    env = {**os.environ, "LORA_LITE_NO_TYPECHECK": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, str(tmp_path)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    for case in CASES:
        alone = trained(case)
        for rank in range(2):
            found = load_file(tmp_path / f"{case}-{rank}.safetensors")
            assert found.keys() == alone.keys()
            for key, value in alone.items():
                torch.testing.assert_close(found[key], value, rtol=1e-4, atol=2e-6, msg=f"{case} {rank} {key}")


@pytest.mark.slow
def test_a_run_killed_and_resumed_ends_with_the_same_bits(tmp_path: Path) -> None:
    losses, tensors = run(tmp_path / "whole")
    script = (
        "import sys, pathlib; sys.path.insert(0, sys.argv[1]); import training_runs\n"
        "training_runs.run(pathlib.Path(sys.argv[2]), resume=True)\n"
    )
    folder = tmp_path / "killed"
    command = [sys.executable, "-c", script, str(Path(__file__).parent), str(folder)]
    child = subprocess.Popen(command, env={**os.environ, "LORA_LITE_NO_TYPECHECK": "1", "OMP_NUM_THREADS": "1"})
    while last_checkpoint(folder) is None and child.poll() is None:
        pass
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    stopped = last_checkpoint(folder)
    assert stopped is not None
    threads = torch.get_num_threads()
    resumed_losses, resumed = run(folder, resume=True)
    assert torch.get_num_threads() == threads
    assert resumed.keys() == tensors.keys()
    assert resumed_losses == losses
    assert all(torch.equal(resumed[key], value) for key, value in tensors.items())


def test_resuming_from_the_middle_ends_with_the_same_bits(tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def stop_at_seven(progress: object) -> None:
        if progress.step == 7:  # type: ignore[attr-defined]
            raise Stop

    losses, tensors = run(None)
    model = make_llama()
    ll.attach(model, CONFIG)
    cfg = TrainConfig(steps=12, batch_size=4, save_every=3, lr=1e-2)
    with pytest.raises(Stop):
        train(model, make_items(), 0, cfg, tmp_path, on_step=stop_at_seven)
    found = last_checkpoint(tmp_path)
    assert found is not None and found.name == "step-6"
    torch.manual_seed(12345)
    resumed_losses, resumed = run(tmp_path, resume=True, save_every=5)  # how often it writes does not matter
    assert resumed_losses == losses
    assert all(torch.equal(resumed[key], value) for key, value in tensors.items())


def test_only_the_last_checkpoint_is_kept_and_nothing_in_it_is_pickled(tmp_path: Path) -> None:
    run(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step-12"]
    assert sorted(path.name for path in (tmp_path / "step-12").iterdir()) == [
        "adapter.safetensors", "optimizer.safetensors", "progress.json",
    ]  # fmt: skip
    assert "rng" in load_file(tmp_path / "step-12" / "optimizer.safetensors")


def test_a_checkpoint_of_other_settings_is_refused(tmp_path: Path) -> None:
    run(tmp_path)
    with pytest.raises(TrainingError, match="other settings or data"):
        run(tmp_path, resume=True, lr=2e-2)


def test_a_loss_that_is_not_finite_stops_the_run() -> None:
    model = make_llama()
    att = ll.attach(model, CONFIG)
    with torch.no_grad():
        next(iter(att.targets.values())).B.fill_(float("inf"))
    with pytest.raises(TrainingError, match="loss is nan"):
        train(model, make_items(), 0, TrainConfig(steps=1))


def test_an_adapter_that_never_runs_stops_the_run() -> None:
    model = make_llama()
    model.unused = torch.nn.Linear(8, 8)
    ll.attach(model, ll.LoRAConfig(r=2, target_roles=()))
    with pytest.raises(TrainingError, match="never ran, such as unused"):
        train(model, make_items(), 0, TrainConfig(steps=1))


@pytest.mark.parametrize(
    ("field", "value"),
    [("steps", 0), ("batch_size", 0), ("warmup", 1.5), ("clip", 0.0), ("lr", -1.0), ("accumulation", 3), ("seed", -1)],
)
def test_bad_settings_are_errors(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=field):
        TrainConfig(**{field: value})  # type: ignore[arg-type]
