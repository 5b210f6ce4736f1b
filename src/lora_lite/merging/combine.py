"""Several attached adapters made one, a plain LoRA, by arithmetic on their changes.

dW_k (o, i) is the change that adapter k makes alone at c = 1, and w_k its weight. T is what the new adapter is to do:

    sum, svd    T = sum_k w_k dW_k                      as factors: B = [w_k B_k], A = [A_k], compressed by QR and SVD
    ties        T = sum_{k in M} t_k / |M|              t_k = w_k trim(dW_k), M = {k: sign(t_k) = sign(sum_k t_k)}
    dare        T = sum_k w_k m_k dW_k / density        m_k in {0, 1}, 1 with probability density

ties: Yadav et al. 2023, arXiv:2306.01708; trim keeps the share `density` of a layer's entries that are largest,
and M is chosen for each entry. dare: Yu et al. 2023, arXiv:2311.03099. Both form T, in fp64, and keep its best part of
the rank asked for. The change of a layer's bias is treated in the same way, as a tensor of its own.
"""

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor, nn

from lora_lite.adapter import adapters_on, derive
from lora_lite.calibration.statistics import generator
from lora_lite.errors import LoraLiteWarning, StateError
from lora_lite.layers.linear import execution_device, is_quantized, shape
from lora_lite.layers.targets import Target
from lora_lite.merging.fold import adapted_layers
from lora_lite.merging.low_rank import EXACT, NOISE, ROUNDS, LowRankChange, change_of
from lora_lite.methods.lora import LoRA, LoRAConfig
from lora_lite.runtime.attach import commit
from lora_lite.runtime.attachment import Attachment
from lora_lite.runtime.coefficient import scale
from lora_lite.runtime.readiness import ready_state
from lora_lite.runtime.state import State, root_of
from lora_lite.runtime.transaction import Transaction

METHODS = ("sum", "svd", "ties", "dare")
ROUNDING = 1e-6  # an error up to this is none
NOTED = 0.01  # an error beyond this is warned of


@dataclass(frozen=True, repr=False)
class Combined(Attachment):
    """What `combine` attached.

    Attributes:
        errors: ||T - B A|| / ||T|| (Frobenius) by layer, of what the rank left out; rounding for "sum".
    """

    errors: dict[str, float] = field(default_factory=dict)

    def _totals(self) -> list[str]:
        path, worst = max(self.errors.items(), key=lambda each: each[1])
        ranks = [adapter.cfg.r for adapter in self.targets.values()]
        lines = [f"ranks {min(ranks)} to {max(ranks)}; weight error up to {worst:.2g} (||T - B A|| / ||T||, at {path})"]
        return [*super()._totals(), *lines]


def combine(
    model: nn.Module,
    weights: Mapping[str, float],
    method: str = "sum",
    rank: int | None = None,
    density: float = 0.5,
    seed: int = 0,
    name: str = "combined",
) -> Combined:
    """Make one adapter, a plain LoRA, of several attached ones, and let it act in their place.

    The sources stay attached, with their coefficients set to 0 (`ll.scale(model, {"a": 1.0})` brings one back, `detach`
    takes it off); other adapters act on as they did. Coefficients in force before do not count: every source is taken
    at c = 1, times its weight. Each layer has a rank of its own, and alpha = r; one that does not change has none.

    Args:
        model: the model that they are attached to.
        weights: adapter name -> w_k, any finite number.
        method: "sum", sum_k w_k dW_k exactly; "svd", its best part of a rank; "ties", which drops small entries and
            those whose sign loses the vote; "dare", which drops entries at random. Of adapters that act on the layer's
            input (HRA, IA3-FF), it is the change that each makes alone that counts, so that a sum is not their stack.
        rank: most rank of a layer. None: for "svd" the largest rank of a source's change there, for "ties" and "dare"
            the sum of them. "sum" takes none.
        density: share of entries kept by "ties" and "dare", in (0, 1].
        seed: of what "dare" drops, with the layer's path.
        name: of the new adapter.

    Returns:
        A `Combined`, an `Attachment` whose summary and `errors` say how far each layer is from T; the library warns
        where that is more than 1%.

    Raises:
        StateError: no such adapter, merged, a name that is taken, `train_also` weights (which no weight can scale),
            nothing changed, or within a `with ll.scale(...)` block that would keep the sources' coefficients.
        NotAffineError: a source whose change no matrix equals. TargetError: a weight that cannot be read.
        ValueError: a method, weight, rank or density that there is none of. After any error the model is as it was.
    """
    _check_arguments(weights, method, rank, density)
    root, _ = root_of(model)
    state = ready_state(root, name)
    for each in weights:
        _check_source(root, state, each)
    with Transaction(root) as undo:
        layers = adapted_layers(root, state, list(weights))
        made: dict[str, LowRankChange] = {}
        for path, layer in layers.items():
            changes = _changes(root, state, layer, path, list(weights))
            parts = [(float(weights[each]), change) for each, change in changes.items()]
            change = _combined(parts, path, method, rank, density, seed)
            if change.rank or change.bias is not None:
                made[path] = change
        if not made:
            raise StateError("combine: these adapters, with these weights, change nothing; train them first")
        targets = [_target(path, layers[path], change) for path, change in made.items()]
        configs = list(dict.fromkeys(target.cfg for target in targets))
        targets = [replace(target, index=configs.index(target.cfg)) for target in targets]
        att = commit(root, state, name, configs, targets, {})
        _silence(root, state, list(weights), undo)
        errors = {path: each.error for path, each in made.items()}
        result = Combined(**{key: getattr(att, key) for key in att.__dataclass_fields__}, errors=errors)
    if (worst := max(errors.values())) > NOTED:
        warnings.warn(
            f"combine: at the ranks asked for, {worst:.2g} of the worst layer's change is lost ({method}, ||T - B A|| "
            "/ ||T||; see `errors` of what was returned); give a higher rank= for less",
            LoraLiteWarning,
            stacklevel=2,
        )
    return result


