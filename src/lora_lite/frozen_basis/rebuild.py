"""Files without a basis: which singular directions of W they were, and a sketch that shows whether W still has them.

SVD signs, and with equal singular values the directions themselves, are the machine's choice. So nothing rebuilt is
trusted: signs come from the sketch, and a direction that does not fit it is refused.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from lora_lite.calibration.statistics import generator
from lora_lite.linalg import left_directions

PROBES = 8
SAME = 1e-3  # a direction turned by that much (in radians, about) is another one


def sketch(U: Float[Tensor, "o r"]) -> Float[Tensor, "p r"]:
    """Z^T U for `PROBES` seeded random vectors Z (o, p)."""
    Z = torch.randn(U.shape[0], PROBES, generator=generator(0, "basis"), dtype=torch.float32, device="cpu")
    return (Z.T.double() @ U.cpu().double()).float()


def indices(W: Float[Tensor, "o i"], U: Float[Tensor, "o r"]) -> Float[Tensor, " r"]:
    """Which singular direction of W each column of U is. Raises `ValueError` where one is none."""
    cosines = (left_directions(W, min(W.shape))[0].double().T @ U.to(W.device).double()).abs()
    best, index = cosines.max(0)
    if not bool((best > 1 - SAME**2).all()):
        raise ValueError(
            f"direction {int(best.argmin())} of the basis is no singular direction of W (cosine "
            f"{float(best.min()):.4f}), so W alone does not determine it; save with basis=True"
        )
    return index.to("cpu", torch.float32)


def rebuilt(
    W: Float[Tensor, "o i"], index: Float[Tensor, " r"], expected: Float[Tensor, "p r"]
) -> Float[Tensor, "o r"]:
    """The directions `index` of W with the signs of the sketch `expected`.

    Raises:
        ValueError: an index that W does not have, or a direction that differs from the sketched one.
    """
    if not bool(((index >= 0) & (index < min(W.shape)) & (index == index.round())).all()):
        raise ValueError("holds indices of directions that this layer does not have")
    U = left_directions(W, int(index.max()) + 1)[0][:, index.long().to(W.device)].cpu()
    here = sketch(U)
    sign = torch.where((here * expected).sum(0) < 0, -1.0, 1.0)
    error = (here * sign - expected).norm(dim=0) / expected.norm(dim=0)
    if not bool((error <= SAME).all()):
        raise ValueError(
            f"the basis rebuilt from this model differs from the one trained on ({int((error > SAME).sum())} of "
            f"{len(index)} directions, by up to {float(error.max()):.1e}); load it into the very weights and dtype it "
            "was trained on, or save it with basis=True"
        )
    return U * sign
