"""Calibration: one streaming pass over the data, before any adapter is filled.

No raw activations are kept, only the running sums of `stats.py`. Layers that read the same tensor (q, k and v; gate and
up) share the sums of it.
"""

import itertools
import warnings
from collections.abc import Callable, Iterable, Mapping, Sized
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lora_lite.adapter import full_precision
from lora_lite.batches import batch_shape, eval_mode, run, tensors_in
from lora_lite.calibration.contrast import Contrast
from lora_lite.calibration.processes import add_up
from lora_lite.calibration.statistics import STATISTICS, SUMS, Statistics, Sums
from lora_lite.errors import CalibrationError, LoraLiteWarning
from lora_lite.layers.linear import bias, shape
from lora_lite.linalg import factorising

MASKS = ("attention_mask", "decoder_attention_mask")


def _prepared(path: str, layer: nn.Module, prepare: Callable[[nn.Module], Any]) -> Any:
    with factorising(path):
        return prepare(layer)


class Collector:
    """Accumulates the statistics of some layers while the model runs.

    Args:
        layers: path -> layer.
        needs: path -> names of the statistics to take (keys of `STATISTICS`).
    """

    def __init__(self, layers: Mapping[str, nn.Module], needs: Mapping[str, frozenset[str]]) -> None:
        self.layers = layers
        parts = {
            path: {part for name in needs[path] for part in STATISTICS[name].parts(*shape(layer))}
            for path, layer in layers.items()
        }
        self.input, self.output = (
            {path: sorted(part for part in names if SUMS[part].side == side) for path, names in parts.items()}
            for side in ("input", "output")
        )
        # Of layers that read the same input, the first one that needs a sum of it takes it.
        self.taker: dict[tuple[str, str], str] = {}
        self.prepared = {
            (path, part): _prepared(path, layers[path], prepare)
            for path, names in self.output.items()
            for part in names
            if (prepare := SUMS[part].prepare) is not None
        }
        self.stats: dict[str, Statistics] = {}
        self.leader: dict[str, str] = {}
        self.unmasked: set[str] = set()
        self.start_batch(None, None)

    def start_batch(self, batch: Any, label: bool | None) -> None:
        """Note the padding masks and the label of the next batch."""
        masks = [batch[key] for key in MASKS if key in batch] if isinstance(batch, Mapping) else []
        self.masks = [mask.bool() for mask in masks if isinstance(mask, Tensor) and mask.ndim == 2]
        self.label = label
        self.rows, self.lengths = batch_shape(tensors_in([batch]))
        self._inputs: list[tuple[Tensor, int, str]] = []  # with its version: it may be written to

    def see(self, path: str, x: Tensor, y: Tensor) -> None:
        """Take in one layer's input (..., i) and its own output (..., o)."""
        # Holding the tensor keeps its identity from being reused within the batch; only the last few are held.
        shared = next((first for seen, at, first in self._inputs if seen is x and at == x._version), None)
        leader = self.leader.setdefault(path, shared or path)
        if leader != path and shared != leader:
            raise CalibrationError(
                f"{path} read the same input as {leader} in the first batch but another one now; give batches on which "
                "the model takes the same way each time"
            )
        if path not in self.stats:
            self.stats[path] = Statistics(self.stats[leader].input if leader != path else Sums(), Sums())
        stats = self.stats[path]
        if leader == path:
            self._inputs = [*self._inputs[-3:], (x, x._version, path)]
        own = [part for part in self.input[path] if self.taker.setdefault((leader, part), path) == path]
        self._add(path, stats.input, own, x)
        if self.output[path]:
            b = bias(self.layers[path])
            self._add(path, stats.output, self.output[path], y if b is None else y - b.to(y.dtype))

    def _add(self, path: str, sums: Sums, parts: list[str], values: Tensor) -> None:
        views: dict[str, Tensor] = {}
        for part in parts:
            if SUMS[part].label not in (None, self.label):
                continue
            rows = SUMS[part].rows
            if rows not in views:
                views[rows] = self._tokens(path, values) if rows == "tokens" else self._prompts(values, rows)
            with full_precision(values.device):  # the model may run under autocast
                sums.add(part, views[rows], self.prepared.get((path, part)))

    def _tokens(self, path: str, x: Tensor) -> Tensor:
        """x as (tokens, features), without padding where a mask of its shape is known."""
        for mask in self.masks:
            if x.shape[:-1] == mask.shape:
                return x[mask.to(x.device)]
            if x.ndim == 2 and x.shape[0] == mask.numel():
                return x[mask.flatten().to(x.device)]
        if any(not mask.all() for mask in self.masks):
            self.unmasked.add(path)
        return x.reshape(-1, x.shape[-1])

    def _prompts(self, x: Tensor, rows: str) -> Tensor:
        """x as (prompts, features): each one's last token that is no padding, or the mean of those."""
        if x.ndim == 2:
            batch = self.rows or x.shape[0]  # the batch's, flattened; or x's own, for a model without sequences
            length = x.shape[0] // batch
            x = x.reshape(batch, length, -1) if length in self.lengths else x.unsqueeze(1)
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        mask = next((m.to(x.device) for m in self.masks if m.shape == x.shape[:2]), x.new_ones(x.shape[:2]).bool())
        if not mask.any(1).all():
            raise CalibrationError("a prompt consists of padding alone; leave it out")
        if rows == "last":
            last = mask.shape[1] - 1 - mask.flip(1).int().argmax(1)
            return x[torch.arange(len(x), device=x.device), last]
        wide = torch.promote_types(x.dtype, torch.float32)
        return (x * mask.unsqueeze(2)).sum(1, dtype=wide) / mask.sum(1, keepdim=True)

    def result(self) -> dict[str, Statistics]:
        """path -> statistics. Raises `CalibrationError` for a layer that never ran."""
        if idle := [path for path in self.layers if path not in self.leader]:
            raise CalibrationError(
                f"no calibration batch reached {len(idle)} of {len(self.layers)} targets, such as {idle[0]}; give data "
                "that uses them, or leave them out with exclude_names"
            )
        return {path: self.stats[path] for path in self.layers}


