"""The calibration pass: what it measures, what it shares and costs, and that it leaves nothing behind."""

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lora_lite as ll
from helpers import OneLayer, anatomy, attached, bits, relative, same_bits, tiny_llama, token_ids
from lora_lite.calibration.collector import calibrate
from lora_lite.calibration.statistics import STATISTICS
from lora_lite.layers.linear import dense

F64 = torch.float64
SHAPES = [(24, 16), (16, 24)]  # (i, o)


def data(i: int, rows: int = 40) -> Tensor:
    return torch.randn(rows, 3, i, dtype=F64, generator=torch.Generator().manual_seed(5)) + 0.2


def direct(model: OneLayer, X: Tensor) -> dict[str, Tensor]:
    """The statistics from stored activations; the contrast is between the first and second half of the prompts."""
    x, y = X.flatten(0, 1), (X @ dense(model.layer).T).flatten(0, 1)
    U = torch.linalg.svd(dense(model.layer), full_matrices=False)[0]
    moment, out = x.T @ x / len(x), y.T @ y / len(y)
    last, mean = (X @ dense(model.layer).T)[:, -1], (X @ dense(model.layer).T).mean(1)
    n = len(X) // 2
    i, o = X.shape[-1], out.shape[0]
    return {
        "input_moment": moment,
        "input_covariance": torch.cov(x.T, correction=0),
        "input_square": moment.diagonal(),
        "output_moment": out,
        "response": out if o <= i else moment,
        "coordinate_abs": (y @ U).abs().mean(0),
        "contrast_last": last[:n].mean(0) - last[n:].mean(0),
        "contrast_mean": mean[:n].mean(0) - mean[n:].mean(0),
    }


@pytest.mark.parametrize(("i", "o"), SHAPES)
def test_every_statistic(i: int, o: int) -> None:
    """Of several batches; y is what W x + b makes, without its bias, and before any adapter's change."""
    model, X = OneLayer(i, o), data(i)
    expected = direct(model, X)
    assert set(expected) == set(STATISTICS)
    attached(model, "lora", name="other", dtype=F64)
    contrast = ll.Contrast([X[:5], X[5:20]], [X[20:]])
    names = frozenset(STATISTICS) - {"response"}  # by itself, below
    found, (tokens, size) = calibrate(model, {"layer": model.layer}, {"layer": names}, contrast)
    assert tokens == 120 and size == sum(
        value.nbytes for sums in (found["layer"].input, found["layer"].output) for value in sums.values.values()
    )
    for name in names:
        assert relative(found["layer"].mean(name), expected[name]) <= 1e-9, name
    found, _ = calibrate(model, {"layer": model.layer}, {"layer": frozenset({"response"})}, [X])
    assert relative(found["layer"].mean("response"), expected["response"]) <= 1e-9


def test_an_attached_adapter_is_in_force_for_what_later_layers_read() -> None:
    model = nn.Sequential(nn.Linear(16, 16, dtype=F64), nn.Linear(16, 16, dtype=F64))
    attached(model, "lora", name="other", dtype=F64, target_names=("0",))
    seen = []
    handle = model[1].register_forward_pre_hook(lambda layer, args: seen.append(args[0].detach()))
    x = data(16)[:, 0]
    att = ll.attach(model, ll.EVAConfig(r=2, dtype=F64, target_roles=(), target_names=("1",)), [x])
    handle.remove()
    vectors = torch.linalg.eigh(seen[0].T @ seen[0]).eigenvectors
    A = att.targets["1"].A.detach()
    assert relative((A @ vectors[:, -2:].flip(1)).abs(), torch.eye(2, dtype=F64)) <= 1e-9


def batches(kind: str, X: Tensor) -> Any:
    pairs = X.split(10)
    return {
        "tensors": lambda: list(pairs),
        "tuples": lambda: [(x,) for x in pairs],
        "lists": lambda: [[x] for x in pairs],
        "dicts": lambda: [{"x": x} for x in pairs],
        "generator": lambda: (x for x in pairs),
        "loader": lambda: DataLoader(TensorDataset(X), batch_size=10),
    }[kind]()


