"""The papers' equations, written out with dense fp64 matrices, one a method.

They are independent of the library's code: full singular value decompositions, explicit reflections and rotation
matrices, norms of formed products.
"""

import math
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


def projector(W: Tensor, t0: Tensors) -> Tensor:
    """P with U S P the part of W that U spans. Which U, and with which S, test_sspace_truth.py proves."""
    return torch.diag(1 / t0["S"]) @ t0["U"].T @ W


def lora_xs(W: Tensor, b: Tensor, t: Tensors, t0: Tensors, cfg: Any) -> Weights:
    scaling = 1 if cfg.alpha is None else cfg.alpha / cfg.r
    return W + scaling * t0["U"] @ t["R"] @ torch.diag(t0["S"]) @ projector(W, t0), b


def antipasto(W: Tensor, b: Tensor, t: Tensors, t0: Tensors, cfg: Any) -> Weights:
    U, S, P = t0["U"], t0["S"], projector(W, t0)
    gain = torch.where(t["g"] > 0, 1 + t["g"], torch.exp(t["g"]))
    return W - U @ torch.diag(S) @ P + U @ torch.diag(S * gain) @ P, b


def dplr(W: Tensor, b: Tensor, t: Tensors, t0: Tensors, cfg: Any) -> Weights:
    return antipasto(W, b, t, t0, cfg)[0] + t0["U"] @ t["B"] @ t["A"] @ projector(W, t0), b


def arrow(W: Tensor, b: Tensor, t: Tensors, t0: Tensors, cfg: Any) -> Weights:
    gain = torch.where(t["g"] > 0, t["g"], torch.exp(t["g"]) - 1)
    core = torch.block_diag(t["M"], torch.diag(gain))
    return W + t0["U"] @ core @ t0["U"].T @ W, b


def ablate(W: Tensor, b: Tensor, t: Tensors, t0: Tensors, cfg: Any) -> Weights:
    Q = t0["U"] @ torch.linalg.qr(t["C"])[0]
    return (torch.eye(len(W), dtype=W.dtype) - Q @ torch.diag(t["alpha"].clamp(0, 1)) @ Q.T) @ W, b


def rot(W: Tensor, b: Tensor, t: Tensors, t0: Tensors, cfg: Any) -> Weights:
    """Both sides: U R_u^T diag(S + d) R P in the place of U diag(S) P."""
    U, S, P = t0["U"], t0["S"], projector(W, t0)
    core = cayley(t["rot_T_u"], cfg).T @ torch.diag(S + t["d"]) @ cayley(t["rot_T"], cfg)
    return W - U @ torch.diag(S) @ P + U @ core @ P, b


def cayley(rot_T: Tensor, cfg: Any) -> Tensor:
    """R, block by block, by an explicit inverse."""
    bs, L = cfg.block_size, 2 * math.tan(cfg.max_rotation_angle / 2)
    blocks = []
    for entries in rot_T:
        T = torch.zeros(bs, bs, dtype=rot_T.dtype)
        T[tuple(torch.triu_indices(bs, bs, 1))] = entries
        X = L / 2 * torch.tanh((T - T.T) / 2 / L)
        blocks.append(torch.linalg.inv(torch.eye(bs, dtype=T.dtype) - X) @ (torch.eye(bs, dtype=T.dtype) + X))
    return torch.block_diag(*blocks)


EQUATIONS: dict[str, Callable[..., Weights]] = {
    "lora": lora, "pissa": pissa, "dora": dora, "delora": delora, "hra": hra, "eva": lora, "ia3": ia3,
    "ia3_ff": ia3_ff, "road": road, "lora_xs": lora_xs, "antipasto": antipasto, "antipasto_corda": antipasto,
    "antipasto_asvd": antipasto, "antipasto_dplr": dplr, "antipasto_arrow": arrow, "antipasto_ablate": ablate,
    "antipasto_rot": rot,
}  # fmt: skip
