"""A program, run by test_compile.py in a process without the type-checking hook: compiled models against eager ones.

`python compiled.py BACKEND MODEL PART,PART@METHOD,METHOD ...` prints a JSON object for each part of each method
(of all methods, where none is named).
"""

import contextlib
import copy
import json
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import lora_lite as ll
from helpers import METHODS, OneLayer, attached, bits, tiny_llama, token_ids, train


class Llama(nn.Module):
    """A Llama that returns its logits."""

    def __init__(self) -> None:
        super().__init__()
        self.llama = tiny_llama(num_hidden_layers=1)

    def forward(self, ids: Tensor) -> Tensor:
        return self.llama(ids).logits


MODELS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "layer": (
        lambda: OneLayer(16, 24, dtype=torch.float32),
        torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(0)),
    ),
    "llama": (Llama, token_ids()),
}


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).detach().norm() / expected.detach().norm().clamp(min=1e-12))


class Case:
    """A compiled model and its eager twin, adapted alike, and a count of compilations."""

    def __init__(self, method: str, backend: str, model: str) -> None:
        torch.compiler.reset()
        make, self.x = MODELS[model]
        self.eager, self.model = make(), make()
        for each in (self.eager, self.model):
            attached(each, method, [self.x])
        self.counter = CompileCounterWithBackend(backend)
        self.compiled = torch.compile(self.model, fullgraph=True, backend=self.counter, dynamic=False)

    def calls(self) -> list[tuple[nn.Module, Any]]:
        return [(self.eager, self.eager), (self.model, self.compiled)]


def steps(case: Case) -> dict[str, Any]:
    """Outputs, gradients and an optimiser step at several coefficients, compiled once."""
    errors, counts, different = [], [], True
    last = torch.zeros(())
    for c in (1.0, 0.0, -0.7, 2, torch.tensor(0.3), torch.tensor(0.3, dtype=torch.float64)):
        outputs = []
        for each, call in case.calls():
            each.zero_grad()
            with ll.scale(each, c):
                outputs.append(call(case.x))
            outputs[-1].square().sum().backward()
        errors.append(distance(outputs[1], outputs[0]))
        different &= c == 0.3 or not torch.equal(last, outputs[1])
        last = outputs[1].detach()
        counts.append(case.counter.frame_count)
        expected = {key: p.grad for key, p in case.eager.named_parameters() if p.requires_grad}
        for key, p in case.model.named_parameters():
            if p.requires_grad:
                errors.append(distance(p.grad, expected[key]))  # type: ignore[arg-type]
    outputs = []
    for each, call in case.calls():
        torch.optim.SGD(ll.param_groups(each, lr=1e-2)).step()
        outputs.append(call(case.x))
    errors.append(distance(outputs[1], outputs[0]))
    counts.append(case.counter.frame_count)
    return {"errors": errors, "counts": counts, "different": different and not torch.equal(outputs[1], last)}


def rows(case: Case) -> dict[str, Any]:
    """One value per row: a graph for its shape, and no other for other values."""
    errors, counts = [], []
    with torch.no_grad():
        for c in (torch.tensor([0.0, 1.0, -2.0]), torch.tensor([3.0, 0.5, 0.0])):
            with ll.scale(case.model, c):
                errors.append(distance(case.compiled(case.x), case.model(case.x)))
                counts.append(case.counter.frame_count)
    return {"errors": errors, "counts": counts}


@torch.no_grad()
def coming_and_going(case: Case) -> dict[str, Any]:
    """A model that ran compiled sees its adapters leave, come, merge and unmerge."""
    first = case.compiled(case.x)
    ll.detach(case.compiled)
    base = case.compiled(case.x)
    attached(case.model, "lora", [case.x])
    adapted = case.compiled(case.x)
    expected = case.model(case.x)
    ll.merge(case.model)
    merged = case.compiled(case.x)
    ll.unmerge(case.model)
    return {
        "errors": [distance(adapted, expected), distance(case.compiled(case.x), expected)],
        "merged": distance(merged, expected),
        "different": not (torch.equal(first, base) or torch.equal(base, adapted)),
    }


def wrapper(case: Case) -> dict[str, Any]:
    """State is found through the compiled wrapper; a loop in train mode runs over it."""
    adapter = next(iter(ll.attachment(case.compiled).targets.values()))
    before = bits(adapter)
    case.compiled.train()
    train(case.compiled, case.x)
    attached(case.compiled._orig_mod, "lora", name="second")
    with torch.no_grad(), ll.disabled(case.compiled), ll.disabled(case.eager):
        errors = [distance(case.compiled(case.x), case.eager(case.x))]
    return {"errors": errors, "different": not all(torch.equal(v, bits(adapter)[k]) for k, v in before.items())}


class Checkpointed(nn.Module):
    """A module of which a part is checkpointed."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.part, x, use_reentrant=False)


def fail(grad: Tensor) -> Tensor:
    raise ZeroDivisionError


def checkpointed(case: Case) -> dict[str, Any]:
    """A compiled part of an eager model that checkpoints it: backward computes it again with its forward's c, also
    after a backward that failed; what runs later has the c then in force."""
    results = []
    for compile_part in (False, True):
        part = copy.deepcopy(case.eager)
        ll.detach(part)
        model = Checkpointed(part)
        attached(model, "lora", [case.x])
        if compile_part:
            part.compile(backend=case.counter, fullgraph=True)
        with ll.scale(model, -1.5):
            y, failing = model(case.x), model(case.x)
        failing.register_hook(fail)
        with contextlib.suppress(ZeroDivisionError):
            failing.sum().backward()
        model.zero_grad()
        y.square().sum().backward()
        results.append([*(p.grad for p in model.parameters() if p.requires_grad), model(case.x)])
    errors = [distance(found, expected) for expected, found in zip(*results, strict=True)]
    return {"errors": errors, "different": case.counter.frame_count > 0}


PARTS = {each.__name__: each for each in (steps, rows, coming_and_going, wrapper, checkpointed)}


def main() -> None:
    backend, model, *groups = sys.argv[1:]
    for parts, _, methods in (group.partition("@") for group in groups):
        for method in methods.split(",") if methods else [m for m in METHODS if ll.methods()[m].facts.trained]:
            for part in parts.split(","):
                found = PARTS[part](Case(method, backend, model))
                print(json.dumps({"method": method, "part": part, **found}), flush=True)


if __name__ == "__main__":
    main()
