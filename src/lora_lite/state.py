"""What a model with adapters remembers, and the coefficient that turns them.

The state hangs on the root (the module given to `attach`) and is found by walking modules, so that wrappers do not
matter. It holds no module, only paths and tensors, so that `deepcopy` and pickling see plain data.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lora_lite.adapter import Adapter
from lora_lite.config import AdapterConfig
from lora_lite.cost import AttachCost
from lora_lite.errors import CoefficientError, StateError

ROOT = "_lora_lite"
Coefficient = float | Tensor | Mapping[str, float | Tensor]


@dataclass(eq=False)
class Dial:
    """The coefficient c of one adapter, shared by its layers: a plain tensor, 0-dim, or (B,) with one value a row.

    A Python float would make `torch.compile` compile anew for each value, a registered buffer would be cast by
    `model.half()` and overwritten by DDP.
    """

    name: str
    state: "State"
    value: Tensor = field(default_factory=lambda: torch.ones((), dtype=torch.float64, device="cpu"))

    def __post_init__(self) -> None:
        # What compiled code reads: `value`, but in a backward pass that of the call whose outputs it comes from.
        self.compiled = self.value


@dataclass
class Attached:
    """One attached adapter: its configs, the config of each target, what `train_also` was before, and what attaching
    cost (None where it was loaded)."""

    configs: list[AdapterConfig]
    dial: Dial
    targets: dict[str, int]
    originals: dict[str, Tensor] = field(default_factory=dict)
    cost: AttachCost | None = None


@dataclass
class Call:
    """One call of the root: the coefficients in force, and the batch's rows and sequence lengths."""

    values: dict[str, Tensor]
    rows: int | None
    lengths: frozenset[int]


@dataclass
class State:
    """What the root remembers."""

    adapters: dict[str, Attached] = field(default_factory=dict)
    requires_grad: dict[str, bool] = field(default_factory=dict)
    packing: list[str] = field(default_factory=list)
    merged: dict[str, Any] = field(default_factory=dict)
    untied: list[Any] = field(default_factory=list)
    buffers: dict[str, Tensor] = field(default_factory=dict)
    call: Call | None = None
    recomputed: Call | None = None
    scaled: bool = False

    def coefficient(self, dial: Dial) -> Tensor:
        """The coefficient in force; within a checkpoint's recomputation, the one that its forward pass used.

        Raises:
            StateError: a recomputation of a call that was not made through the root, after `scale` was used.
        """
        if torch.compiler.is_compiling():
            return dial.compiled
        if not in_backward():
            return dial.value
        if self.recomputed is not None and dial.name in self.recomputed.values:
            return self.recomputed.values[dial.name]
        if self.scaled:
            raise StateError(
                "a checkpointed layer is recomputed in backward, but its forward pass did not go through the module "
                "that was given to attach, so the coefficient it used is unknown; call that module"
            )
        return dial.value


def in_backward() -> bool:
    """Whether the autograd engine runs on this thread: a forward pass here is a checkpoint's recomputation."""
    return torch._C._current_graph_task_id() != -1


def find_root(model: nn.Module) -> tuple[nn.Module, State] | None:
    """The root within `model` (itself, or below wrappers) and its state; None where nothing is attached.

    Raises `StateError` where several modules within it are roots, for then no one is meant.
    """
    roots = [(path, module) for path, module in model.named_modules() if ROOT in module.__dict__]
    if len(roots) > 1:
        paths = ", ".join(path or "the model itself" for path, _ in roots)
        raise StateError(f"adapters hang on several modules of this {type(model).__name__} ({paths}): pass one of them")
    return (roots[0][1], roots[0][1].__dict__[ROOT]) if roots else None


def root_of(model: nn.Module, name: str | None = None) -> tuple[nn.Module, State]:
    """The root and its state. Raises `StateError` where nothing, or nothing called `name`, is attached."""
    found = find_root(model)
    if found is None:
        within = any(isinstance(module, Adapter) for module in model.modules())
        hint = "its adapters were attached to a module around it: pass that one" if within else "call attach or load"
        raise StateError(f"{type(model).__name__} has no adapters of its own; {hint}")
    if name is not None and name not in found[1].adapters:
        raise StateError(f"no adapter is named {name!r}; attached: {', '.join(found[1].adapters)}")
    return found


def adapters_of(root: nn.Module, name: str) -> dict[str, Adapter]:
    """The adapter modules called `name`, by the path of their layer in `root`.

    Raises:
        StateError: a target was replaced since attach (as resizing embeddings does), and its adapter went with it.
    """
    state: State = root.__dict__[ROOT]
    modules = dict(root.named_modules())
    found: dict[str, Adapter] = {}
    for path in state.adapters[name].targets:
        store = getattr(modules.get(path), "lora", None)
        if store is None or name not in store:
            raise StateError(
                f"adapter {name!r}: the layer {path} was replaced since attach and its adapter is gone; detach and "
                "attach again (change a model's layers before attaching)"
            )
        found[path] = store[name]
    return found


