"""Passes through an adapted model that watch its adapters and leave no trace: parts of `check` and of the probe."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lora_lite.adapter import Adapter
from lora_lite.calibration.statistics import generator
from lora_lite.checking.effect import untouched
from lora_lite.checking.report import CheckReport, Layer
from lora_lite.runtime.skipped import EXPERT

PERTURBATION = 1e-2

Layers = Mapping[str, Mapping[str, Adapter]]


@contextmanager
def put_back(model: nn.Module, moved: Sequence[Tensor]) -> Iterator[None]:
    """Put back, at the end, all that a forward and backward pass moves: bits, gradients, modes, the random state.

    moved: further tensors to put back, such as those that are perturbed.
    """
    # Running averages of norms, which train mode moves; large integer buffers are quantised weights, which it does not.
    buffers = [b for b in model.buffers() if b.is_floating_point() or b.numel() == 1]
    kept = [(tensor, tensor.detach().clone()) for tensor in [*moved, *buffers]]
    grads = [(p, p.grad) for p in model.parameters() if p.requires_grad]
    modes = {module: module.training for module in model.modules()}
    try:
        for p, _ in grads:
            p.grad = None  # else backward would add to the very tensor that is put back
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            yield
    finally:
        with torch.no_grad():
            for tensor, bits in kept:
                tensor.copy_(bits)
        for p, grad in grads:
            p.grad = grad
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def watch(adapters: Layers) -> Iterator[CheckReport]:
    """A report that counts the calls of each adapter within the block."""
    report = CheckReport({name: {path: Layer() for path in layers} for name, layers in adapters.items()}, [])
    handles = [
        adapter.register_forward_hook(_counting(report.layers[name][path]))
        for name, layers in adapters.items()
        for path, adapter in layers.items()
    ]
    try:
        yield report
    finally:
        for handle in handles:
            handle.remove()


def _counting(layer: Layer) -> Any:
    def hook(adapter: nn.Module, args: Any, output: Any) -> None:
        layer.calls += 1
        if not layer.moves:
            given = untouched(args)
            layer.moves = not torch.equal(output.detach(), given.detach().to(output.device))
        layer.modes.add(adapter.training)

    return hook


@torch.no_grad()
def perturb(tensors: Sequence[Tensor]) -> None:
    """Add noise to each, in place: PERTURBATION of its mean size, or of 1 where that is larger."""
    for index, p in enumerate(tensors):
        noise = torch.randn(p.shape, generator=generator(index, "check"), dtype=torch.float32, device="cpu")
        p.add_(noise.to(p.device, p.dtype) * PERTURBATION * p.abs().mean().clamp(min=1.0))


def grad_norm(p: Tensor) -> float:
    """Norm of a tensor's gradient; NaN without one."""
    return float("nan") if p.grad is None else float(p.grad.norm())


def note_gradients(report: CheckReport, adapters: Layers) -> None:
    """Write the gradients that a backward pass left into the report, and which experts no token reached."""
    for name, layers in adapters.items():
        for path, adapter in layers.items():
            layer = report.layers[name][path]
            for key, p in adapter.named_parameters():
                if p.requires_grad:  # else frozen by its user, beside others that are trained
                    layer.grad_norms[key] = grad_norm(p)
            if layer.calls == 0 and EXPERT.search(path):
                report.idle_experts.append(path)
