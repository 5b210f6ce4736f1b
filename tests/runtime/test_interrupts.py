"""Law 4 under Ctrl-C: interrupted at any line (its first time or its last), an operation is done
wholly or not at all."""

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_lite as ll
from helpers import anatomy, bits, calibration, perturb, same_bits, tiny

READ_ONLY = ("targets.py", "linear.py", "config.py", "stats.py", "cost.py", "basis.py", "contrast.py")
SOURCES = {str(path) for path in Path(ll.__file__).parent.rglob("*.py") if path.name not in READ_ONLY}
X = torch.randn(5, 10, generator=torch.Generator().manual_seed(0))


class Tiny(nn.Module):
    """Two layers to adapt, a norm with running averages, and a head to train beside."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first, self.bn, self.second = nn.Linear(10, 12), nn.BatchNorm1d(12), nn.Linear(12, 10)
            self.head = nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.bn(self.first(x))))


def bare() -> Tiny:
    model = Tiny().eval()
    model.bn.weight.requires_grad_(False)
    return model


def adapted(method: str) -> Tiny:
    model = bare()
    cfg = tiny(method, target_names=("first", "second"))
    att = ll.attach(model, cfg, calibration(cfg, [X]), train_also=("head",))
    perturb(att.targets.values())
    with torch.no_grad():
        model.head.weight += 1
        model.bn.running_mean += 1  # type: ignore[operator]
    return model


def merged(method: str) -> Tiny:
    model = adapted(method)
    ll.merge(model)
    return model


def _attach(model: nn.Module, method: str, file: Path) -> None:
    cfg = tiny(method, target_names=("first", "second"))
    ll.attach(model, cfg, calibration(cfg, [X]), train_also=("head",))


OPERATIONS: dict[str, tuple[Callable[..., nn.Module], Callable[..., Any]]] = {
    "attach": (lambda method: bare(), _attach),
    "load": (lambda method: bare(), lambda model, method, file: ll.load(model, file)),
    "overwrite": (adapted, lambda model, method, file: ll.load(model, file, overwrite=True)),
    "detach": (adapted, lambda model, method, file: ll.detach(model)),
    "merge": (adapted, lambda model, method, file: ll.merge(model)),
    "merge for good": (adapted, lambda model, method, file: ll.merge(model, keep=False)),
    "merged_weights": (adapted, lambda model, method, file: ll.merged_weights(model)),
    "unmerge": (merged, lambda model, method, file: ll.unmerge(model)),
}


def lines_of(operation: Callable[[], Any], interrupt: int | None = None) -> list[tuple[str, int]]:
    """The lines of the library that `operation` reaches, in order; KeyboardInterrupt is raised at the given one."""
    lines: list[tuple[str, int]] = []

    def trace(frame: FrameType, event: str, arg: Any) -> Any:
        if frame.f_code.co_filename not in SOURCES:
            return None
        if event == "line":
            lines.append((frame.f_code.co_filename, frame.f_lineno))
            if len(lines) - 1 == interrupt:
                raise KeyboardInterrupt
        return trace

    former = sys.gettrace()
    sys.settrace(trace)
    try:
        operation()
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(former)
    return lines


def snapshot(model: nn.Module) -> tuple[Any, ...]:
    with torch.no_grad():
        return anatomy(model), bits(model), list(model.state_dict()), model(X)


def same(one: tuple[Any, ...], model: nn.Module) -> bool:
    shape, values, keys, y = one
    return (
        shape == anatomy(model)
        and same_bits(values, model)
        and keys == list(model.state_dict())
        and bool(torch.equal(y, model(X)))
    )


OTHERS = (("attach", "pissa"), ("attach", "antipasto"), ("merge", "hra"), ("unmerge", "hra"), ("detach", "hra"),
          ("load", "antipasto"))  # fmt: skip


@pytest.mark.parametrize(
    ("operation", "method"),
    [*((operation, "lora") for operation in OPERATIONS),
     *(pytest.param(*pair, marks=pytest.mark.slow) for pair in OTHERS)],
)  # fmt: skip
@pytest.mark.usefixtures("as_installed")
def test_interrupted_at_every_line(operation: str, method: str, tmp_path: Path) -> None:
    make, act = OPERATIONS[operation]
    file = ll.save(adapted(method), tmp_path / "a.safetensors")
    model = make(method)
    if operation == "overwrite":
        perturb(ll.attachment(model).targets.values(), seed=7)
    done = copy.deepcopy(model)
    lines = lines_of(lambda: act(done, method, file))
    before, after = snapshot(model), snapshot(done)
    last = {line: at for at, line in enumerate(lines)}
    first = {line: at for at, line in reversed(list(enumerate(lines)))}
    moments = sorted({*first.values(), *last.values()})
    assert len(moments) > 20
    for at in moments:
        lines_of(lambda: act(model, method, file), interrupt=at)
        if not same(before, model):
            assert same(after, model), f"{operation}: {lines[at]}"
            break  # the end of the operation: from here on nothing of it is left to do
    if same(before, model):
        act(model, method, file)
    assert same(after, model)
