"""torch.compile(fullgraph=True): the same results as eager, and no new compilation when the coefficient changes.

In processes of their own, for fullgraph compilation does not survive the type-checking import hook of conftest.py.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import lora_lite as ll
from helpers import METHODS

FOLDER = Path(__file__).parent


def compiled(*arguments: str, tolerance: float) -> set[tuple[str, str]]:
    """Run compiled.py and verify what it measured. Returns the pairs of method and part."""
    environment = {**os.environ, "LORA_LITE_NO_TYPECHECK": "1"}
    done = subprocess.run(
        [sys.executable, "compiled.py", *arguments], cwd=FOLDER, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    for values in found:
        verify(values, tolerance)
    return {(values["method"], values["part"]) for values in found}


def verify(values: dict[str, Any], tolerance: float) -> None:
    assert max(values["errors"]) <= tolerance, values
    assert values.get("different", True), values
    counts = values.get("counts", [1])
    # Up to 2: torch may begin again within the first call, when it has seen that a scalar is a tensor.
    assert counts[0] in (1, 2) and len(set(counts)) == 1, values
    assert values.get("merged", 0.0) < 1e-5, values


TRAINED = [method for method in METHODS if ll.variants()[method].trained]
REST = ("rows", "coming_and_going", "wrapper", "checkpointed")


def test_every_method() -> None:
    """Ahead-of-time autograd runs eager's own kernels: bitwise."""
    found = compiled("aot_eager", "layer", "steps", f"{','.join(REST)}@lora", tolerance=0.0)
    assert found == {(method, "steps") for method in TRAINED} | {("lora", part) for part in REST}


@pytest.mark.slow
def test_every_method_on_a_llama() -> None:
    assert len(compiled("aot_eager", "llama", "steps,rows", tolerance=0.0)) == 2 * len(TRAINED)


@pytest.mark.slow
def test_inductor() -> None:
    """Its fused kernels add in another order."""
    parts = ",".join(("steps", *REST))
    assert len(compiled("inductor", "layer", f"{parts}@lora", tolerance=1e-5)) == 1 + len(REST)
