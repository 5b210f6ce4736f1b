"""The papers' equations, written out with dense fp64 matrices, one a method.

They are independent of the library's code: full singular value decompositions, explicit reflections and rotation
matrices, norms of formed products.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Tensors = dict[str, Tensor]
Weights = tuple[Tensor, Tensor]


# Each: (W, b, trained tensors, all tensors as they were at first, config) -> (W', b').


def lora(W: Tensor, b: Tensor, t: Tensors, t0: Tensors, cfg: Any) -> Weights:
    return W + cfg.alpha / cfg.r * t["B"] @ t["A"], b


def pissa(W: Tensor, b: Tensor, t: Tensors, t0: Tensors, cfg: Any) -> Weights:
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    residual = U[:, cfg.r :] @ torch.diag(S[cfg.r :]) @ Vh[cfg.r :]
    return residual + cfg.alpha / cfg.r * t["B"] @ t["A"], b


def dora(W: Tensor, b: Tensor, t: Tensors, t0: Tensors, cfg: Any) -> Weights:
    V = W + cfg.alpha / cfg.r * t["B"] @ t["A"]
    # Section 4.3: the norm is a constant for the gradient.
    return t["m"].unsqueeze(1) * V / V.norm(dim=1, keepdim=True).detach(), b


def delora(W: Tensor, b: Tensor, t: Tensors, t0: Tensors, cfg: Any) -> Weights:
    def update(t: Tensors) -> Tensor:
        Xi = torch.diag(1 / (t["A"].norm(dim=1) * t["B"].norm(dim=0)))
        return t["lam"] / cfg.r * t["B"] @ Xi @ t["A"] @ torch.diag(W.norm(dim=0))

    return W + update(t) - update(t0), b


def hra(W: Tensor, b: Tensor, t: Tensors, t0: Tensors, cfg: Any) -> Weights:
    return W @ reflections(t["U"]), b


def reflections(U: Tensor) -> Tensor:
    """H_1 H_2 ... H_r, one factor at a time."""
    H = torch.eye(U.shape[1], dtype=U.dtype)
    for u in U:
        H = H @ (torch.eye(U.shape[1], dtype=U.dtype) - 2 * torch.outer(u, u) / (u @ u))
    return H


def ia3(W: Tensor, b: Tensor, t: Tensors, t0: Tensors, cfg: Any) -> Weights:
    return torch.diag(t["l"]) @ W, t["l"] * b


def ia3_ff(W: Tensor, b: Tensor, t: Tensors, t0: Tensors, cfg: Any) -> Weights:
    return W @ torch.diag(t["l"]), b


def road(W: Tensor, b: Tensor, t: Tensors, t0: Tensors, cfg: Any) -> Weights:
    R = rotation(t["theta"], t["alpha"], cfg.group_size)
    return R @ W, R @ b


def rotation(theta: Tensor, alpha: Tensor, group_size: int) -> Tensor:
    """R, entry by entry: eq. 2 (one angle and scale a pair) or eq. 3 with table 1 (one a row, one an entry)."""
    half = group_size // 2
    rows = []
    for group in range(theta.shape[0]):
        for row in range(2):
            for j in range(half):
                kinds = theta.shape[1]
                cos, sin = {1: (0, 0), 2: (row, row), 4: (row, 2 + row)}[kinds]
                first, second = group * group_size + j, group * group_size + j + half
                entries = torch.zeros(theta.shape[0] * group_size, dtype=theta.dtype)
                own, other, sign = (second, first, 1) if row else (first, second, -1)
                entries[own] = alpha[group, cos, j] * torch.cos(theta[group, cos, j])
                entries[other] = sign * alpha[group, sin, j] * torch.sin(theta[group, sin, j])
                rows.append(entries)
    return torch.stack(rows)


def lora_xs(W: Tensor, b: Tensor, t: Tensors, t0: Tensors, cfg: Any) -> Weights:
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    signs = (U[:, : cfg.r] * t0["U"]).sum(0).sign()  # of singular vectors, which no definition fixes
    U, Vh = U[:, : cfg.r] * signs, Vh[: cfg.r] * signs.unsqueeze(1)
    return W + cfg.alpha / cfg.r * U @ t["R"] @ torch.diag(S[: cfg.r]) @ Vh, b


EQUATIONS: dict[str, Callable[..., Weights]] = {
    "lora": lora, "pissa": pissa, "dora": dora, "delora": delora, "hra": hra, "eva": lora, "ia3": ia3,
    "ia3_ff": ia3_ff, "road": road, "lora_xs": lora_xs,
}  # fmt: skip
