"""A model's batches: calling it on one, in eval mode if need be, and the tensors in what goes in and comes out."""

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put every module into eval mode, and each back into its own mode afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def run(model: nn.Module, batch: Any) -> Any:
    """`model` on a batch: a mapping (keyword arguments), a tuple or list (positional ones) or a tensor, moved to the
    device of the model's first parameter."""
    device = next(model.parameters()).device

    def move(value: Any) -> Any:
        return value.to(device) if isinstance(value, Tensor) else value

    if isinstance(batch, Mapping):
        return model(**{key: move(value) for key, value in batch.items()})
    if isinstance(batch, list | tuple):
        return model(*[move(value) for value in batch])
    if isinstance(batch, Tensor):
        return model(move(batch))
    raise TypeError(f"a batch is a mapping, a tuple, a list or a tensor, not a {type(batch).__name__}")


def batch_shape(tensors: list[Tensor]) -> tuple[int | None, frozenset[int]]:
    """(rows, sequence lengths) of a call, from the tensors that it was given: rows are those of the first.

    There are no lengths where another tensor has rows of its own (an image's patches, which a model may merge): of a
    layer's flattened input nothing would tell which they are.
    """
    batched = [tensor for tensor in tensors if tensor.ndim >= 2]
    if not batched:
        return None, frozenset()
    rows = batched[0].shape[0]
    others = {tensor.shape[0] for tensor in batched} - {rows}
    lengths = {tensor.shape[1] for tensor in batched if tensor.shape[0] == rows} if others <= {1} else ()
    return rows, frozenset(lengths)


def tensors_in(value: Any, collected: list[Tensor] | None = None) -> list[Tensor]:
    """The tensors in nested tuples, lists, mappings and dataclasses (a model's inputs or outputs)."""
    collected = [] if collected is None else collected
    if isinstance(value, Tensor):
        collected.append(value)
    elif isinstance(value, Mapping):
        for item in value.values():
            tensors_in(item, collected)
    elif isinstance(value, list | tuple):
        for item in value:
            tensors_in(item, collected)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for each in dataclasses.fields(value):
            tensors_in(getattr(value, each.name), collected)
    return collected
