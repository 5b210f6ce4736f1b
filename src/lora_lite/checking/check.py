"""Does every adapter have an effect, and does it get a true gradient? Found by running, not assumed."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lora_lite.adapter import Adapter
from lora_lite.batches import run
from lora_lite.checking.effect import turn, without_effect
from lora_lite.checking.gradients import loss_of, measure
from lora_lite.checking.layers import cut_layers
from lora_lite.checking.passes import Layers, note_gradients, perturb, put_back, watch
from lora_lite.checking.report import CheckReport, cut_words
from lora_lite.errors import CheckError, StateError
from lora_lite.runtime.skipped import EXPERT
from lora_lite.runtime.state import State, adapters_of, refuse_merged, root_of, trained_also

TRAIN_PASSES = 4  # at most, for models that skip layers at random in training (layer drop)


def check(model: nn.Module, batches: Iterable[Any]) -> CheckReport:
    """Run the model forward and backward on `batches`, with every adapter perturbed, and report by layer.

    The tensors are perturbed because at the start the gradient of some is zero by design (a LoRA's A). It runs in train
    and in eval mode, since models take other paths in each, and puts back all bits, gradients and modes. Then, on the
    first batch, it compares backward with finite differences, for a base can cut what goes back through it.

    It costs one training pass over the batches in each mode, and about 25 forward passes of the first batch (up to 65
    where rounding or jumps make the differences disagree), one more for each adapter without a gradient, and a copy of
    all trained tensors. Two small batches are enough.

    Args:
        model: the model, or a wrapper of it (DDP: gradients are compared across processes).
        batches: a few, as for `attach`; the loss is the output's own `loss` if it has one, else a random projection.

    Raises:
        CheckError: an adapter that never ran, ran in one mode only, got no gradient or one that is zero or not finite,
            or had no effect; gradients that contradict finite differences, or differ between processes; or a
            coefficient for one row that moved another.
        StateError: nothing attached, merged, or a target replaced since attach.
        ValueError: no batches.
    """
    root, state = root_of(model)
    refuse_merged(state, "check")
    batches = list(batches)
    if not batches:
        raise ValueError("check: give at least one batch")
    if offloaded := [key for key, p in root.named_parameters() if p.is_meta and p.requires_grad]:
        raise StateError(
            f"check: {offloaded[0]} is offloaded (on the meta device), where nothing can be trained; check before "
            "offloading"
        )
    adapters = {name: adapters_of(root, name) for name in state.adapters}
    own = [p for layers in adapters.values() for adapter in layers.values() for p in adapter.parameters()]
    also = [p for name in state.adapters for p in trained_also(root, name).values() if p.requires_grad]
    with put_back(model, [*own, *also]), watch(adapters) as report:
        perturb(own)  # frozen ones too, which may hold their start
        trains = bool(also) or any(p.requires_grad for p in own)
        _run_all(model, state, batches, report, trains)
        note_gradients(report, adapters)
        model.eval()
        effect, independent = turn(model, batches[0])
        report = replace(report, effect=effect, rows_independent=independent, cut_layers=cut_layers(model))
        _raise_findings(report, adapters)
        _find_dead(model, batches[0], adapters, report)
        if trains:
            report = replace(report, gradient=measure(model, batches[0], [*_whole(adapters), *also]))
            _raise_untrue(model, batches[0], adapters, report)
    _compare_processes(report, model)
    return report


def _run_all(model: nn.Module, state: State, batches: Sequence[Any], report: CheckReport, trains: bool) -> None:
    """Forward and backward in both modes; in train mode until no adapter is left out by chance."""
    for mode in (True, False):
        model.train(mode)
        for _ in range(TRAIN_PASSES if mode else 1):
            for batch in batches:
                output = run(model, batch)
                state.skipped.clear()  # what is left out here is an error of its own
                if trains:
                    loss_of(output).backward()
            if all(mode in layer.modes for layers in report.layers.values() for layer in layers.values()):
                break


def _whole(adapters: Layers) -> list[Tensor]:
    """The trained tensors whose gradient is all of it."""
    each = [adapter for layers in adapters.values() for adapter in layers.values()]
    return [
        p for adapter in each for key, p in adapter.named_parameters() if p.requires_grad and key not in adapter.inexact
    ]


def _find_dead(model: nn.Module, batch: Any, adapters: Layers, report: CheckReport) -> None:
    """Raise for an adapter whose change reaches no output, among those without a gradient that shows it."""
    asked: dict[str, dict[str, Adapter]] = {}
    for name, layers in report.layers.items():
        seen = {path for path, layer in layers.items() if layer.calls == 0 or any(layer.grad_norms.values())}
        asked[name] = {path: adapter for path, adapter in adapters[name].items() if path not in seen}
    for name, path in without_effect(model, batch, asked):
        raise CheckError(
            f"adapter {name!r} on {path} ran, but leaving it out changes no output: what its layer computes is not "
            "used for this batch; leave it out with exclude_names, or give other batches"
        )


def _raise_untrue(model: nn.Module, batch: Any, adapters: Layers, report: CheckReport) -> None:
    """Raise where backward contradicts the differences, or where they show nothing and a layer is known to cut it."""
    assert report.gradient is not None
    unknown = report.gradient.error is None and bool(report.cut_layers)
    if not (report.gradient.wrong or unknown):
        return
    words = [str(report.gradient)]
    words += [cut_words(report.cut_layers)] if report.cut_layers else []
    dead = [] if unknown else without_effect(model, batch, adapters)
    dead = [(name, path) for name, path in dead if report.layers[name][path].calls]
    words += [f"adapter {name!r} on {path} changes no output although it gets a gradient" for name, path in dead]
    raise CheckError(
        f"the gradients are not those of the loss: {'; '.join(words)}. Something in the model cuts or replaces what "
        "goes back through it (a layer that detaches its input, a kernel without a backward, rounded activations): "
        "train on another form of it (weights quantised alone, another kernel), and quantise afterwards; a method that "
        "leaves out a term on purpose names the tensors in its `inexact`"
    )


def _raise_findings(report: CheckReport, adapters: Layers) -> None:
    for name, layers in report.layers.items():
        for path, layer in layers.items():
            if path in report.idle_experts:
                continue
            if layer.calls == 0:
                raise CheckError(
                    f"adapter {name!r} on {path} never ran: the model uses that weight without calling the layer, or "
                    "the batches do not reach it; leave it out with exclude_names, or give other batches"
                )
            if len(layer.modes) == 1 and not EXPERT.search(path):
                only, not_in = ("train", "eval") if True in layer.modes else ("eval", "train")
                raise CheckError(
                    f"adapter {name!r} on {path} ran in {only} mode but not in {not_in} mode, where the model takes "
                    "another path that reads the weight without calling the layer; leave it out with exclude_names"
                )
            norms = list(layer.grad_norms.values())
            if (
                adapters[name][path].facts.trained
                and norms
                and not any(norm > 0 and norm < float("inf") for norm in norms)
            ):
                raise CheckError(
                    f"adapter {name!r} on {path} ran but got no finite, nonzero gradient: {layer.grad_norms}"
                )
            if not all(norm < float("inf") for norm in norms):
                raise CheckError(f"adapter {name!r} on {path} got a gradient that is not finite: {layer.grad_norms}")
            if not layer.moves:
                raise CheckError(
                    f"adapter {name!r} on {path} ran, but changes nothing of what its layer reads or gives; is its "
                    "coefficient 0, or its change rounded away?"
                )
    if not report.effect > 0:
        raise CheckError("turning the coefficient from 0 to 1 changes no output, although adapters ran")
    if report.rows_independent is False:
        raise CheckError(
            "a coefficient for one row moved others too, or not all of its own: this model mixes the rows of a batch, "
            "or a part of it has other rows (images of which a text has several)"
        )


def _compare_processes(report: CheckReport, model: nn.Module) -> None:
    """Under DDP every process must have the same gradients."""
    wrapped = any(type(module).__name__ == "DistributedDataParallel" for module in model.modules())
    if not (wrapped and dist.is_available() and dist.is_initialized()):
        return
    norms = [
        norm for layers in report.layers.values() for layer in layers.values() for norm in layer.grad_norms.values()
    ]
    device = next(model.parameters()).device
    low, high = torch.tensor(norms, device=device), torch.tensor(norms, device=device)
    dist.all_reduce(low, dist.ReduceOp.MIN)
    dist.all_reduce(high, dist.ReduceOp.MAX)
    if not torch.allclose(low, high, rtol=1e-4):
        raise CheckError("gradients differ between processes: they are not reduced; attach before wrapping in DDP")
