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
from helpers import METHODS

import lora_lite as ll

FOLDER = Path(__file__).parent
ALL_PARTS = "steps,rows,coming_and_going,wrapper"


def compiled(*arguments: str) -> dict[str, dict[str, Any]]:
    """What compiled.py measured, by method."""
    environment = {**os.environ, "LORA_LITE_NO_TYPECHECK": "1"}
    done = subprocess.run(
        [sys.executable, "compiled.py", *arguments], cwd=FOLDER, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert lines
    return {line.pop("method"): line for line in lines}


def verify(found: dict[str, dict[str, Any]], parts: str, tolerance: float) -> None:
    for method, measured in found.items():
        assert set(measured) == set(parts.split(","))
        for part, values in measured.items():
            where = f"{method}, {part}: {values}"
            assert max(values["errors"]) <= tolerance, where
            assert values.get("different", True), where
            counts = values.get("counts", [1])
            # (Up to 2: torch may begin again within the first call, when it has seen that a scalar is a tensor.)
            assert counts[0] in (1, 2) and len(set(counts)) == 1, where
            assert values.get("merged", 0.0) < 1e-5, where


def test_every_method() -> None:
    """Ahead-of-time autograd runs eager's own kernels: bitwise."""
    found = compiled("aot_eager", "small", "steps")
    assert list(found) == [method for method in METHODS if ll.variants()[method].trained]
    verify(found, "steps", 0.0)


def test_rows_and_adapters_that_come_and_go() -> None:
    parts = "rows,coming_and_going,wrapper"
    verify(compiled("aot_eager", "small", parts, "lora"), parts, 0.0)


@pytest.mark.slow
def test_every_method_on_a_llama() -> None:
    verify(compiled("aot_eager", "llama", ALL_PARTS), ALL_PARTS, 0.0)


@pytest.mark.slow
def test_inductor() -> None:
    """Its fused kernels add in another order."""
    verify(compiled("inductor", "llama", ALL_PARTS, "lora"), ALL_PARTS, 2e-5)
