"""The change that a layer's stack makes, as low-rank factors, without forming it.

Halko, Martinsson and Tropp 2011, arXiv:0806.4809 (random range finder; subspace iteration, algorithm 4.4, where a rank
is asked for). In the fp64 copy f of the layer with its stack, the change f(x) - W x - b = dW x + db needs two products:

    dW X^T    (o, k)    f on k rows X (k, i), less f on a row of zeros
    Q^T dW    (r, i)    the vector-Jacobian product of f with the rows of Q^T, less Q^T W

The columns of dW X^T span those of dW once X has more random rows than dW has rank; with Q (o, r) their orthonormal
basis, dW = Q (Q^T dW) = B A.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_lite.calibration.statistics import generator
from lora_lite.errors import NotAffineError, StateError
from lora_lite.layers.linear import shape
from lora_lite.merging.fold import adapted_layers, relative
from lora_lite.merging.plain_weights import AFFINE_TOLERANCE, refuse_not_affine, twin
from lora_lite.runtime.coefficient import scale
from lora_lite.runtime.state import refuse_merged, root_of
from lora_lite.runtime.transaction import Transaction

ROWS = 64  # random rows that are tried first
ROUNDS = 6  # of subspace iteration
EXACT = 1024  # inputs up to which errors are exact; beyond, they are estimated from random rows
NOISE = 64 * torch.finfo(torch.float64).eps


@dataclass(frozen=True)
class LowRankChange:
    """The change of one layer's weight and bias: W' = W + B A and b' = b + bias. It unpacks as (B, A).

    Attributes:
        B: (o, r), orthonormal columns; fp64, on the CPU. r = 0 where nothing changes.
        A: (r, i).
        bias: (o), or None where the bias does not change.
        error: ||dW - B A|| / ||dW|| (Frobenius): rounding alone, unless a rank was asked for. Of a layer with more than
            1,024 inputs it is estimated from 64 random ones.
    """

    B: Tensor
    A: Tensor
    bias: Tensor | None
    error: float

    @property
    def rank(self) -> int:
        """r."""
        return self.B.shape[1]

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.B, self.A))


def low_rank(model: nn.Module, name: str | None = None, rank: int | None = None) -> dict[str, LowRankChange]:
    """The change that each layer's stack makes at the coefficients in force, as exact low-rank factors, by path.

    Nothing is written, and dW (o, i) is never formed: in fp64 on the CPU, a layer takes one pass of 64 random rows
    (more where its rank is higher) and one backward pass.

    Args:
        model: the model.
        name: the change of this adapter alone, the others at 0. None: of all of them together.
        rank: the best part of at most this rank of each layer's change, with its error. None: the exact rank.

    Raises:
        NotAffineError: a stack whose change is not affine in the layer's input.
        StateError: nothing attached, merged, a coefficient with one value per row, or values that are not finite.
        TargetError: a weight that cannot be read: sharded, offloaded, or of a kind that cannot be dequantised.
        ValueError: a rank below 1.
    """
    if rank is not None and rank < 1:
        raise ValueError(f"low_rank: rank = {rank} must be at least 1; None stands for the exact rank")
    root, state = root_of(model, name)
    refuse_merged(state, "low_rank")
    names = list(state.adapters) if name is None else [name]
    others = dict.fromkeys((each for each in state.adapters if each not in names), 0.0)
    changes: dict[str, LowRankChange] = {}
    with Transaction(root), scale(root, others):
        for path, layer in adapted_layers(root, state, names).items():
            changes[path] = change_of(layer, path, rank)
    return changes


def change_of(layer: nn.Module, path: str, rank: int | None = None, most: int | None = None) -> LowRankChange:
    """The factors of one adapted layer's change; rank, error and what raises as in `low_rank`.

    most: a rank above which no exact factors are wanted: those of a higher rank are then not whole (see `error`).
    """
    refuse_not_affine(layer, path)
    with torch.inference_mode(False), torch.device("cpu"):
        change = _Change(layer, path)
        Q = change.range(most) if rank is None else change.leading(min(rank, *shape(layer)))
        A = change.rows(Q)
        if rank is not None:
            U, S, Vh = torch.linalg.svd(A, full_matrices=False)
            r = min(rank, change.above_noise(S))
            Q, A = Q @ U[:, :r], S[:r, None] * Vh[:r]
        moves_bias = bool(change.offset.any())
        return LowRankChange(Q, A, change.offset if moves_bias else None, change.error(Q, A))


class _Change:
    """The two products with the change of a layer's stack, f in fp64 on the CPU."""

    def __init__(self, layer: nn.Module, path: str) -> None:
        (self.i, self.o), self.f, self.rng = shape(layer), twin(layer), generator(0, path)
        self.offset = torch.zeros(self.o, dtype=torch.float64)
        self.offset = self.columns(torch.zeros(1, self.i, dtype=torch.float64))[:, 0]
        both = self._random(8)
        with torch.no_grad():
            exact = self.f(both)
        if not torch.isfinite(exact).all():
            raise StateError(
                f"{path}: its outputs are not finite; look at the adapter's tensors and the layer's weight"
            )
        error = self.columns(both[:4]) + self.columns(both[4:]) - self.columns(both[:4] + both[4:])
        if not error.norm() <= AFFINE_TOLERANCE * exact.norm():
            raise NotAffineError(
                f"{path}: the change of its stack is not affine (measured on random inputs), so it has no factors"
            )

    def _random(self, k: int) -> Tensor:
        return torch.randn(k, self.i, dtype=torch.float64, generator=self.rng)

    @torch.no_grad()
    def columns(self, X: Tensor) -> Tensor:
        """dW X^T (o, k), of rows X (k, i)."""
        return (self.f(X) - F.linear(X, self.f.weight, self.f.bias) - self.offset).T

    @torch.enable_grad()
    def rows(self, Q: Tensor) -> Tensor:
        """Q^T dW (r, i), of columns Q (o, r)."""
        X = torch.zeros(Q.shape[1], self.i, dtype=torch.float64, requires_grad=True)
        (pulled,) = torch.autograd.grad(self.f(X), X, Q.T)
        return pulled - Q.T @ self.f.weight.detach()

    @torch.no_grad()
    def above_noise(self, S: Tensor) -> int:
        """How many singular values are larger than what rounding makes of W, of b and of the change of b."""
        bias = self.offset if self.f.bias is None else self.offset.abs() + self.f.bias.abs()
        size = float(self.f.weight.norm() + bias.norm())
        return int((NOISE * (size + float(S[0])) < S).sum()) if len(S) else 0

    def range(self, most: int | None = None) -> Tensor:
        """An orthonormal basis (o, r) of dW's columns; of more than `most` of them, but not all, where r is larger."""
        whole = min(self.i, self.o)
        enough = whole if most is None else min(whole, most + 1)
        Y = self.columns(self._random(min(ROWS, whole)))
        while True:
            Q, S, _ = torch.linalg.svd(Y, full_matrices=False)
            r = self.above_noise(S)
            if r < Y.shape[1] or Y.shape[1] >= enough:
                return Q[:, :r]
            Y = torch.cat([Y, self.columns(self._random(min(Y.shape[1], whole - Y.shape[1])))], dim=1)

    def leading(self, rank: int) -> Tensor:
        """An orthonormal basis (o, some more than rank) that holds dW's leading left singular vectors."""
        X = self._random(min(rank + max(8, rank // 2), self.i, self.o))
        for _ in range(ROUNDS):
            Q = torch.linalg.qr(self.columns(X)).Q
            X = torch.linalg.qr(self.rows(Q).T).Q.T
        return torch.linalg.qr(self.columns(X)).Q

    def error(self, B: Tensor, A: Tensor) -> float:
        """||dW - B A|| / ||dW||."""
        X = torch.eye(self.i, dtype=torch.float64) if self.i <= EXACT else self._random(ROWS)
        return relative(B @ (A @ X.T), self.columns(X))
