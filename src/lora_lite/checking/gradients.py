"""Are the gradients true? Backward against finite differences.

A base can cut what goes back through it: a layer that detaches its input, a kernel without a backward. All adapters
still get gradients then, only wrong ones.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_lite.batches import run, tensors_in
from lora_lite.calibration.statistics import generator
from lora_lite.errors import CheckError
from lora_lite.layers.linear import is_linear, is_quantized
from lora_lite.numerics import double

DIRECTIONS = 3
STEPS = (1.0, 2.0, 4.0)
RETRIES = (1.0, 1 / 8, 8.0)  # other sizes of step, where no line fits: curvature asks for smaller, rounding for larger
DOUBTFUL = 0.3  # error of the measurement, relative to what is measured, above which nothing is said
SPREADS = 4  # of its own error, that a measurement may be away from the truth


@dataclass(frozen=True)
class Gradient:
    """Backward against finite differences, along random directions of all trained tensors together.

    Attributes:
        ratio: the differences over what the gradient promises, fitted over the directions; 1 where backward is true,
            None where it cannot be measured.
        error: norm of (differences - promises), relative to the differences; None where it cannot be measured.
        doubt: how much of `error` the measurement itself may account for.
        tolerance: the largest error that passes, at this model's precision.
        reason: why it cannot be measured; empty where it was.
    """

    ratio: float | None
    error: float | None
    doubt: float
    tolerance: float
    reason: str = ""

    @property
    def wrong(self) -> bool:
        """Whether backward and the differences contradict each other."""
        return self.error is not None and self.error > max(self.tolerance, self.doubt)

    def __str__(self) -> str:
        if self.error is None:
            return f"backward against finite differences: cannot be measured ({self.reason})"
        return (
            f"backward against finite differences: ratio {self.ratio:.3f}, error {self.error:.1e} (at most "
            f"{max(self.tolerance, self.doubt):.1e})"
        )


@dataclass(frozen=True)
class _Precision:
    """Change of the outputs (relative) that the smallest step aims at, and the tolerance."""

    change: float
    tolerance: float


# By the least rounding (eps) of a dtype: bf16, fp16, fp32.
PRECISIONS = {4e-3: _Precision(0.05, 0.3), 5e-4: _Precision(0.02, 0.2), 0.0: _Precision(3e-3, 0.06)}


def loss_of(output: Any, coarse: bool = True) -> Tensor:
    """The output's own `loss` if it has one, else a fixed random projection of its outputs, in fp64.

    Args:
        output: what the model returned.
        coarse: whether a loss in 16 bits will do; if not, the projection is taken in its place.

    Raises:
        CheckError: nothing in the output depends on a trained tensor.
    """
    own = getattr(output, "loss", None)
    if isinstance(own, Tensor) and own.requires_grad and (coarse or own.dtype.itemsize >= 4):
        return own
    tensors = [t for t in tensors_in(output) if t.is_floating_point() and t.requires_grad]
    if not tensors:
        raise CheckError("the model's output has no tensor that depends on the adapters; is it run under no_grad?")
    parts = [(double(t) * _noise(t)).mean() for t in tensors]
    return sum(part.to(parts[0].device) for part in parts)  # type: ignore[return-value]


def _noise(like: Tensor) -> Tensor:
    noise = torch.randn(like.shape, generator=generator(0, "loss"), dtype=torch.float32, device="cpu")
    return double(noise.to(like.device))


class Differences:
    """The loss of one batch as a function of the trained tensors, in eval mode and with the same random numbers.

    It runs with gradients enabled, for kernels are chosen by that. The caller puts the tensors back.
    """

    def __init__(self, model: nn.Module, batch: Any, tensors: Sequence[Tensor]) -> None:
        self.model, self.batch, self.tensors = model, batch, tensors
        self.start = [p.detach().clone() for p in tensors]
        for p in model.parameters():
            p.grad = None
        output = self._output()
        loss_of(output, coarse=False).backward()
        self.outputs = _floats(output)
        self.grads = [torch.zeros_like(p) if p.grad is None else p.grad.detach() for p in tensors]

    def _output(self) -> Any:
        torch.manual_seed(0)
        return run(self.model, self.batch)

    def direction(self, index: int) -> list[Tensor]:
        """Random, each tensor's part as large as that tensor (root mean square)."""
        rng = generator(index, "direction")
        parts = []
        for p in self.start:
            v = torch.randn(p.shape, generator=rng, dtype=torch.float32, device="cpu").to(p.device)
            parts.append(v * p.float().square().mean().sqrt().clamp(min=torch.finfo(torch.float32).tiny))
        return parts

    def promise(self, parts: Sequence[Tensor]) -> float:
        """The slope along a direction, by the gradient."""
        pairs = zip(self.grads, parts, strict=True)
        return math.fsum(float((double(g) * double(v)).sum()) for g, v in pairs)

    def at(self, parts: Sequence[Tensor], step: float) -> Any:
        """The model's output, a step along a direction."""
        with torch.no_grad():
            for p, start, v in zip(self.tensors, self.start, parts, strict=True):
                p.copy_(start + step * v)
        return self._output()

    def slope(self, parts: Sequence[Tensor], step: float) -> float:
        """The slope along a direction, by a central difference."""
        ends, moved = [], []
        for sign in (1, -1):
            ends.append(float(loss_of(self.at(parts, sign * step), coarse=False).detach()))
            moved.append([p.detach().clone() for p in self.tensors] if self._narrow() else [])
        slope = (ends[0] - ends[1]) / (2 * step)
        if not self._narrow():
            return slope
        # 16 bits round the step itself: what the gradient promises for the rounding is taken off.
        real = [(double(up) - double(down)) / (2 * step) for up, down in zip(*moved, strict=True)]
        return slope + self.promise(parts) - self.promise(real)

    def _narrow(self) -> bool:
        return any(p.dtype.itemsize < 4 for p in self.tensors)

    def change(self, parts: Sequence[Tensor], step: float) -> float:
        """How far a step moves the output that it moves most, relative to its size."""
        pairs = zip(_floats(self.at(parts, step)), self.outputs, strict=False)
        changes = [float((b - a).norm() / a.norm().clamp(min=1e-30)) for b, a in pairs if a.shape == b.shape]
        return max(changes, default=0.0)

    def step(self, aim: float) -> float | None:
        """A step that moves the outputs by about `aim` of their size; None where none does."""
        parts, step, change = self.direction(0), 0.5, 0.0
        for _ in range(3):
            change = self.change(parts, step)
            factor = min(max(aim / change, 1e-2), 1e2) if 0 < change < math.inf else (1e2 if change == 0 else 1e-2)
            step *= factor
            if 0.5 < factor < 2:
                break
        return step if 0 < change < math.inf else None


