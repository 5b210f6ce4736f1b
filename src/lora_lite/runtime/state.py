"""What a model with adapters remembers.

The state is kept on the root (the module given to `attach`) and is found by walking modules, so that wrappers do not
matter. It holds no module, only paths and tensors, so that `deepcopy` and pickling see plain data.
"""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from lora_lite.adapter import Adapter
from lora_lite.config import AdapterConfig
from lora_lite.errors import StateError
from lora_lite.runtime.attach_cost import AttachCost
from lora_lite.runtime.context import Coefficients
from lora_lite.runtime.settings import Coefficient

ROOT = "_lora_lite"
Samples = dict[str, tuple[Tensor, tuple[int, ...]]]  # some values of each parameter, and its shape


@dataclass
class Attached:
    """One attached adapter: its configs, the config of each target, what `train_also` was before, what attaching
    cost (None where it was loaded), how many layers each given name matched, and what defaults left out."""

    configs: list[AdapterConfig]
    coefficient: Coefficient
    targets: dict[str, int]
    originals: dict[str, Tensor] = field(default_factory=dict)
    cost: AttachCost | None = None
    matched: dict[str, int] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)


@dataclass
class State:
    """What the root remembers."""

    adapters: dict[str, Attached] = field(default_factory=dict)
    requires_grad: dict[str, bool] = field(default_factory=dict)
    packing: list[str] = field(default_factory=list)
    merged: dict[str, Any] = field(default_factory=dict)
    untied: list[Any] = field(default_factory=list)
    skipped: dict[tuple[str, str], int] = field(default_factory=dict)
    samples: Samples = field(default_factory=dict)
    forgotten: list[tuple[Any, str, Any]] = field(default_factory=list)
    buffers: dict[str, Tensor] = field(default_factory=dict)
    coefficients: Coefficients = field(default_factory=Coefficients)


def find_root(model: nn.Module) -> tuple[nn.Module, State] | None:
    """The root within `model` (itself, or below wrappers) and its state; None where nothing is attached.

    Raises `StateError` where several modules within it are roots, for then no one is meant.
    """
    roots = [(path, module) for path, module in model.named_modules() if ROOT in module.__dict__]
    if len(roots) > 1:
        paths = ", ".join(path or "the model itself" for path, _ in roots)
        raise StateError(
            f"adapters are attached to several modules of this {type(model).__name__} ({paths}): pass one of them"
        )
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
