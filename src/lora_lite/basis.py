"""Orthonormal directions of matrices: singular vectors of a weight, eigenvectors of a second moment."""

import torch
from jaxtyping import Float
from torch import Tensor


def leading_eigenvectors(
    moment: Float[Tensor, "n n"], r: int | None = None
) -> tuple[Float[Tensor, "n r"], Float[Tensor, " r"]]:
    """Eigenvectors of a symmetric matrix, as columns, by falling eigenvalue; signs fixed by `canonical_signs`.

    Computed in fp64, on the CPU where the device has no fp64.
    """
    wide = moment.to("cpu") if moment.device.type == "mps" else moment
    values, vectors = torch.linalg.eigh(wide.double())
    values, vectors = values.flip(0)[:r], vectors.flip(1)[:, :r]
    return canonical_signs(vectors), values.clamp(min=0)


def canonical_signs(vectors: Float[Tensor, "n r"]) -> Float[Tensor, "n r"]:
    """Each column with the sign that makes its largest entry positive, so that a rerun gives the same basis."""
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return vectors * torch.where(largest < 0, -1.0, 1.0)


def left_directions(W: Float[Tensor, "o i"], r: int) -> tuple[Float[Tensor, "o r"], Float[Tensor, " r"]]:
    """The r leading left singular vectors U and singular values S of W, in fp64.

    From the eigenvectors of the smaller of W W^T and W^T W: several times faster than a full SVD, and as accurate for
    directions well above the rounding of the squares (1e-8 of the largest singular value).
    """
    W = _double(W)
    if W.shape[0] <= W.shape[1]:
        U, values = leading_eigenvectors(W @ W.T, r)
        return U, values.sqrt()
    V, _ = leading_eigenvectors(W.T @ W, r)
    return _partners(W @ V)


def singular_directions(
    W: Float[Tensor, "o i"], r: int
) -> tuple[Float[Tensor, "o r"], Float[Tensor, " r"], Float[Tensor, "r i"]]:
    """The r leading singular triples (U, S, V^T) of W, in fp64; `left_directions` with right-hand partners."""
    W = _double(W)
    if W.shape[0] <= W.shape[1]:
        U, _ = leading_eigenvectors(W @ W.T, r)
        V, S = _partners(W.T @ U)
        return U, S, V.T
    V, _ = leading_eigenvectors(W.T @ W, r)
    U, S = _partners(W @ V)
    return U, S, V.T


def _double(W: Tensor) -> Tensor:
    return W.to("cpu").double() if W.device.type == "mps" else W.double()


def _partners(products: Float[Tensor, "n r"]) -> tuple[Float[Tensor, "n r"], Float[Tensor, " r"]]:
    """Orthonormal columns and S >= 0 whose product is `products`, whose columns are orthogonal up to rounding.

    Not a division by the roots of eigenvalues: where W has no rank left those are noise, or 0.
    """
    Q, R = torch.linalg.qr(products)
    return Q * torch.where(R.diagonal() < 0, -1.0, 1.0), R.diagonal().abs()
