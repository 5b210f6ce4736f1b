"""A program, run by test_compile.py in a process without the type-checking hook: compiled models against eager ones.

`python compiled.py aot_eager [method ...]` prints a JSON object for each method.
"""

import json
import sys
from typing import Any

import torch
from helpers import METHODS, OneLayer, attached, bits, tiny, tiny_llama, token_ids, train
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import lora_lite as ll

IDS = token_ids()


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max().detach() / expected.abs().max().detach())


def forward(method: str, backend: str) -> dict[str, Any]:
    """Compile once; turn the coefficient; compare with eager at each, forward and gradients."""
    torch.compiler.reset()
    model = tiny_llama(num_hidden_layers=1)
    attached(model, method, [IDS])
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(model, fullgraph=True, backend=counter, dynamic=False)
    errors, counts = [], []
    with torch.no_grad():
        for c in (1.0, 0.0, -0.7, 2, torch.tensor(0.3), torch.tensor(0.3, dtype=torch.float64)):
            with ll.scale(model, c):
                errors.append(distance(compiled(IDS).logits, model(IDS).logits))
                counts.append(counter.frame_count)
    return {"errors": errors, "counts": counts}


def rows(method: str, backend: str) -> dict[str, Any]:
    """One value per row: one more graph, for its shape, and none for other values."""
    torch.compiler.reset()
    model = tiny_llama(num_hidden_layers=1)
    attached(model, method, [IDS])
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(model, fullgraph=True, backend=counter, dynamic=False)
    errors, counts = [], []
    with torch.no_grad():
        for c in (torch.tensor([0.0, 1.0, -2.0]), torch.tensor([3.0, 0.5, 0.0])):
            with ll.scale(model, c):
                errors.append(distance(compiled(IDS).logits, model(IDS).logits))
                counts.append(counter.frame_count)
    return {"errors": errors, "counts": counts}


def steps(method: str, backend: str) -> dict[str, Any]:
    """Gradients and two optimiser steps, compiled and eager, at two coefficients without compiling anew."""
    torch.compiler.reset()
    eager, model = (tiny_llama(num_hidden_layers=1) for _ in range(2))
    for each in (eager, model):
        attached(each, method, [IDS])
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(model, fullgraph=True, backend=counter, dynamic=False)
    errors = []
    for c in (1.0, -0.5):
        for each, call in ((eager, eager), (model, compiled)):
            with ll.scale(each, c):
                call(IDS).logits.square().mean().backward()
        expected = {key: p.grad for key, p in eager.named_parameters() if p.requires_grad}
        for key, p in model.named_parameters():
            if p.requires_grad:
                assert p.grad is not None, key
                errors.append(float((p.grad - expected[key]).norm() / expected[key].norm()))
    count = counter.frame_count
    before = {key: p.clone() for key, p in model.named_parameters() if p.requires_grad}
    for each, call in ((eager, eager), (model, compiled)):
        optimizer = torch.optim.SGD(ll.param_groups(each, lr=1e-2))
        optimizer.step()
        errors.append(distance(call(IDS).logits, each(IDS).logits))
    moved = all(not torch.equal(p, before[key]) for key, p in model.named_parameters() if key in before)
    return {"errors": errors, "counts": [count, counter.frame_count], "moved": moved}


def after_compile(method: str, backend: str) -> dict[str, Any]:
    """A model that ran compiled sees adapters come and go."""
    torch.compiler.reset()
    model = tiny_llama(num_hidden_layers=1)
    compiled = torch.compile(model, fullgraph=True, backend=backend, dynamic=False)
    with torch.no_grad():
        base = compiled(IDS).logits
        attached(model, method, [IDS])
        adapted = compiled(IDS).logits
        errors = [distance(adapted, model(IDS).logits)]
        seen = not torch.equal(adapted, base)
        ll.merge(model)
        errors.append(distance(compiled(IDS).logits, adapted))
        ll.unmerge(model)
        errors.append(distance(compiled(IDS).logits, adapted))
        ll.detach(compiled)
        errors.append(distance(compiled(IDS).logits, base))
    return {"errors": errors, "seen": seen}


def through_the_wrapper(method: str, backend: str) -> dict[str, Any]:
    """State is found through the compiled wrapper, and a train-mode loop over it runs."""
    torch.compiler.reset()
    model: nn.Module = OneLayer(16, 24, dtype=torch.float32).train()
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    cfg = tiny(method)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    ll.attach(model, cfg, [x] if ll.variants()[method].needs(cfg) else None)
    before = bits(ll.attachment(compiled).targets["layer"])
    train(compiled, x)
    with ll.disabled(compiled), torch.no_grad():
        base = compiled(x)
    changed = any(not torch.equal(v, bits(ll.attachment(model).targets["layer"])[k]) for k, v in before.items())
    return {"errors": [distance(base, OneLayer(16, 24, dtype=torch.float32)(x))], "changed": changed}


def main() -> None:
    backend, *methods = sys.argv[1:]
    for method in methods or METHODS:
        found = {"method": method, "forward": forward(method, backend), "rows": rows(method, backend)}
        if ll.variants()[method].affine:
            found["after_compile"] = after_compile(method, backend)
        if ll.variants()[method].trained:
            found |= {"steps": steps(method, backend), "wrapper": through_the_wrapper(method, backend)}
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
