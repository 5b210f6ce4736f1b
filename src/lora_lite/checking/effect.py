"""Does what the adapters change reach the outputs, and does a coefficient for one row stay in that row?"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lora_lite.adapter import Adapter
from lora_lite.batches import batch_shape, run, tensors_in
from lora_lite.errors import CoefficientError
from lora_lite.runtime.coefficient import scale
from lora_lite.runtime.hooks import TOKENS

LEAST = 1e-2  # of the largest change of an output, below which a row's change is taken for rounding


@torch.no_grad()
def outputs(model: nn.Module, batch: Any, c: float | Tensor) -> list[Tensor]:
    """The floating tensors of the model's output at coefficient c, with the same random numbers each time."""
    torch.manual_seed(0)
    with scale(model, c):
        return [t for t in tensors_in(run(model, batch)) if t.is_floating_point() and t.numel()]


def changed(new: Tensor, old: Tensor) -> float:
    """The largest change of an entry."""
    return float((new - old).abs().max()) if new.shape == old.shape else float("inf")


def turn(model: nn.Module, batch: Any) -> tuple[float, bool | None]:
    """(Largest change of an output from c = 0 to c = 1, whether a coefficient for one row acts on that row alone)."""
    base, full = outputs(model, batch, 0.0), outputs(model, batch, 1.0)
    changes = [changed(one, zero) for one, zero in zip(full, base, strict=True)]
    effect = max(changes, default=0.0)
    tokens = [batch[key] for key in TOKENS if key in batch] if isinstance(batch, Mapping) else []
    rows, _ = batch_shape(tensors_in([tokens, batch]))
    if rows is None or rows < 2:
        return effect, None
    # Of what has the batch's rows; a table of rows x rows compares each with each, as contrastive models do.
    having = [at for at, t in enumerate(base) if changes[at] > 0 and t.ndim > 1 and t.shape[0] == rows]
    having = [at for at in having if base[at].shape != (rows, rows)] or having
    if not having:
        return effect, None
    for row in (0, rows - 1):
        one_hot = torch.zeros(rows)
        one_hot[row] = 1.0
        try:
            moved = outputs(model, batch, one_hot)
        except CoefficientError:
            return effect, None
        for at in having:
            expected = base[at].clone()
            expected[row] = full[at][row]  # so that a row that is turned in part only is seen as well
            if not changed(moved[at], expected) <= LEAST * changes[at]:
                return effect, False
    return effect, True


def without_effect(
    model: nn.Module, batch: Any, adapters: Mapping[str, Mapping[str, Adapter]]
) -> list[tuple[str, str]]:
    """(Adapter, path) of those of `adapters` that can be left out, alone, without a change of any output.

    It costs a forward pass each.
    """
    full = outputs(model, batch, 1.0)
    found = []
    for name, layers in adapters.items():
        for path, adapter in layers.items():
            handle = adapter.register_forward_hook(_left_out)
            try:
                less = outputs(model, batch, 1.0)
            finally:
                handle.remove()
            if not any(changed(a, b) > 0 for a, b in zip(less, full, strict=True)):
                found.append((name, path))
    return found


def untouched(args: tuple[Any, ...]) -> Tensor:
    """What an adapter called with `args` was given to change: the layer's input, or its output."""
    return args[1]


def _left_out(adapter: nn.Module, args: tuple[Any, ...], output: Any) -> Tensor:
    return untouched(args)
