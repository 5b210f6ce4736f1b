"""Arithmetic that the methods share: which dtype computes what, and low-rank products that 16 bits can hold."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def cast(tensor: Tensor, like: Tensor) -> Tensor:
    """`tensor` in the dtype of the activation `like`."""
    return tensor.to(like.dtype)


def wide(tensor: Tensor, like: Tensor | None = None) -> Tensor:
    """`tensor` in fp32, or in fp64 if `like` (by default itself) is."""
    like = tensor if like is None else like
    return tensor.to(torch.promote_types(like.dtype, torch.float32))


def double(tensor: Tensor) -> Tensor:
    """`tensor` in fp64, or in fp32 where the device has no fp64.

    For functions such as expm1 of rank-sized tensors, which processors round differently in different shapes.
    """
    return tensor.to(torch.float32 if tensor.device.type == "mps" else torch.float64)


def scaled(h: Tensor, factor: Tensor) -> Tensor:
    """h * factor, multiplied in fp32 (fp64 for fp64) and rounded once to h's dtype: all forms of c give the same
    bits."""
    return (wide(h) * wide(factor, h)).to(h.dtype)


def full_precision(device: torch.device) -> torch.autocast:
    """A context in which autocast leaves arithmetic between parameters alone."""
    return torch.autocast(device.type, enabled=False)


def read(
    x: Float[Tensor, "*b i"], A: Float[Tensor, "r i"], offset: Float[Tensor, " r"] | None = None
) -> Float[Tensor, "*b r"]:
    """h = x A^T + offset, in x's dtype; in fp32 where the product runs in fp16.

    x may fit fp16 (up to 65504) where h does not: |h| reaches |x||A_j|. There each row of A is divided by a power of
    two, at least |A_j| sqrt(i) / 2, so that |h| stays below twice the rms of x, and h is multiplied by it in fp32.
    """
    if not _in_half(x):
        # Not by `linear` where A is trained: autocast would remember its cast of a parameter that may change.
        return x @ cast(A, x).T if offset is None else F.linear(x, cast(A, x), cast(offset, x))
    with torch.no_grad():
        unit = _power_of_two(wide(A).norm(dim=1) * A.shape[1] ** 0.5)
    h = wide(x @ cast(wide(A) / unit.unsqueeze(1), x).T) * unit
    return h if offset is None else h + wide(offset)


def add_lowrank(y: Float[Tensor, "*b o"], h: Float[Tensor, "*b r"], B: Float[Tensor, "o r"]) -> Float[Tensor, "*b o"]:
    """y + h B^T, in one pass over y.

    In fp16 the columns of B are divided, and h multiplied, by powers of two near their largest entries (at least
    2^-10, so that a B of zeros gets a gradient): what h carries then has the size of what it adds to y.
    """
    if _in_half(y):
        with torch.no_grad():
            unit = _power_of_two(wide(B).abs().amax(dim=0).clamp(min=SMALLEST_UNIT))  # a column of zeros has it too
        h, B = wide(h) * unit, wide(B) / unit
    out = torch.addmm(y.reshape(-1, y.shape[-1]), cast(h, y).reshape(-1, h.shape[-1]), cast(B, y).T)
    return cast(out, y).reshape(y.shape)


SMALLEST_UNIT = 2.0**-10


def _in_half(x: Tensor) -> bool:
    """Whether a matrix product with x runs in fp16, by its dtype or by autocast."""
    kind = x.device.type
    auto = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16
    return x.dtype == torch.float16 or (auto and x.dtype != torch.float64)


def _power_of_two(size: Tensor) -> Tensor:
    """The largest power of two that is at most `size`; 1 where size is 0."""
    return torch.where(size > 0, torch.exp2(torch.floor(torch.log2(size.clamp(min=torch.finfo(size.dtype).tiny)))), 1.0)
