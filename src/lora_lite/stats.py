"""Calibration: one streaming pass over the data, before any adapter is filled.

Memory does not grow with the data: each statistic is a running sum. Layers that read the same tensor (q, k and v; gate
and up) share one accumulator.
"""

import hashlib
import itertools
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from lora_lite.basis import leading_eigenvectors
from lora_lite.errors import CalibrationError, LoraLiteWarning

MASKS = ("attention_mask", "decoder_attention_mask")


@dataclass
class Statistics:
    """Running sums over the tokens that one layer (or several with the same input) has read.

    Attributes:
        tokens: number of tokens, padding left out.
        sums: statistic name -> running sum, in fp64.
        seconds: time that the whole pass took.
    """

    tokens: int = 0
    sums: dict[str, Tensor] = field(default_factory=dict)
    seconds: float = 0.0
    _eigen: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)

    def mean(self, name: str) -> Tensor:
        """The statistic `name`, averaged over tokens."""
        return STATISTICS[name][1](self)

    def eigen(self, name: str) -> tuple[Tensor, Tensor]:
        """Eigenvectors (columns) and eigenvalues of the mean of `name`, falling; computed once for all its readers."""
        if name not in self._eigen:
            self._eigen[name] = leading_eigenvectors(self.mean(name))
        return self._eigen[name]


def input_moment(x: Tensor) -> Tensor:
    """Sum over tokens of x x^T: (tokens, i) -> (i, i), uncentred."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x.T @ x


def input_sum(x: Tensor) -> Tensor:
    """Sum over tokens of x: (tokens, i) -> (i,)."""
    return x.to(torch.promote_types(x.dtype, torch.float64 if x.device.type != "mps" else torch.float32)).sum(0)


def input_covariance(stats: "Statistics") -> Tensor:
    """E[x x^T] - E[x] E[x]^T (i, i)."""
    mean = stats.sums["input_sum"] / stats.tokens
    return stats.sums["input_moment"] / stats.tokens - torch.outer(mean, mean)


SUMS = {"input_moment": input_moment, "input_sum": input_sum}
# What a method may ask for: the sums it is made of, and how.
STATISTICS: dict[str, tuple[tuple[str, ...], Callable[["Statistics"], Tensor]]] = {
    "input_moment": (("input_moment",), lambda stats: stats.sums["input_moment"] / stats.tokens),
    "input_covariance": (("input_moment", "input_sum"), input_covariance),
}


def generator(seed: int, path: str) -> torch.Generator:
    """A CPU generator seeded by (seed, path), so that initial values depend on nothing else."""
    digest = hashlib.sha256(f"{seed}:{path}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))


class Collector:
    """Accumulates the statistics of some layers while the model runs.

    Args:
        paths: the paths of the layers.
        names: the statistics to take (keys of `STATISTICS`).
    """

    def __init__(self, paths: Iterable[str], names: Iterable[str]) -> None:
        self.paths = list(paths)
        self.sums = sorted({part for name in names for part in STATISTICS[name][0]})
        self.stats: dict[str, Statistics] = {}
        self.leader: dict[str, str] = {}
        self.masks: list[Tensor] = []
        self.unmasked: set[str] = set()
        self._inputs: list[tuple[Tensor, int, str]] = []  # with its version: it may be written to

    def start_batch(self, batch: Any) -> None:
        """Note the padding masks of the next batch."""
        found = [batch[key] for key in MASKS if key in batch] if isinstance(batch, Mapping) else []
        self.masks = [mask.bool() for mask in found if isinstance(mask, Tensor) and mask.ndim == 2]
        self._inputs = []

    def see(self, path: str, x: Tensor) -> None:
        """Take in one layer's input (..., i)."""
        # Holding the tensor keeps its identity from being reused within the batch; only the last few are held.
        shared = next((first for seen, at, first in self._inputs if seen is x and at == x._version), None)
        leader = self.leader.setdefault(path, shared or path)
        if leader != path and shared != leader:
            raise CalibrationError(
                f"{path} read the same input as {leader} in the first batch but another one now; give batches on which "
                "the model takes the same way each time"
            )
        if leader == path:
            self._inputs = [*self._inputs[-3:], (x, x._version, path)]
            self._add(path, self._tokens(path, x))

    def _add(self, path: str, x: Tensor) -> None:
        stats = self.stats.setdefault(path, Statistics())
        stats.tokens += x.shape[0]
        wide = torch.float32 if x.device.type == "mps" else torch.float64
        for name in self.sums:
            value = SUMS[name](x).to(wide)
            stats.sums[name] = stats.sums[name].add_(value) if name in stats.sums else value

    def _tokens(self, path: str, x: Tensor) -> Tensor:
        """x as (tokens, i), without padding where a mask of its shape is known."""
        for mask in self.masks:
            if x.shape[:-1] == mask.shape:
                return x[mask.to(x.device)]
            if x.ndim == 2 and x.shape[0] == mask.numel():
                return x[mask.flatten().to(x.device)]
        if any(not mask.all() for mask in self.masks):
            self.unmasked.add(path)
        return x.reshape(-1, x.shape[-1])

    def result(self) -> dict[str, Statistics]:
        """path -> statistics. Raises `CalibrationError` for a layer that never ran."""
        if idle := [path for path in self.paths if path not in self.leader]:
            raise CalibrationError(
                f"no calibration batch reached {len(idle)} of {len(self.paths)} targets, such as {idle[0]}; give data "
                "that uses them, or leave them out with exclude_names"
            )
        return {path: self.stats[self.leader[path]] for path in self.paths}


