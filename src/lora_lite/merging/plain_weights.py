"""Adapters as plain weights: the fp64 twin of a layer, and what its stack computes as a matrix.

For an affine stack f, b' = f(0) and W' = (f(I) - f(0))^T. The twin evaluates the very modules that the forward pass
uses, in fp64, so no method needs code of its own for it.
"""

import copy

import torch
from torch import Tensor, nn

from lora_lite.adapter import Adapter, adapters_on
from lora_lite.errors import NotAffineError, StateError
from lora_lite.layers.linear import bias, dense, shape
from lora_lite.runtime.hooks import hook_layer

CHUNK = 1024  # columns of the identity per pass
AFFINE_TOLERANCE = 1e-8


def twin(layer: nn.Module) -> nn.Linear:
    """A copy of an adapted layer as an `nn.Linear` in fp64 on the CPU, with copies of its adapters.

    The copies share the coefficients of the originals. Only the CPU is sure to have fp64.
    """
    i, o = shape(layer)
    b = bias(layer)
    with torch.device("meta"):
        plain = nn.Linear(i, o, bias=b is not None, dtype=torch.float64)
    plain.weight = nn.Parameter(dense(layer).to("cpu", torch.float64), requires_grad=False)
    if b is not None:
        plain.bias = nn.Parameter(b.to("cpu", torch.float64), requires_grad=False)
    plain.lora = nn.ModuleDict()
    for name, adapter in layer.lora.items():  # type: ignore[union-attr, operator]
        plain.lora[name] = _in_fp64(adapter)
    with torch.no_grad():
        for adapter in adapters_on(plain):
            adapter.derive(plain)
    hook_layer(plain)
    return plain.eval()


def _in_fp64(adapter: Adapter) -> Adapter:
    shared = {id(adapter.coefficient): adapter.coefficient, id(adapter.cfg): adapter.cfg}
    twin_adapter = copy.deepcopy(adapter, shared)
    # Adapter._apply keeps the dtype on purpose; here it is to change.
    return nn.Module._apply(twin_adapter, lambda t: t.to("cpu", torch.float64 if t.is_floating_point() else t.dtype))  # type: ignore[return-value]


def refuse_not_affine(layer: nn.Module, path: str) -> None:
    """Refuse a stack of which a method says that it is not affine, or a coefficient that differs between rows."""
    for adapter in adapters_on(layer):
        if not adapter.facts.affine:
            raise NotAffineError(
                f"{path}: {adapter.facts.name} is not affine, so no plain weight equals it; detach it first"
            )
        if adapter.coefficient.value.ndim:
            raise StateError(f"{path}: the coefficient has one value per row; leave that `scale` first")


@torch.no_grad()
def affine(layer: nn.Module, path: str) -> tuple[Tensor, Tensor]:
    """(W' (o, i), b' (o)) in fp64 of an adapted layer: the plain weights that equal its whole stack.

    Raises:
        NotAffineError: a method of the stack says so, or it is found by measurement.
        StateError: a coefficient in force has one value per row.
    """
    refuse_not_affine(layer, path)
    with torch.device("cpu"):
        return probed(twin(layer), *shape(layer), path)


def probed(f: nn.Linear, i: int, o: int, path: str) -> tuple[Tensor, Tensor]:
    """(W (o, i), b (o)) of f, which must be affine (`NotAffineError`), by running it on the identity."""
    zero = f(torch.zeros(1, i, dtype=torch.float64))
    columns = torch.empty(i, o, dtype=torch.float64)
    for start in range(0, i, CHUNK):
        stop = min(start + CHUNK, i)
        rows = torch.zeros(stop - start, i, dtype=torch.float64)
        rows[:, start:stop].fill_diagonal_(1.0)
        columns[start:stop] = f(rows) - zero
    x = torch.randn(4, i, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    exact, linear = f(x), x @ columns + zero
    if (exact - linear).norm() > AFFINE_TOLERANCE * exact.norm().clamp(min=torch.finfo(torch.float64).tiny):
        raise NotAffineError(
            f"{path}: its stack is not affine (measured on random inputs), so no plain weight equals it"
        )
    return columns.T.contiguous(), zero[0]