def _floats(output: Any) -> list[Tensor]:
    return [double(t.detach()) for t in tensors_in(output) if t.is_floating_point() and t.numel()]


def measure(model: nn.Module, batch: Any, tensors: Sequence[Tensor]) -> Gradient:
    """Compare backward with finite differences of the loss of one batch along random directions of `tensors`.

    It costs one backward pass, and about 20 forward passes (up to 60 where what it sees does not fit a smooth curve).
    It leaves the tensors moved, and the model in whatever mode it found it.
    """
    precision = _precision(model)
    if not tensors:
        return Gradient(None, None, 0.0, precision.tolerance, "no trained tensor has a gradient that should be whole")
    with _local(model):
        differences = Differences(model, batch, tensors)
        aimed = differences.step(precision.change)
        if aimed is None:
            return Gradient(None, None, 0.0, precision.tolerance, "no step of the trained tensors moves an output")
        directions = [differences.direction(index) for index in range(DIRECTIONS)]
        promised = [differences.promise(parts) for parts in directions]
        tries = []
        for factor in RETRIES:
            fits = [_fit([differences.slope(parts, aimed * factor * s) for s in STEPS]) for parts in directions]
            tries.append(_compare(promised, fits, precision))
            if tries[-1].doubt < DOUBTFUL:
                return tries[-1]
    best = min(tries, key=lambda tried: tried.doubt if math.isfinite(tried.doubt) else math.inf)
    reason = f"differences at several step sizes do not agree: the outputs are rounded, or jump; doubt {best.doubt:.1e}"
    return Gradient(None, None, best.doubt, precision.tolerance, reason)


def _fit(slopes: Sequence[float]) -> tuple[float, float]:
    """(slope at no step, sum of weighted squares that are left) of slope(s) = a + b s^2; the error goes as 1/s."""
    s = torch.tensor(STEPS, dtype=torch.float64)
    y, design = torch.tensor(slopes, dtype=torch.float64), torch.stack([torch.ones_like(s), s.square()], 1)
    if not bool(torch.isfinite(y).all()):
        return math.nan, math.nan
    fit = torch.linalg.lstsq(design * s.unsqueeze(1), (y * s).unsqueeze(1)).solution.squeeze(1)
    return float(fit[0]), float(((y - design @ fit) * s).square().sum())


def _compare(promised: Sequence[float], fits: Sequence[tuple[float, float]], precision: _Precision) -> Gradient:
    s = torch.tensor(STEPS, dtype=torch.float64)
    design = torch.stack([torch.ones_like(s), s.square()], 1) * s.unsqueeze(1)
    spread = float(torch.linalg.inv(design.T @ design)[0, 0].sqrt())  # of a, where one slope's at s = 1 is 1
    measured = math.sqrt(math.fsum(a * a for a, _ in fits))
    away = math.sqrt(math.fsum((a - p) ** 2 for (a, _), p in zip(fits, promised, strict=True)))
    left = math.sqrt(math.fsum(rest for _, rest in fits))
    if not (measured > 0 and math.isfinite(measured) and math.isfinite(left)):
        return Gradient(None, None, math.inf, precision.tolerance)
    promise = math.fsum(p * p for p in promised)
    along = math.fsum(a * p for (a, _), p in zip(fits, promised, strict=True))
    ratio = along / promise if promise > 0 else math.inf
    return Gradient(ratio, away / measured, SPREADS * spread * left / measured, precision.tolerance)


def _precision(model: nn.Module) -> _Precision:
    """That of the coarsest dtype in which the model computes."""
    eps = max((torch.finfo(p.dtype).eps for p in model.parameters() if p.is_floating_point()), default=0.0)
    for kind in {p.device.type for p in model.parameters()}:
        if torch.is_autocast_enabled(kind):
            eps = max(eps, torch.finfo(torch.get_autocast_dtype(kind)).eps)
    if any(is_quantized(layer) for layer in model.modules() if is_linear(layer)):  # some round their inputs as well
        return _Precision(max(0.02, _at(eps).change), 0.3)
    return _at(eps)


def _at(eps: float) -> _Precision:
    return next(precision for least, precision in PRECISIONS.items() if eps >= least)


@contextmanager
def _local(model: nn.Module) -> Iterator[None]:
    """Under DDP: this process's own gradients, as its differences are its own."""
    with ExitStack() as stack:
        for module in model.modules():
            if type(module).__name__ == "DistributedDataParallel":
                stack.enter_context(module.no_sync())  # type: ignore[operator]
        yield
