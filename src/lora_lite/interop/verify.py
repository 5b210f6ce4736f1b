"""Whether peft, loading an exported folder onto the bare base, computes what the adapted model does."""

import copy
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_lite.batches import eval_mode, run, tensors_in
from lora_lite.calibration.statistics import generator
from lora_lite.errors import StateError
from lora_lite.interop.sample_inputs import sample_inputs
from lora_lite.layers.linear import execution_device, is_quantized, shape
from lora_lite.merging.fold import adapted_layers
from lora_lite.merging.low_rank import LowRankChange
from lora_lite.runtime.attach import detach
from lora_lite.runtime.coefficient import scale
from lora_lite.runtime.state import root_of, trained_also

EPS = {torch.float64: 1e-6, torch.float32: 1e-5, torch.bfloat16: 2.0**-6, torch.float16: 2.0**-9}  # factors are fp32


@dataclass(frozen=True)
class Agreement:
    """peft's outputs against ours.

    Attributes:
        layers: largest ||y_peft - y|| / ||y|| of a layer, on random inputs.
        logits: largest ||z_peft - z|| / ||z|| of the model's outputs; None where no inputs were known.
    """

    layers: float
    logits: float | None

    def __str__(self) -> str:
        logits = "not compared (give inputs=)" if self.logits is None else f"{self.logits:.2g}"
        return f"loaded by peft, its layers differ by {self.layers:.2g}, its outputs: {logits}"


@contextmanager
def peft_installed() -> Iterator[None]:
    """Raise `ImportError` with the remedy, before long work, where peft is missing."""
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise ImportError("export_peft compares what it writes by loading it with peft: pip install peft") from error
    yield


@torch.no_grad()
def verify(
    root: nn.Module,
    folder: Path,
    names: list[str],
    parts: Mapping[str, LowRankChange] | None,
    inputs: Mapping[str, Any] | None,
) -> Agreement:
    """Load `folder` through peft onto the bare base and compare.

    Args:
        root, names: the model, and those of its adapters that were exported; the others are at 0.
        folder: what was written.
        parts: the factors by path where they are less than the whole change: then layers must agree with these.
        inputs: a batch; None: `sample_inputs`.

    Raises:
        StateError: an output that differs by more than rounding, adapters that move no output, or a folder that peft
            cannot load.
    """
    _, state = root_of(root)
    others = dict.fromkeys((each for each in state.adapters if each not in names), 0.0)
    # peft draws initial values, which the folder's then replace.
    with torch.random.fork_rng(), _bare_copy(root) as bare, scale(root, others), eval_mode(root):
        batch, ours = _outputs(root, inputs)
        base = tensors_in(run(bare.eval(), batch)) if batch is not None else []
        layers = adapted_layers(root, state, names)
        plain = {path: _output(bare.get_submodule(path), path, layer) for path, layer in layers.items()}
        theirs = _loaded(bare, folder)
        worst = largest = 0.0
        for path, layer in layers.items():
            y = _output(layer, path, layer) if parts is None else plain[path] + _change(parts[path], path, layer)
            given = _output(theirs.base_model.model.get_submodule(path), path, layer)
            error, change = _difference(given, y), _difference(plain[path], y)
            if not error <= _limit(EPS[_dtype(layer)], change):
                raise StateError(
                    f"export_peft: {path}: what peft computes of the export differs by {error:.2g} "
                    f"(||y_peft - y|| / ||y||; the base by {change:.2g}); nothing was written"
                )
            worst, largest = max(worst, error), max(largest, change)
        if largest == 0.0:
            raise StateError("export_peft: the adapters change nothing, and the folder would load with no effect")
        logits = None
        if batch is not None:
            by_peft = tensors_in(run(theirs, batch))
            pairs = [(a, b, c) for a, b, c in zip(ours, by_peft, base, strict=True) if a.is_floating_point()]
            logits = max(_difference(b, a) for a, b, _ in pairs)
            change = max(_difference(c, a) for a, _, c in pairs)
            eps = 10 * max(EPS[_dtype(layer)] for layer in layers.values())
            if parts is None and not logits <= _limit(eps, change):
                raise StateError(
                    f"export_peft: the model's outputs by peft differ by {logits:.2g} (the base's by {change:.2g}), "
                    "though its layers agree; nothing was written (did training change something that is no adapter?)"
                )
    return Agreement(worst, logits)


def _limit(eps: float, change: float) -> float:
    """How large an error may be: rounding, and no more than half of the change where that stands out of it."""
    return min(eps, 0.5 * change) if change > eps / 16 else eps


def _outputs(root: nn.Module, inputs: Mapping[str, Any] | None) -> tuple[Mapping[str, Any] | None, list[Tensor]]:
    """A batch and the model's outputs; none for a model that does not take the inputs that its config suggests."""
    if inputs is not None:
        return inputs, tensors_in(run(root, inputs))
    batch = sample_inputs(root)
    try:
        return batch, tensors_in(run(root, batch)) if batch is not None else []
    except (ValueError, RuntimeError, TypeError, AttributeError, IndexError, KeyError):  # what models raise of inputs
        return None, []


def _loaded(bare: nn.Module, folder: Path) -> Any:
    from peft import PeftModel

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return PeftModel.from_pretrained(bare, str(folder)).eval()
    except (ValueError, RuntimeError, TypeError, AttributeError, KeyError, OSError) as error:
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        raise StateError(f"export_peft: peft cannot load such a folder here ({reason}); merge instead") from error


@contextmanager
def _bare_copy(root: nn.Module) -> Iterator[nn.Module]:
    """The model without its adapters: other modules, which share its tensors (but not those that training changed)."""
    _, state = root_of(root)
    own = {id(p) for name in state.adapters for p in trained_also(root, name).values()}
    flags = [(p, p.requires_grad) for p in root.parameters()]
    try:
        try:
            bare = copy.deepcopy(root, {id(p): p for p, _ in flags if id(p) not in own})
        except (RuntimeError, TypeError) as error:  # a lock, a tensor with a graph
            raise StateError(
                f"export_peft: this model cannot be copied to compare with ({error}); merge instead"
            ) from error
        detach(bare)
        yield bare
    finally:
        for p, flag in flags:
            p.requires_grad_(flag)


def _dtype(layer: nn.Module) -> torch.dtype:
    weight: Tensor = layer.weight  # type: ignore[assignment]
    return torch.bfloat16 if is_quantized(layer) else weight.dtype


def _output(layer: nn.Module, path: str, like: nn.Module) -> Tensor:
    """What a layer makes of random x, in fp64 on the CPU."""
    x = torch.randn(8, shape(like)[0], generator=generator(1, path), dtype=torch.float32, device="cpu")
    weight: Tensor = like.weight  # type: ignore[assignment]
    dtype = torch.float32 if is_quantized(like) else weight.dtype
    return layer(x.to(execution_device(like), dtype)).to("cpu", torch.float64)


def _change(part: LowRankChange, path: str, like: nn.Module) -> Tensor:
    x = torch.randn(8, shape(like)[0], generator=generator(1, path), dtype=torch.float32, device="cpu").double()
    y = (x @ part.A.T) @ part.B.T
    return y if part.bias is None else y + part.bias


def _difference(given: Tensor, exact: Tensor) -> float:
    return float((given.double() - exact.double()).norm() / exact.double().norm().clamp(min=1e-30))
