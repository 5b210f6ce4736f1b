"""Two processes on the CPU: calibration adds up, tensors and gradients agree, and `check` sees when they do not."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import lora_lite as ll
from helpers import tiny_llama, token_ids

HERE = Path(__file__).parent


@pytest.mark.slow
def test_two_processes_over_gloo(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    env = {**os.environ, "LORA_LITE_NO_TYPECHECK": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(HERE / "distributed.py"), str(tmp_path)], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]

    alone_words = (tmp_path / "alone-0.txt").read_text()
    assert "attach was called by process 0, but not within 2 s by [1]" in alone_words
    assert not (tmp_path / "alone-1.txt").exists()
    for rank in range(2):
        assert f"process {rank} attaches 'default': LoRAConfig" in (tmp_path / f"different-{rank}.txt").read_text()

    assert (tmp_path / "eva-0.safetensors").read_bytes() == (tmp_path / "eva-1.safetensors").read_bytes()
    alone = tiny_llama()
    att = ll.attach(alone, ll.EVAConfig(r=4), [{"input_ids": token_ids(seed=10 + rank)} for rank in range(2)])
    together = load_file(tmp_path / "eva-0.safetensors")
    for path, adapter in att.targets.items():
        torch.testing.assert_close(together[f"{path}.lora.A"], adapter.A.detach(), rtol=1e-4, atol=1e-5)

    assert (tmp_path / "trained-0.safetensors").read_bytes() == (tmp_path / "trained-1.safetensors").read_bytes()
    trained = load_file(tmp_path / "trained-0.safetensors")
    assert all(trained[f"{path}.lora.B"].any() for path in att.targets)

    for rank in range(2):
        assert "gradients differ between processes" in (tmp_path / f"refused-{rank}.txt").read_text()
