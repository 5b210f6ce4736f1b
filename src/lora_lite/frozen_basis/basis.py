"""Bases of the S-space family: the name says what is orthogonalised, a `Basis` says how.

One formula serves all: U are the leading eigenvectors of W C W^T and S the roots of its eigenvalues, for some second
moment C of the layer's inputs. Neither an inverse nor a symmetric root of C is needed: the input projector is
S^-1 U^T W.
"""

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_lite.calibration.statistics import STATISTICS, Statistics
from lora_lite.config import is_number, require
from lora_lite.errors import CalibrationError
from lora_lite.layers.linear import dense
from lora_lite.linalg import canonical_signs, gram, leading_eigenvectors, left_directions, partners, singular_directions

ORTHONORMAL = 1e-5
NEGLIGIBLE = 1e-7  # of the largest S: below the rounding of fp32, such directions carry nothing
Function = Callable[..., tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Kind:
    """A registered kind of basis.

    Attributes:
        make: (W (o, i) in fp32 or fp64, statistics) and those of r, power, pool and eps that it names -> U (o, >= r)
            and S.
        needs: names of the statistics that it reads, for given settings.
    """

    make: Function
    needs: Callable[["Basis"], frozenset[str]]

    @property
    def settings(self) -> frozenset[str]:
        """The settings of a `Basis` that it reads."""
        return frozenset(inspect.signature(self.make).parameters) & {"power", "pool", "eps"}


KINDS: dict[str, Kind] = {}


def register_basis(
    kind: str, needs: Sequence[str] | Callable[["Basis"], Sequence[str]] = ()
) -> Callable[[Function], Function]:
    """Decorator that makes a function known as the basis `kind`: `AntiPaSTOConfig(basis=kind)`.

    The function is given the weight W (o, i) in fp32 (fp64 if it is) and the layer's `Statistics` (None, if it needs
    none), and returns U (o, n) with n >= r orthonormal columns, the most important first, and S (n,) >= 0. Those of
    `r`, `power`, `pool` and `eps` that it names as parameters are passed as well.

    Args:
        kind: its name.
        needs: statistics to take (keys of `lora_lite.calibration.statistics.STATISTICS`), or a function of the `Basis`.

    Raises:
        ValueError: the name is taken by another function, or a statistic is unknown.
    """

    def decorate(make: Function) -> Function:
        known = KINDS.get(kind)
        if known is not None and (known.make.__module__, known.make.__qualname__) != (
            make.__module__,
            make.__qualname__,
        ):
            raise ValueError(f"register_basis({kind!r}): already taken by {known.make.__qualname__}")
        if not callable(needs) and (unknown := set(needs) - set(STATISTICS)):
            raise ValueError(
                f"register_basis({kind!r}): no statistic {sorted(unknown)}; there are {sorted(STATISTICS)}"
            )
        KINDS[kind] = Kind(make, lambda basis: frozenset(needs(basis) if callable(needs) else needs))
        return make

    return decorate


@dataclass(frozen=True)
class Basis:
    """Which directions of a layer's output a core works on.

    Args:
        kind: "svd" (of W), "wanda" (the singular directions of W that the data uses most), "asvd" (of W with its
            columns weighed by the size of their inputs), "corda" (of W weighed by the second moment of its inputs), or
            a kind registered by `register_basis`.
        power: asvd and corda weigh by C^power: 1/2 gives the best rank-r part under the data in least squares, 1 what
            CorDA's paper prints and peft computes.
        pool: wanda's score of a direction: the "rms" of the layer's coordinate along it, or "mean_abs".
        eps: added to the diagonal of C.

    Raises:
        ValueError: an unknown kind, a setting out of range, or one that the kind does not read.
    """

    kind: str = "svd"
    power: float = 0.5
    pool: str = "rms"
    eps: float = 1e-3

    def __post_init__(self) -> None:
        require(self.kind in KINDS, self, "kind", f"one of {', '.join(KINDS)} (ll.register_basis adds others)")
        require(is_number(self.power, 0.0) and self.power > 0, self, "power", "a number > 0")
        require(self.pool in ("rms", "mean_abs"), self, "pool", "'rms' or 'mean_abs'")
        require(is_number(self.eps, 0.0), self, "eps", "a number >= 0")
        for field in self._changed():
            read = sorted(KINDS[self.kind].settings)
            require(field in read, self, field, f"left alone: basis {self.kind!r} reads {read or 'no setting'}")

    def _changed(self) -> list[str]:
        settings = dataclasses.fields(self)[1:]
        return [field.name for field in settings if getattr(self, field.name) != field.default]

    def __str__(self) -> str:
        """`kind`, or `kind:setting=value,...`; `parse` is the inverse."""
        settings = ",".join(f"{name}={getattr(self, name)}" for name in self._changed())
        return f"{self.kind}:{settings}" if settings else self.kind

    @classmethod
    def parse(cls, text: "str | Basis") -> "Basis":
        """A `Basis` from what `str` gives, such as "corda:power=1.0". Raises `ValueError` for anything else."""
        if isinstance(text, Basis):
            return text
        kind, _, rest = text.partition(":") if isinstance(text, str) else (text, "", "")
        values: dict[str, Any] = {}
        for item in filter(None, rest.split(",")):
            name, _, value = item.partition("=")
            try:
                values[name.strip()] = value.strip() if name.strip() == "pool" else float(value)
            except ValueError as error:
                raise ValueError(f"basis {text!r}: {item!r} is no setting=number") from error
        if unknown := set(values) - {field.name for field in dataclasses.fields(cls)[1:]}:
            raise ValueError(f"basis {text!r}: unknown settings {sorted(unknown)}; e.g. 'corda:power=1.0,eps=0.01'")
        return cls(kind, **values)

    @property
    def needs(self) -> frozenset[str]:
        """Names of the statistics that it reads."""
        return KINDS[self.kind].needs(self)

    def of(self, layer: nn.Module, stats: Statistics | None, r: int) -> tuple[Tensor, Tensor]:
        """U (o, r) with orthonormal columns, and S (r,) >= 0, of a layer; 0 where S is negligible.

        Raises:
            CalibrationError: fewer tokens than r. ValueError: a registered function that returned something else.
        """
        if self.needs and stats is not None and stats.tokens < r:
            raise CalibrationError(
                f"{stats.tokens} calibration tokens cannot determine r = {r} directions; give more data"
            )
        kind = KINDS[self.kind]
        named = inspect.signature(kind.make).parameters
        settings = {name: getattr(self, name) for name in kind.settings} | ({"r": r} if "r" in named else {})
        W = dense(layer)
        W = W.cpu() if W.device.type == "mps" else W
        U, S = kind.make(W.to(torch.promote_types(W.dtype, torch.float32)), stats, **settings)
        self._check(U, S, W.shape[0], r)
        U, S = U[:, :r], S[:r]
        return canonical_signs(U), torch.where(S / S.max() > NEGLIGIBLE, S, 0.0)

    def _check(self, U: Tensor, S: Tensor, o: int, r: int) -> None:
        ok = U.ndim == 2 and U.shape[0] == o and U.shape[1] >= r and S.shape == U.shape[1:]
        if not ok:
            raise ValueError(
                f"basis {self.kind!r} returned U {tuple(U.shape)} and S {tuple(S.shape)}, expected ({o}, n) and (n,) "
                f"with n >= r = {r}"
            )
        U = U[:, :r].double()
        error = float((U.T @ U - torch.eye(r, dtype=U.dtype, device=U.device)).abs().max())
        if not (error <= ORTHONORMAL and bool((S >= 0).all())):
            raise ValueError(
                f"basis {self.kind!r}: U^T U differs from I by {error:.1e} (allowed: {ORTHONORMAL:.0e}), or S is < 0"
            )


@register_basis("svd")
def svd(W: Tensor, stats: Statistics | None, r: int) -> tuple[Tensor, Tensor]:
    """The leading singular directions of W (C = I)."""
    return left_directions(W, r)


@register_basis("wanda", needs=lambda basis: ["response" if basis.pool == "rms" else "coordinate_abs"])
def wanda(W: Tensor, stats: Statistics, r: int, pool: str) -> tuple[Tensor, Tensor]:
    """The r singular directions of W with the largest coordinates h = u^T (y - b) on the data, by singular value.

    Their rms is S_j rms(x . v_j), a score like that of Wanda (Sun et al. 2023, arXiv:2306.11695), for directions.
    """
    U, S, _ = singular_directions(W, min(W.shape))
    score = stats.mean("coordinate_abs").to(S.device) if pool == "mean_abs" else _energy(W, U, stats)
    # In S's order: cores that mix neighbouring or leading directions go by it.
    chosen = score.argsort(descending=True, stable=True)[:r].sort().values
    return U[:, chosen], S[chosen]


def _energy(W: Tensor, U: Tensor, stats: Statistics) -> Tensor:
    """E (u_j^T (y - b))^2 for each column of U."""
    C, U = stats.mean("response").to(W.device), U.double()
    A = U if stats.has("output_moment") else W.double().T @ U
    return (A * (C @ A)).sum(0)


@register_basis("asvd", needs=["input_square"])
def asvd(W: Tensor, stats: Statistics, r: int, power: float, eps: float) -> tuple[Tensor, Tensor]:
    """C = diag(E x_j^2 + eps): columns of W weighed by the size of their inputs.

    After Yuan et al. 2023, arXiv:2312.05821, who take a power of the mean |x_j|.
    """
    C = stats.mean("input_square").to(W) + eps
    return left_directions(W * C**power, r)


@register_basis("corda", needs=lambda basis: ["response" if basis.power == 0.5 else "input_moment"])
def corda(W: Tensor, stats: Statistics, r: int, power: float, eps: float) -> tuple[Tensor, Tensor]:
    """C = E[x x^T] + eps I: W weighed by all of the inputs' second moment (Yang et al. 2024, arXiv:2406.05223)."""
    if power == 1:
        return left_directions(W @ stats.mean("input_moment").to(W) + eps * W, r)
    if power == 0.5 and stats.has("output_moment"):
        U, values = leading_eigenvectors(stats.mean("output_moment").to(W.device) + eps * gram(W), r)
        return U, values.sqrt()
    # Any F with F F^T = C^2p serves: the Cholesky factor, or one made of eigenvectors, for any power and any C.
    C = stats.mean("input_moment").to(W.device, torch.float64)
    L, failed = torch.linalg.cholesky_ex(C + eps * torch.eye(len(C), dtype=C.dtype, device=C.device))
    if power == 0.5 and not failed:
        V, _ = leading_eigenvectors(L.T @ gram(W.T).to(L) @ L, r)
        return partners(W, L @ V)
    V, values = stats.eigen("input_moment")
    return left_directions(W.double() @ (V.to(W.device) * (values + eps).to(W.device) ** power), r)