def trained_also(root: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """The base parameters that the adapter `name` trains as well, by name.

    Raises:
        StateError: one was replaced since attach by another of another shape (as resizing embeddings does).
    """
    state: State = root.__dict__[ROOT]
    parameters = dict(root.named_parameters(remove_duplicate=False))
    for key, original in state.adapters[name].originals.items():
        if key not in parameters or parameters[key].shape != original.shape:
            raise StateError(
                f"adapter {name!r}: {key}, which it trains, was replaced since attach; put a parameter of shape "
                f"{tuple(original.shape)} back (change a model's layers before attaching)"
            )
    return {key: parameters[key] for key in state.adapters[name].originals}


def refuse_merged(state: State, doing: str) -> None:
    """Raise `StateError` while the adapters are merged."""
    if state.merged:
        raise StateError(f"{doing}: the adapters are merged into the weights; call unmerge first")


class scale:
    """Turn the coefficient: 0 is the base, 1 the trained adapter, -1 its opposite. Absolute, never cumulative.

    Takes effect at once; as a context manager (`with ll.scale(model, -1): ...`) it puts the former values back at the
    end, and can be entered again. Backward may run after the end: a checkpoint's recomputation uses the coefficient of
    its forward pass. Contexts nest; threads share the coefficient, so give each thread a model of its own.

    Args:
        model: the module that adapters were attached to, or a wrapper of it.
        c: a float or 0-dim tensor for all adapters; a tensor (B,), one value per batch row; or a mapping from adapter
            name to either. Rows that `generate` expands (beams, several sequences) follow in order.
    Raises:
        StateError: nothing attached, or merged.
        CoefficientError: an unknown adapter name, a value that is not finite or not 0- or 1-dimensional.
    """

    def __init__(self, model: nn.Module, c: Coefficient) -> None:
        _, state = root_of(model)
        refuse_merged(state, "scale")
        values = c if isinstance(c, Mapping) else dict.fromkeys(state.adapters, c)
        if unknown := [name for name in values if name not in state.adapters]:
            raise CoefficientError(f"scale: no adapter named {unknown}; attached: {', '.join(state.adapters)}")
        self._values = {state.adapters[name].dial: _as_tensor(name, value) for name, value in values.items()}
        self._turn()
        state.scaled = True

    def __enter__(self) -> None:
        if not self._on:  # entered again after it ended
            self._turn()

    def __exit__(self, *error: object) -> None:
        self._set(self._former)
        self._on = False

    def _turn(self) -> None:
        self._former = {dial: dial.value for dial in self._values}
        self._set(self._values)
        self._on = True

    @staticmethod
    def _set(values: Mapping[Dial, Tensor]) -> None:
        # The tensor is replaced, not written to: backward may still need the former one.
        for dial, value in values.items():
            dial.value = dial.compiled = value


def disabled(model: nn.Module) -> scale:
    """`scale(model, 0)`: the base model, for as long as the context lasts. (`train_also` weights stay trained.)"""
    return scale(model, 0.0)


def _as_tensor(name: str, c: float | Tensor) -> Tensor:
    if not isinstance(c, Tensor):
        if isinstance(c, bool) or not isinstance(c, int | float) or not math.isfinite(c):
            raise CoefficientError(f"scale: the coefficient of {name!r} is {c!r}; give a finite number or tensor")
        with torch.inference_mode(False):  # backward may need it later
            return torch.tensor(float(c), dtype=torch.float64, device="cpu")
    real = c.is_floating_point() or c.dtype in (torch.int32, torch.int64)
    if c.ndim > 1 or c.numel() == 0 or not real:
        raise CoefficientError(
            f"scale: the coefficient of {name!r} is a {c.dtype} tensor of shape {tuple(c.shape)}; give a 0-dim tensor, "
            "or one of shape (B,) with a value per batch row"
        )
    if not torch.isfinite(c).all():
        raise CoefficientError(f"scale: the coefficient of {name!r} is not finite: {c}")
    wide = torch.float32 if c.device.type == "mps" else torch.float64
    # A copy: what the caller writes to its tensor later turns nothing.
    with torch.inference_mode(False):
        return c.to("cpu" if c.ndim == 0 else c.device, wide, copy=True)


def spread_rows(c: Tensor, x: Tensor, call: Call | None) -> Tensor:
    """c in a shape that broadcasts over x: as it is (0-dim), or (B, 1, ..., 1) for one value per row.

    x (rows, ..., features) has B rows, or a multiple k B when `generate` expanded each row k times in order; 2-D x may
    also be the (B T, features) of a model that flattens its B x T batch.

    Raises:
        CoefficientError: x's rows cannot be matched to c's.
    """
    if c.ndim == 0:
        return c
    n, rows = x.shape[0], c.shape[0]
    allowed = {n} if x.ndim > 2 else {rows}
    if x.ndim == 2 and call is not None and call.rows is not None:
        allowed = {call.rows, *(call.rows * length for length in call.lengths)}
    if n not in allowed or n % rows:
        raise CoefficientError(
            f"scale: {rows} coefficients, one per batch row, but a layer got an input of shape {tuple(x.shape)}, whose "
            "rows cannot be matched to them; use one coefficient for the whole batch here"
        )
    return c.to(x.device).repeat_interleave(n // rows).reshape(n, *[1] * (x.ndim - 1))


def batch_shape(tensors: list[Tensor]) -> tuple[int | None, frozenset[int]]:
    """(rows, sequence lengths) of a call, from the tensors that it was given."""
    batched = [tensor for tensor in tensors if tensor.ndim >= 2]
    if not batched:
        return None, frozenset()
    return batched[0].shape[0], frozenset(tensor.shape[1] for tensor in batched)


def tensors_in(value: Any, found: list[Tensor] | None = None) -> list[Tensor]:
    """The tensors in nested tuples, lists, mappings and dataclasses (a model's inputs or outputs)."""
    found = [] if found is None else found
    if isinstance(value, Tensor):
        found.append(value)
    elif isinstance(value, Mapping):
        for item in value.values():
            tensors_in(item, found)
    elif isinstance(value, list | tuple):
        for item in value:
            tensors_in(item, found)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for each in dataclasses.fields(value):
            tensors_in(getattr(value, each.name), found)
    return found