def _check_arguments(weights: Mapping[str, float], method: str, rank: int | None, density: float) -> None:
    if method not in METHODS:
        raise ValueError(f"combine: method = {method!r} must be one of {', '.join(METHODS)}")
    if not weights:
        raise ValueError("combine: weights names no adapter; give for instance {'a': 0.7, 'b': 0.3}")
    for each, weight in weights.items():
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
            raise ValueError(f"combine: the weight of {each!r} is {weight!r}; give a finite number")
    if rank is not None and (method == "sum" or rank < 1):
        hint = 'is not for "sum", which is exact; give method="svd"' if method == "sum" else "must be at least 1"
        raise ValueError(f"combine: rank = {rank} {hint}")
    if not 0 < density <= 1:
        raise ValueError(f"combine: density = {density} must be above 0 and at most 1")


def _check_source(root: nn.Module, state: State, name: str) -> None:
    root_of(root, name)
    if also := list(state.adapters[name].originals):
        raise StateError(
            f"combine: {name!r} trains {also[0]} as well (train_also), which is no change of a layer that a weight "
            "could scale; combine adapters that train nothing else"
        )


def _changes(root: nn.Module, state: State, layer: nn.Module, path: str, names: list[str]) -> dict[str, LowRankChange]:
    """What each source that is on the layer does alone at c = 1, by name."""
    found: dict[str, LowRankChange] = {}
    for name in names:
        if path in state.adapters[name].targets:
            with scale(root, {**dict.fromkeys(state.adapters, 0.0), name: 1.0}):
                found[name] = change_of(layer, path)
    return found


Parts = list[tuple[float, LowRankChange]]


def _combined(parts: Parts, path: str, method: str, rank: int | None, density: float, seed: int) -> LowRankChange:
    """What the new adapter is to do in one layer."""
    if method == "ties":
        return _mixed(parts, partial(_ties, density=density), rank, path)
    if method == "dare":
        return _mixed(parts, partial(_dare, density=density, rng=generator(seed, path)), rank, path)
    return _summed(parts, method, rank)


@torch.no_grad()
def _summed(parts: Parts, method: str, rank: int | None) -> LowRankChange:
    """sum_k w_k dW_k, or its best part, without forming it."""
    B = torch.cat([w * each.B for w, each in parts], dim=1)
    A = torch.cat([each.A for _, each in parts])
    (Q, left), (P, right) = torch.linalg.qr(B), torch.linalg.qr(A.T)
    U, S, Vh = torch.linalg.svd(left @ right.T, full_matrices=False)
    whole = int((sum(abs(w) * float(each.A.norm()) for w, each in parts) * NOISE < S).sum())
    most = max(each.rank for _, each in parts) if rank is None else rank
    r = whole if method == "sum" else min(whole, most)
    lost = max((each.error for _, each in parts), default=0.0)  # rounding
    error = max(float(S[r:].norm() / S.norm()), lost) if whole else 0.0
    b = sum((w * each.bias for w, each in parts if each.bias is not None), torch.zeros(B.shape[0], dtype=B.dtype))
    return LowRankChange(Q @ U[:, :r], S[:r, None] * (Vh[:r] @ P.T), b if b.any() else None, error)


