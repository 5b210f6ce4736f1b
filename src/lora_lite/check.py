"""Does every adapter have an effect, and does it get a gradient? Found by running, not assumed."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lora_lite.adapter import Adapter
from lora_lite.calibration import run
from lora_lite.coefficient import scale
from lora_lite.errors import CheckError, CoefficientError
from lora_lite.state import State, adapters_of, refuse_merged, root_of, tensors_in
from lora_lite.stats import generator

PERTURBATION = 1e-2
EXPERT = re.compile(r"(^|\.)experts\.\d+(\.|$)")  # which tokens reach an expert is not ours to say
TRAIN_PASSES = 4  # at most, for models that skip layers at random in training (layer drop)


@dataclass
class Layer:
    """What `check` saw of one adapter on one layer.

    Attributes:
        calls: how many times it ran (in train and in eval mode together).
        modes: the modes in which it ran: True for train, False for eval.
        grad_norms: tensor name -> norm of its gradient.
    """

    calls: int = 0
    modes: set[bool] = field(default_factory=set)
    grad_norms: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class CheckReport:
    """Result of `check`.

    Attributes:
        layers: adapter name -> module path -> `Layer`.
        idle_experts: paths of experts that no token reached.
        effect: largest change of an output when the perturbed adapters are turned from c = 0 to c = 1.
        rows_independent: whether a coefficient on one row moved that row alone; None if the model takes no such
            coefficient, or the batches have one row.
    """

    layers: dict[str, dict[str, Layer]]
    idle_experts: list[str]
    effect: float
    rows_independent: bool | None

    def __str__(self) -> str:
        lines = [f"{'adapter':<12} {'layer':<48} {'runs':>5}  gradient norms"]
        for name, layers in self.layers.items():
            for path, layer in layers.items():
                norms = ", ".join(f"{key} {norm:.2e}" for key, norm in layer.grad_norms.items())
                lines.append(f"{name:<12} {path:<48} {layer.calls:>5}  {norms}")
        lines.append(f"effect of c = 1 against c = 0: {self.effect:.2e}; rows independent: {self.rows_independent}")
        return "\n".join(lines)


def check(model: nn.Module, batches: Iterable[Any]) -> CheckReport:
    """Run the model forward and backward on `batches`, with every trained tensor perturbed, and report by layer.

    The tensors are perturbed because at the start the gradient of some is zero by design (a LoRA's A). It runs in train
    and in eval mode, since models take other paths in each, and puts back all bits, gradients and modes.

    Args:
        model: the model, or a wrapper of it (DDP: gradients are compared across processes).
        batches: one or a few batches, as for `attach`; the loss is the model's own `loss` if its output has one, else a
            random projection of its outputs.
    Raises:
        CheckError: an adapter that never ran, got no gradient or one that is zero or not finite, or had no effect;
            gradients that differ between processes; or a coefficient for one row that moved another.
        StateError: nothing attached, merged, or a target replaced since attach.
        ValueError: no batches.
    """
    root, state = root_of(model)
    refuse_merged(state, "check")
    batches = list(batches)
    if not batches:
        raise ValueError("check: give at least one batch")
    adapters = {name: adapters_of(root, name) for name in state.adapters}
    report = CheckReport({name: {path: Layer() for path in layers} for name, layers in adapters.items()}, [], 0.0, None)
    trained = [p for layers in adapters.values() for adapter in layers.values() for p in adapter.parameters()]
    trained = [p for p in trained if p.requires_grad]
    with _put_back(model, trained), _watch(adapters, report):
        for index, p in enumerate(trained):
            _perturb(p, index)
        for mode in (True, False):
            model.train(mode)
            for _ in range(TRAIN_PASSES if mode else 1):
                for batch in batches:
                    output = run(model, batch)
                    if trained:
                        _loss(output).backward()
                if all(mode in layer.modes for layers in report.layers.values() for layer in layers.values()):
                    break
        _note_gradients(report, adapters)
        model.eval()
        effect, independent = _turn(model, state, batches[0])
    report = CheckReport(report.layers, report.idle_experts, effect, independent)
    _raise_findings(report, adapters, model)
    return report


@contextmanager
def _put_back(model: nn.Module, trained: Sequence[Tensor]) -> Iterator[None]:
    """Put back, at the end, all that a forward and backward pass moves: bits, gradients, modes, the random state."""
    # Running averages of norms, which train mode moves; large integer buffers are quantised weights, which it does not.
    buffers = [b for b in model.buffers() if b.is_floating_point() or b.numel() == 1]
    kept = [(tensor, tensor.detach().clone()) for tensor in [*trained, *buffers]]
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
def _watch(adapters: Mapping[str, Mapping[str, Adapter]], report: CheckReport) -> Iterator[None]:
    """Count, in the report, the calls of each adapter."""
    handles = [
        adapter.register_forward_hook(_counting(report.layers[name][path]))
        for name, layers in adapters.items()
        for path, adapter in layers.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _counting(layer: Layer) -> Any:
    def hook(adapter: nn.Module, args: Any, output: Any) -> None:
        layer.calls += 1
        layer.modes.add(adapter.training)

    return hook


@torch.no_grad()
def _perturb(p: Tensor, index: int) -> None:
    noise = torch.randn(p.shape, generator=generator(index, "check"), dtype=torch.float32, device="cpu").to(
        p.device, p.dtype
    )
    p.add_(noise * PERTURBATION * p.abs().mean().clamp(min=1.0))


def _loss(output: Any) -> Tensor:
    own = getattr(output, "loss", None)
    if isinstance(own, Tensor) and own.requires_grad:
        return own
    tensors = [t for t in tensors_in(output) if t.is_floating_point() and t.requires_grad]
    if not tensors:
        raise CheckError("the model's output has no tensor that depends on the adapters; is it run under no_grad?")
    weights = [_noise(t) for t in tensors]
    return sum((t.float() * w).mean() for t, w in zip(tensors, weights, strict=True))  # type: ignore[return-value]


def _noise(like: Tensor) -> Tensor:
    noise = torch.randn(like.shape, generator=generator(0, "loss"), dtype=torch.float32, device="cpu")
    return noise.to(like.device)


def _note_gradients(report: CheckReport, adapters: Mapping[str, Mapping[str, Adapter]]) -> None:
    for name, layers in adapters.items():
        for path, adapter in layers.items():
            for key, p in adapter.named_parameters():
                if not p.requires_grad:  # frozen by its user, beside others that are trained
                    continue
                norm = float("nan") if p.grad is None else float(p.grad.norm())
                report.layers[name][path].grad_norms[key] = norm
            if report.layers[name][path].calls == 0 and EXPERT.search(path):
                report.idle_experts.append(path)


@torch.no_grad()
def _turn(model: nn.Module, state: State, batch: Any) -> tuple[float, bool | None]:
    """The effect of c, and whether a one-hot c moves its row alone."""

    def outputs(c: float | Tensor) -> list[Tensor]:
        with scale(model, c):
            return [t for t in tensors_in(run(model, batch)) if t.is_floating_point() and t.numel()]

    bases = outputs(0.0)
    changes = [float((full - base).abs().max()) for full, base in zip(outputs(1.0), bases, strict=True)]
    effect = max(changes, default=0.0)
    # Rows are told apart in the largest output that moves: one of two towers may have none, a loss has no rows.
    moving = [at for at, change in enumerate(changes) if change > 0 and bases[at].ndim > 1]
    if not moving:
        return effect, None
    largest = max(moving, key=lambda at: bases[at].numel())
    base, rows, effect_here = bases[largest], bases[largest].shape[0], changes[largest]
    if rows < 2:
        return effect, None
    one_hot = torch.zeros(rows)
    one_hot[0] = 1.0
    try:
        moved = outputs(one_hot)[largest]
    except CoefficientError:
        return effect, None
    noise = 1e-3 * effect_here
    return effect, bool((moved[1:] - base[1:]).abs().max() <= noise)


def _raise_findings(report: CheckReport, adapters: Mapping[str, Mapping[str, Adapter]], model: nn.Module) -> None:
    for name, layers in report.layers.items():
        for path, layer in layers.items():
            if path in report.idle_experts:
                continue
            if layer.calls == 0:
                raise CheckError(
                    f"adapter {name!r} on {path} never ran: the model uses that weight without calling the layer, or "
                    "the batches do not reach it; leave it out with exclude_names, or give other batches"
                )
            if len(layer.modes) == 1 and not EXPERT.search(path):
                only, not_in = ("train", "eval") if True in layer.modes else ("eval", "train")
                raise CheckError(
                    f"adapter {name!r} on {path} ran in {only} mode but not in {not_in} mode, where the model takes "
                    "another path that reads the weight without calling the layer; leave it out with exclude_names"
                )
            norms = list(layer.grad_norms.values())
            if adapters[name][path].trained and norms and not any(norm > 0 and norm < float("inf") for norm in norms):
                raise CheckError(
                    f"adapter {name!r} on {path} ran but got no finite, nonzero gradient: {layer.grad_norms}"
                )
            if not all(norm < float("inf") for norm in norms):
                raise CheckError(f"adapter {name!r} on {path} got a gradient that is not finite: {layer.grad_norms}")
    if not report.effect > 0:
        raise CheckError("turning the coefficient from 0 to 1 changes no output, although adapters ran")
    if report.rows_independent is False:
        raise CheckError("a coefficient for one row moved others too: this model mixes the rows of a batch")
    _compare_processes(report, model)


def _compare_processes(report: CheckReport, model: nn.Module) -> None:
    """Under DDP every process must have the same gradients."""
    wrapped = any(type(module).__name__ == "DistributedDataParallel" for module in model.modules())
    if not (wrapped and dist.is_available() and dist.is_initialized()):
        return
    norms = [
        norm for layers in report.layers.values() for layer in layers.values() for norm in layer.grad_norms.values()
    ]
    device = next(model.parameters()).device
    low, high = torch.tensor(norms, device=device), torch.tensor(norms, device=device)
    dist.all_reduce(low, dist.ReduceOp.MIN)
    dist.all_reduce(high, dist.ReduceOp.MAX)
    if not torch.allclose(low, high, rtol=1e-4):
        raise CheckError("gradients differ between processes: they are not reduced; attach before wrapping in DDP")