def calibrate(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    needs: Mapping[str, frozenset[str]],
    data: Iterable[Any] | None,
) -> tuple[dict[str, Statistics], tuple[int, int]]:
    """Run the model over `data` once and return what the layers that need it have seen; and the largest number of
    tokens that one has seen, and the bytes of the sums.

    Eval mode, no gradients, progress shown; hooks and modes are put back even after an error. Over several processes
    the sums are added up.

    Args:
        model: the model; its adapters, if any, are in force.
        layers: path -> layer that needs statistics. Empty: nothing runs.
        needs: path -> names of the statistics of `STATISTICS` that it needs.
        data: batches: mappings, tuples or lists (positional arguments) or tensors; or a `Contrast`.

    Raises:
        CalibrationError: no data, an empty iterable, no `Contrast` where one is needed or one with sides of unequal
            size, or a layer that no batch reached.
    """
    if not layers:
        return {}, (0, 0)
    wanted = sorted(frozenset().union(*(needs[path] for path in layers)))
    if data is None:
        raise CalibrationError(f"this method needs {', '.join(wanted)}: give attach(..., calibration_data=batches)")
    if any(name.startswith("contrast") for name in wanted) and not isinstance(data, Contrast):
        raise CalibrationError("this method needs calibration_data=ll.Contrast(positive, negative)")
    collector = Collector(layers, needs)
    _pass(model, collector, data)
    if not collector.stats:
        raise CalibrationError("calibration_data is empty (a generator that was used up?); give at least one batch")
    if collector.unmasked:
        warnings.warn(
            f"the padding mask does not fit the inputs of {sorted(collector.unmasked)[:3]}: their padding was counted",
            LoraLiteWarning,
            stacklevel=3,
        )
    result = collector.result()
    several = list({id(s): s for stats in result.values() for s in (stats.input, stats.output)}.values())
    _all_reduce(several)
    _check_sides(several)
    _check_values(collector, result)
    size = sum(value.nbytes for sums in several for value in sums.values.values())
    return result, (max(stats.tokens for stats in result.values()), size)


@torch.no_grad()
def _pass(model: nn.Module, collector: Collector, data: Iterable[Any]) -> None:
    # First among the layer's hooks: it is to see W x + b, not what adapters add.
    handles = [
        layer.register_forward_hook(_seeing(collector, path), with_kwargs=True, prepend=True)
        for path, layer in collector.layers.items()
    ]
    try:
        with eval_mode(model):
            labelled = data.labelled() if isinstance(data, Contrast) else ((None, batch) for batch in data)
            total = len(data) if isinstance(data, Sized) else None
            for label, batch in tqdm(labelled, desc="calibrating", unit="batch", leave=False, total=total):
                collector.start_batch(batch, label)
                run(model, batch)
    finally:
        for handle in handles:
            handle.remove()


def _seeing(collector: Collector, path: str) -> Any:
    def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Any) -> None:
        tensors = [value for value in itertools.chain(args, kwargs.values()) if isinstance(value, Tensor)]
        collector.see(path, tensors[0], y)

    return hook


def _check_sides(several: Iterable[Sums]) -> None:
    for sums in several:
        for part, count in sums.counts.items():
            other = part.replace("positive", "negative")
            if SUMS[part].label and sums.counts.get(other) != count:
                raise CalibrationError(
                    f"Contrast: {count} positive and {sums.counts.get(other, 0)} negative prompts; give the same "
                    "number of each"
                )


def _check_values(collector: Collector, result: Mapping[str, Statistics]) -> None:
    """Refuse sums that no token entered, or that are not finite, before anything is computed from them."""
    for path, stats in result.items():
        for part in [*collector.input[path], *collector.output[path]]:
            if not stats.has(part):
                raise CalibrationError(f"{path}: the calibration data held padding alone; give batches with tokens")
            if not torch.isfinite(stats.part(part)).all():
                raise CalibrationError(
                    f"{path}: what it read or returned on the calibration data is not finite; look for NaN or infinite "
                    "values in the data and the weights, or run the model in a wider dtype"
                )


def _all_reduce(several: Iterable[Sums]) -> None:
    for sums in several:
        counts = {part: torch.tensor(sums.counts[part], device=value.device) for part, value in sums.values.items()}
        add_up([*counts.values(), *sums.values.values()])
        sums.counts.update({part: int(count) for part, count in counts.items()})