@torch.no_grad()
def _mixed(parts: Parts, mix: Callable[..., Tensor], rank: int | None, path: str) -> LowRankChange:
    """The best part of T = mix(weights, changes)."""
    weights = [w for w, _ in parts]
    o = parts[0][1].B.shape[0]
    T = mix(weights, [each.B @ each.A for _, each in parts])
    zeros = torch.zeros(o, dtype=T.dtype)
    moves = any(each.bias is not None for _, each in parts)
    b = mix(weights, [zeros if each.bias is None else each.bias for _, each in parts]) if moves else zeros
    r = min(sum(each.rank for _, each in parts) if rank is None else rank, *T.shape)
    U, S, Vh = _leading(T, r, generator(0, path))
    kept = int((NOISE * S[0] < S).sum()) if r and S[0] > 0 else 0
    B, A = U[:, :kept], S[:kept, None] * Vh[:kept]
    error = float((T - B @ A).norm() / T.norm()) if kept else 0.0
    return LowRankChange(B, A, b if b.any() else None, error)


def _leading(T: Tensor, r: int, rng: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """The r leading singular triples of T: exact in small layers, by subspace iteration in large ones."""
    if min(T.shape) <= EXACT:
        U, S, Vh = torch.linalg.svd(T, full_matrices=False)
        return U[:, :r], S[:r], Vh[:r]
    X = torch.randn(T.shape[1], min(r + max(8, r // 2), *T.shape), dtype=T.dtype, generator=rng)
    for _ in range(ROUNDS):
        X = torch.linalg.qr(T.T @ torch.linalg.qr(T @ X).Q).Q
    Q = torch.linalg.qr(T @ X).Q
    U, S, Vh = torch.linalg.svd(Q.T @ T, full_matrices=False)
    return Q @ U[:, :r], S[:r], Vh[:r]


def _ties(weights: list[float], values: list[Tensor], density: float) -> Tensor:
    """Trim, elect, and the mean of those that agree."""
    trimmed = torch.stack([w * _trimmed(value, density) for w, value in zip(weights, values, strict=True)])
    elected = torch.where(trimmed.sum(0) >= 0, 1.0, -1.0)
    agree = trimmed.sign() == elected
    return (trimmed * agree).sum(0) / agree.sum(0).clamp(min=1)


def _trimmed(value: Tensor, density: float) -> Tensor:
    """The share `density` of entries that are largest in size (at least one), the others 0."""
    flat = value.flatten()
    kept = flat.abs().topk(max(1, int(density * flat.numel()))).indices
    return torch.zeros_like(flat).scatter(0, kept, flat[kept]).view_as(value)


def _dare(weights: list[float], values: list[Tensor], density: float, rng: torch.Generator) -> Tensor:
    """Drop entries at random, in the order of the sources, and scale up what is kept."""
    T = torch.zeros_like(values[0])
    for w, value in zip(weights, values, strict=True):
        kept = torch.rand(value.shape, dtype=value.dtype, generator=rng) < density
        T += w / density * (value * kept)
    return T


@torch.no_grad()
def _target(path: str, layer: nn.Module, change: LowRankChange) -> Target:
    """The layer with a LoRA of that change: in fp64 where the layer or a source is, else in fp32."""
    r = max(1, change.rank)  # 1: where the bias alone changes
    wide = [tensor.dtype for adapter in adapters_on(layer) for tensor in adapter.state_dict().values()]
    if not is_quantized(layer):
        wide.append(layer.weight.dtype)
    dtype = torch.float64 if torch.float64 in wide else torch.float32
    cfg = LoRAConfig(r=r, alpha=float(r), bias=change.bias is not None, dtype=dtype)
    adapter = LoRA(cfg, *shape(layer))
    if change.rank:
        size = change.A.norm().sqrt().clamp(min=1e-30)  # B and A of one size
        adapter.A.copy_(change.A / size)
        adapter.B.copy_(change.B * size)
    else:
        adapter.A.zero_()
    if change.bias is not None:
        adapter.b.copy_(change.bias)
    adapter = adapter.to(execution_device(layer))
    derive(adapter, layer)
    return Target(path, layer, shape(layer), 0, cfg, adapter=adapter)


def _silence(root: nn.Module, state: State, names: list[str], undo: Transaction) -> None:
    """Set the sources' coefficients to 0, for all threads."""
    coefficients, shared = state.coefficients, state.coefficients._shared

    def put_back() -> None:
        coefficients._shared = shared
        coefficients._publish()

    undo.call(put_back)
    scale(root, dict.fromkeys(names, 0.0))
    if any(float(state.adapters[name].coefficient.value.abs().max()) for name in names):
        raise StateError(
            "combine: within a `with ll.scale(...)` block, which keeps the sources' coefficients as they are, so that "
            "they would act twice; leave the block first"
        )
