"""S-space as a textbook would write it, in fp64: the weight split into U S P and a residual, with bases from full
decompositions and roots of matrices, and each core acting on p = P x. Independent of the library's code."""

import math
from typing import Any

import numpy as np
import scipy.linalg
import torch
from torch import Tensor

Tensors = dict[str, Tensor]
F64 = torch.float64


def root(C: Tensor) -> Tensor:
    """The symmetric square root."""
    return torch.from_numpy(np.real(scipy.linalg.sqrtm(C.numpy())))


def basis(kind: str, W: Tensor, X: Tensor, r: int, eps: float = 1e-3) -> tuple[Tensor, Tensor, Tensor]:
    """(U, S, P) of r directions, by falling S, for a layer that read X (tokens, i)."""
    if kind == "svd" or kind.startswith("wanda"):
        U, S, P = torch.linalg.svd(W, full_matrices=False)
        if kind != "svd":
            h = X @ W.T @ U
            score = h.abs().mean(0) if "mean_abs" in kind else S * (X @ P.T).square().mean(0).sqrt()
            chosen = sorted(score.argsort(descending=True)[:r].tolist())
            U, S, P = U[:, chosen], S[chosen], P[chosen]
        return U[:, :r], S[:r], P[:r]
    C = X.T @ X / len(X)
    C = torch.diag(C.diagonal()) if kind.startswith("asvd") else C
    C = C + eps * torch.eye(len(C), dtype=C.dtype)
    weigh = C if "power=1.0" in kind else root(C)
    U, S, Vh = torch.linalg.svd(W @ weigh, full_matrices=False)
    return U[:, :r], S[:r], (Vh @ torch.linalg.inv(weigh))[:r]


def aligned(found: tuple[Tensor, Tensor, Tensor], U0: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The directions with U0's signs, which no definition fixes."""
    U, S, P = found
    sign = (U * U0).sum(0).sign()
    return U * sign, S, P * sign.unsqueeze(1)


def rotation(rot_T: Tensor, block_size: int, max_angle: float, c: float) -> Tensor:
    """R(c) (r, r): each block a Cayley transform by an explicit inverse, T filled row by row."""
    L = 2 * math.tan(max_angle / 2)
    blocks = []
    for entries in rot_T:
        rows, at = [], 0
        for row in range(block_size):
            count = block_size - 1 - row
            rows.append(torch.cat([entries.new_zeros(row + 1), entries[at : at + count]]))
            at += count
        T = torch.stack(rows)
        X = torch.tanh(c * (T - T.T) / 2 / L) * L / 2
        eye = torch.eye(block_size, dtype=T.dtype)
        blocks.append(torch.linalg.inv(eye - X) @ (eye + X))
    return torch.block_diag(*blocks)


def new_scale(g: Tensor, c: float) -> Tensor:
    """1 + elu(c g)."""
    return torch.where(c * g > 0, 1 + c * g, torch.exp(c * g))


def rotated(p: Tensor, S: Tensor, t: Tensors, cfg: Any, c: float) -> Tensor:
    kind, scale = cfg.rotate_basis, S + c * t["d"]

    def R(name: str) -> Tensor:
        return rotation(t[name], cfg.block_size, cfg.max_rotation_angle, c)

    if kind == "none":
        return p * scale
    if kind == "V":
        return (p @ R("rot_T").T) * scale
    if kind == "U":
        return (p * scale) @ R("rot_T")  # R^T acts on columns, so R on rows
    return ((p @ R("rot_T").T) * scale) @ R("rot_T_u")


def core(method: str, p: Tensor, S: Tensor, t: Tensors, cfg: Any, c: float) -> Tensor:
    """What the part U S P of the weight becomes, in its coordinates: S p at c = 0."""
    h = p * S
    if method == "antipasto_rot":
        return rotated(p, S, t, cfg, c)
    if method == "antipasto_ablate":
        Q = torch.linalg.qr(t["C"])[0]
        return h @ (torch.eye(len(S), dtype=F64) - c * Q @ torch.diag(t["alpha"].clamp(0, 1)) @ Q.T)
    if method == "lora_xs":
        return h + c * (1 if cfg.alpha is None else cfg.alpha / len(S)) * h @ t["R"].T
    if method == "antipasto_arrow":
        b = cfg.block
        top = h[..., :b] @ (torch.eye(b, dtype=F64) + c * t["M"]).T
        return torch.cat([top, h[..., b:] * new_scale(t["g"], c)], dim=-1)
    g = t["g"].clamp(max=0) if cfg.suppress_only else t["g"]
    scaled = p * S * new_scale(g, c)
    return scaled + c * p @ t["A"].T @ t["B"].T if method == "antipasto_dplr" else scaled


def layer(
    method: str, x: Tensor, W: Tensor, b: Tensor, USP: tuple[Tensor, Tensor, Tensor], t: Tensors, cfg: Any, c: float
) -> Tensor:
    """y' = x W_res^T + core(S, x P^T) U^T + b with W_res = W - U S P."""
    U, S, P = USP
    W_res = W - U @ torch.diag(S) @ P
    return x @ W_res.T + core(method, x @ P.T, S, t, cfg, c) @ U.T + b