@pytest.mark.parametrize("kind", ["tensors", "tuples", "lists", "dicts", "generator", "loader"])
def test_kinds_of_batch(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    X = data(24)
    adapters = []
    for each in ("tensors", kind):
        cfg = ll.AntiPaSTOCorDAConfig(r=8, target_roles=(), dtype=F64)
        att = ll.attach(OneLayer(24, 16), cfg, batches(each, X))
        adapters.append(att.targets["layer"])
    assert torch.equal(adapters[0].U, adapters[1].U)
    assert "calibrating" in capsys.readouterr().err
    assert att.cost is not None and att.cost.tokens == 120 and att.cost.statistics_bytes == 16 * 16 * 8
    assert set(att.cost.seconds) == {"calibration", "factorisation", "build"} and att.cost.peak_memory_mb > 0
    assert str(att.cost) in att.summary() and "120 tokens" in att.summary()


def test_inputs_are_shared_outputs_are_not() -> None:
    """A sum is taken of a shared input only if a layer that reads it needs it."""
    model = tiny_llama()
    stats, _ = calibrate(
        model,
        layers := {path: m for path, m in model.named_modules() if isinstance(m, nn.Linear) and "layers.0" in path},
        {path: frozenset({"response" if "mlp" in path else "input_moment"}) for path in layers},
        [token_ids()],
    )
    q, k, v, o = (stats[f"model.layers.0.self_attn.{name}_proj"] for name in "qkvo")
    gate, up, down = (stats[f"model.layers.0.mlp.{name}_proj"] for name in ("gate", "up", "down"))
    assert q.input is k.input is v.input and q.input is not o.input and gate.input is up.input
    assert q.eigen("input_moment")[0] is k.eigen("input_moment")[0]
    assert q.output is not k.output
    assert set(gate.input.values) == {"input_moment"} and not gate.output.values  # 32 -> 64: the input is smaller
    assert not down.input.values and set(down.output.values) == {"output_moment"}


def test_autocast_rounds_no_statistic_and_no_basis() -> None:
    """Attached under autocast in bf16: what the layer computes is rounded, what is made of it is not."""
    X, found = data(24).float(), []
    for enabled in (False, True):
        model = OneLayer(24, 16, dtype=torch.float32)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            att = ll.attach(model, ll.AntiPaSTOConfig(r=8, basis="corda:power=1.0", side="input", target_roles=()), [X])
        found.append(att.targets["layer"])
    for key in ("U", "S", "P"):
        assert relative(getattr(found[1], key), getattr(found[0], key)) <= 1e-5, key


@pytest.mark.parametrize("where", ["data", "model"])
def test_a_failure_leaves_everything_as_it_was(where: str) -> None:
    model = tiny_llama().train()
    before, shape = bits(model), anatomy(model)

    def odd() -> Any:
        yield token_ids()
        if where == "data":
            raise ZeroDivisionError
        yield torch.tensor([[10**6]])  # no such token

    with pytest.raises((ZeroDivisionError, IndexError)):
        ll.attach(model, ll.AntiPaSTOCorDAConfig(r=8), odd())
    assert same_bits(before, model) and anatomy(model) == shape


STREAM = """
import resource, sys, torch, lora_lite as ll
model = torch.nn.Sequential(torch.nn.Linear(256, 256))
def batches(count):
    for seed in range(count):
        yield torch.randn(2000, 256, generator=torch.Generator().manual_seed(seed))
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
cfg = ll.AntiPaSTOCorDAConfig(r=64, target_roles=())
ll.attach(model, cfg, batches(5), name="short")
before = peak()
ll.attach(model, cfg, batches(400), name="long")
print(peak() - before)
"""


def test_memory_does_not_grow_with_the_stream() -> None:
    """800,000 tokens, 819 MB if they were kept, in a process of their own."""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", STREAM], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 40  # MB
