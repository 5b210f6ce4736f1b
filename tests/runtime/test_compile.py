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


TRAINED = [method for method in METHODS if ll.methods()[method].facts.trained]
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


DISABLED = """
import pytest, torch, torch._dynamo
import lora_lite as ll

class Headed(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = torch.nn.Linear(8, 8), torch.nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.body(x).relu())

model, x = Headed(), torch.randn(2, 8)
base = model(x)
ll.attach(model, ll.LoRAConfig(r=2, target_names=("body",)), train_also=("head",))
with torch.no_grad():
    model.head.weight.add_(1.0)
# Under fullgraph torch wraps what is raised while it traces.
for fullgraph, refusal in ((True, torch._dynamo.exc.Unsupported), (False, ll.StateError)):
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=fullgraph)
    y = compiled(x)
    with ll.scale(model, 0):
        assert torch.equal(compiled(x), y)
    with ll.disabled(model):
        assert torch.equal(model(x), base)
        with pytest.raises(refusal, match="disabled: a compiled model reads the weights that 'default' trains"):
            compiled(x)
    assert torch.equal(compiled(x), y)
model.head.compile(backend="eager")
with pytest.raises(ll.StateError, match="head is compiled and trained as well"):
    ll.disabled(model)
"""


@pytest.mark.slow
def test_compiled_code_is_refused_where_it_would_be_the_base_with_trained_weights() -> None:
    subprocess.run([sys.executable, "-W", "ignore", "-c", DISABLED], cwd=FOLDER, check=True, timeout=300)
