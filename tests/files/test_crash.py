"""kill -9 at random moments of a save: the file is always the old one or a new one, whole.

Run as a program, this file is the process that is killed: `test_crash.py FOLDER ROUNDS` imports torch once, forks
a child for each round, and prints what it found as JSON.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

SIZES = 3  # adapters of different sizes, so that a mixture of two would not even be the right length


def child(folder: Path, models: list[Any]) -> None:
    """Save one adapter after the other into the same file, for ever."""
    import lora_lite as ll

    while True:
        for model in models:
            ll.save(model, folder / "adapter.safetensors")


def killing(folder: Path, rounds: int) -> dict[str, int]:
    """Kill a saving child `rounds` times and look at the file each time."""
    import torch
    from torch import nn

    import lora_lite as ll

    torch.set_num_threads(1)  # no thread pool, which a fork would not survive

    def base() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(512, 512))

    def adapted(rank: int) -> nn.Module:
        model = base()
        ll.attach(model, ll.LoRAConfig(r=rank, seed=rank, target_roles=()))
        return model

    ranks = [64 * (1 + index) for index in range(SIZES)]  # 256 KiB to 768 KiB
    models = [adapted(rank) for rank in ranks]
    path, rng = folder / "adapter.safetensors", random.Random(0)
    start = time.monotonic()
    versions = {ll.save(model, path).read_bytes(): rank for model, rank in zip(models, ranks, strict=True)}
    span = 1.5 * (time.monotonic() - start)  # of a few saves, however fast the disk is
    counts = {"kills": 0, "half_written": 0, "changed": 0, "most_stale": 0}
    last = path.read_bytes()
    for _ in range(rounds):
        pid = os.fork()
        if pid == 0:
            child(folder, models)
        time.sleep(rng.uniform(0.0, span))
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, f"the child ended by itself: {status}"
        counts["kills"] += 1
        data = path.read_bytes()
        assert data in versions, "the file is neither the old one nor a new one"
        att = ll.load(base(), path)
        assert att.targets["0"].A.shape[0] == versions[data]
        stale = list(folder.glob(".adapter.safetensors.*.tmp"))
        counts["half_written"] += bool(stale)
        counts["most_stale"] = max(counts["most_stale"], len(stale))
        counts["changed"] += data != last
        last = data
    ll.save(models[0], path)
    assert [found.name for found in folder.iterdir()] == [path.name], "stale files were left"
    return counts


@pytest.mark.parametrize("rounds", [15, pytest.param(150, marks=pytest.mark.slow)])
def test_killed_while_saving(rounds: int, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, __file__, str(tmp_path), str(rounds)], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout.splitlines()[-1])
    assert counts["kills"] == rounds
    # The kills fell into saves indeed: some left a temporary file, some came after a whole save.
    assert counts["half_written"] >= rounds // 10
    assert counts["changed"] >= rounds // 10
    assert counts["most_stale"] == 1


if __name__ == "__main__":
    print(json.dumps(killing(Path(sys.argv[1]), int(sys.argv[2]))))
