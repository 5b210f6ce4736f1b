"""Orthonormal directions of matrices: singular vectors of a weight, eigenvectors of a second moment."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor

from lora_lite.errors import TargetError

ONE_SIZE = 0.1  # of the largest singular value: above, fp32 keeps directions orthogonal to 1e-5


@contextmanager
def factorising(path: str) -> Iterator[None]:
    """Say of which layer's weight torch could not find the factors."""
    try:
        yield
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        raise TargetError(f"{path}: its weight cannot be factorised; does it hold NaN or infinite values?") from error


def leading_eigenvectors(
    moment: Float[Tensor, "n n"], r: int | None = None
) -> tuple[Float[Tensor, "n r"], Float[Tensor, " r"]]:
    """Eigenvectors of a symmetric matrix, as columns, by falling eigenvalue; signs fixed by `canonical_signs`.

    In the matrix's own precision; on the CPU where the device has none of its own.
    """
    values, vectors = torch.linalg.eigh(moment.to("cpu") if moment.device.type == "mps" else moment)
    values, vectors = values.flip(0)[:r], vectors.flip(1)[:, :r]
    return canonical_signs(vectors), values.clamp(min=0)


def canonical_signs(vectors: Float[Tensor, "n r"]) -> Float[Tensor, "n r"]:
    """Each column with the sign that makes its largest entry positive, so that a rerun gives the same basis."""
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return vectors * torch.where(largest < 0, -1.0, 1.0)


def gram(W: Float[Tensor, "n m"], dtype: torch.dtype = torch.float64) -> Float[Tensor, "n n"]:
    """W W^T, computed in `dtype` (on the CPU where the device has no fp64)."""
    W = W.detach().to("cpu" if W.device.type == "mps" else W.device, dtype)
    if W.device.type != "cpu":
        return W @ W.T
    # numpy computes one half of a product with its own transpose, torch both.
    array = W.contiguous().numpy()
    return torch.from_numpy(array @ array.T)


def left_directions(W: Float[Tensor, "o i"], r: int) -> tuple[Float[Tensor, "o r"], Float[Tensor, " r"]]:
    """The r leading left singular vectors U and singular values S of W.

    From the eigenvectors of the smaller of W W^T and W^T W, in fp64: several times faster than a full SVD, and as
    accurate for directions well above the rounding of the squares (1e-8 of the largest singular value).
    """
    if W.shape[0] <= W.shape[1]:
        U, values = leading_eigenvectors(gram(W), r)
        return U, values.sqrt()
    return partners(W, leading_eigenvectors(gram(W.T), r)[0])


def singular_directions(
    W: Float[Tensor, "o i"], r: int
) -> tuple[Float[Tensor, "o r"], Float[Tensor, " r"], Float[Tensor, "r i"]]:
    """The r leading singular triples (U, S, V^T) of W.

    As `left_directions`, but in W's own precision (at least fp32) if they all have singular values of one size.
    """
    tall = W.shape[0] > W.shape[1]
    A = W.T if tall else W
    for dtype in (torch.promote_types(W.dtype, torch.float32), torch.float64):
        near, _ = leading_eigenvectors(gram(A, dtype), r)
        far, S = partners(A.T, near)
        if bool(S.min() > ONE_SIZE * S.max()):
            break
    return (far, S, near.T) if tall else (near, S, far.T)


def partners(A: Float[Tensor, "n m"], V: Float[Tensor, "m r"]) -> tuple[Float[Tensor, "n r"], Float[Tensor, " r"]]:
    """Orthonormal columns and S >= 0 whose product is A V, for V that makes its columns orthogonal up to rounding.

    Where all of S is of one size, A's own precision (at least fp32) and a division serve. Else in fp64, and what A has
    no rank left for, noise or 0, is made orthonormal to the rest.
    """
    A = A.detach().to(V.device, torch.promote_types(A.dtype, torch.float32))
    products = A @ V.to(A.dtype)
    S = products.norm(dim=0)
    if bool(S.min() > ONE_SIZE * S.max()):
        return products / S, S
    Q, R = torch.linalg.qr(A.double() @ V.double())
    return Q * torch.where(R.diagonal() < 0, -1.0, 1.0), R.diagonal().abs()