def calibrate(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    needs: Mapping[str, frozenset[str]],
    data: Iterable[Any] | None,
) -> dict[str, Statistics]:
    """Run the model over `data` once and return what the layers that need it have seen.

    Eval mode, no gradients, progress shown; hooks and modes are put back even after an error. Over several processes
    the sums are added up.

    Args:
        model: the model; its adapters, if any, are in force.
        layers: path -> layer that needs statistics. Empty: nothing runs.
        needs: path -> names of the statistics of `STATISTICS` that it needs.
        data: batches: mappings, tuples or lists (positional arguments) or tensors.
    Raises:
        CalibrationError: no data, an empty iterable, or a layer that no batch reached.
    """
    if not layers:
        if data is not None:
            warnings.warn("calibration_data was given, but no method here needs it", LoraLiteWarning, stacklevel=3)
        return {}
    if data is None:
        wanted = sorted(frozenset().union(*needs.values()))
        raise CalibrationError(f"this method needs {', '.join(wanted)}: give attach(..., calibration_data=batches)")
    collector = Collector(layers, frozenset().union(*needs.values()))
    handles = [
        layer.register_forward_pre_hook(_seeing(collector, path), with_kwargs=True) for path, layer in layers.items()
    ]
    modes = {module: module.training for module in model.modules()}
    started = time.perf_counter()
    try:
        model.eval()
        with torch.no_grad():
            for batch in tqdm(data, desc="calibrating", unit="batch", leave=False):
                collector.start_batch(batch)
                run(model, batch)
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes.items():
            module.training = mode
    if not collector.stats:
        raise CalibrationError("calibration_data is empty (a generator that was used up?); give at least one batch")
    if collector.unmasked:
        warnings.warn(
            f"the padding mask does not fit the inputs of {sorted(collector.unmasked)[:3]}: their padding was counted",
            LoraLiteWarning,
            stacklevel=3,
        )
    result = collector.result()
    _all_reduce(list({id(stats): stats for stats in result.values()}.values()))
    for stats in result.values():
        stats.seconds = time.perf_counter() - started
    return result


def _seeing(collector: Collector, path: str) -> Any:
    def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tensors = [value for value in itertools.chain(args, kwargs.values()) if isinstance(value, Tensor)]
        collector.see(path, tensors[0])

    return hook


def run(model: nn.Module, batch: Any) -> Any:
    """`model` on a batch: a mapping (keyword arguments), a tuple or list (positional ones) or a tensor, moved to the
    device of the model's first parameter."""
    device = next(model.parameters()).device

    def move(value: Any) -> Any:
        return value.to(device) if isinstance(value, Tensor) else value

    if isinstance(batch, Mapping):
        return model(**{key: move(value) for key, value in batch.items()})
    if isinstance(batch, list | tuple):
        return model(*[move(value) for value in batch])
    if isinstance(batch, Tensor):
        return model(move(batch))
    raise TypeError(f"a batch is a mapping, a tuple, a list or a tensor, not a {type(batch).__name__}")


def _all_reduce(several: list[Statistics]) -> None:
    if not (dist.is_available() and dist.is_initialized()):
        return
    for stats in several:
        tokens = torch.tensor(stats.tokens, device=next(iter(stats.sums.values())).device)
        dist.all_reduce(tokens)
        stats.tokens = int(tokens)
        for value in stats.sums.values():
            dist.all_reduce(value)


def broadcast(adapters: Mapping[str, nn.Module]) -> None:
    """Give every process the tensors of rank 0, since factorisations may differ in sign or order between machines."""
    if not (dist.is_available() and dist.is_initialized()):
        return
    for adapter in adapters.values():
        for value in itertools.chain(adapter.parameters(), adapter.buffers()):
            dist.broadcast(value.detach(), src=0)
