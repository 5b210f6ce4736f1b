"""The record of what is attached under one name."""

import html
import re
from dataclasses import dataclass, field

from torch import Tensor, nn

from lora_lite.adapter import Adapter
from lora_lite.layers.targets import uncovered
from lora_lite.runtime.attach_cost import AttachCost
from lora_lite.runtime.state import State, adapters_of, root_of, trained_also


@dataclass(frozen=True, repr=False)
class Attachment:
    """What is attached under one name.

    Attributes:
        name: the adapter's name.
        targets: module path -> adapter module.
        also: names of the base parameters trained with it (`train_also`).
        cost: what attaching cost; None where it was loaded.
        matched: how many layers each of the config's `target_names` adapts; empty where it was loaded.
        left_out: linear layers that defaults leave out, heads aside, since they neither read nor write a residual
            stream; empty where names were given, or where it was loaded.
    """

    name: str
    targets: dict[str, Adapter]
    also: dict[str, nn.Parameter]
    base_size: int
    uncovered: dict[str, int]
    cost: AttachCost | None = None
    matched: dict[str, int] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)

    @property
    def num_trainable(self) -> int:
        """Number of trained values, those of `train_also` included."""
        tensors = [p for adapter in self.targets.values() for p in adapter.parameters()]
        return sum(tensor.numel() for tensor in [*tensors, *self.also.values()])

    @property
    def num_frozen(self) -> int:
        """Number of values that the adapters store but do not train (a basis, a norm)."""
        return sum(tensor.numel() for adapter in self.targets.values() for tensor in stored_buffers(adapter).values())

    @property
    def megabytes(self) -> float:
        """Size of its tensors in a file, trained and frozen (a basis may be most of it: `save(..., basis=False)`)."""
        tensors = [value for adapter in self.targets.values() for value in adapter.state_dict().values()]
        return sum(tensor.nbytes for tensor in [*tensors, *self.also.values()]) / 1e6

    def __repr__(self) -> str:
        return self.summary()

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        rows = [(method, str(count), pattern, tensors) for method, count, pattern, tensors in self._groups()]
        rows += [("train_also", "1", name, str(tuple(value.shape))) for name, value in self.also.items()]
        cells = [("th", ("method", "layers", "where", "tensors")), *(("td", row) for row in rows)]
        lines = ["".join(f"<{tag}>{html.escape(text)}</{tag}>" for text in row) for tag, row in cells]
        table = "".join(f"<tr>{line}</tr>" for line in lines)
        return f"<table>{table}</table><p>{'<br>'.join(map(html.escape, self._totals()))}</p>"

    def summary(self) -> str:
        """A table: a line for each method and shape of layer, then the totals."""
        lines = [f"{method:<16} {count:>4} x {where:<44} {tensors}" for method, count, where, tensors in self._groups()]
        lines += [f"train_also        {name} {tuple(value.shape)}" for name, value in self.also.items()]
        return "\n".join([*lines, *self._totals()])

    def _groups(self) -> list[tuple[str, int, str, str]]:
        """(method, number of layers, pattern of their paths, tensors) of layers that are alike."""
        groups: dict[tuple[str, str, str], int] = {}
        for path, adapter in self.targets.items():
            tensors = ", ".join(f"{key} {tuple(value.shape)}" for key, value in adapter.state_dict().items())
            group = (adapter.facts.name, re.sub(r"\d+", "*", path), tensors)
            groups[group] = groups.get(group, 0) + 1
        return [(method, count, pattern, tensors) for (method, pattern, tensors), count in groups.items()]

    def _totals(self) -> list[str]:
        lines = []
        share = 100 * self.num_trainable / max(self.base_size, 1)
        lines.append(
            f"{self.name}: {self.num_trainable:,} trained ({share:.3g}% of the base's {self.base_size:,}), "
            f"{self.num_frozen:,} stored frozen, {len(self.targets)} layers; {self.megabytes:.3g} MB in a file"
        )
        if self.matched:
            counts = ", ".join(f"{name!r} {count} layers" for name, count in self.matched.items())
            lines.append(f"target_names: {counts}")
        if self.left_out:
            few = ", ".join(self.left_out[:2])
            lines.append(f"{len(self.left_out)} linear layers left out, for instance {few}")
        if self.cost is not None:
            lines.append(str(self.cost))
        if self.uncovered:
            part = 100 * sum(self.uncovered.values()) / max(self.base_size, 1)
            lines.append(f"out of reach of hooks: {part:.3g}% of the base ({', '.join(list(self.uncovered)[:3])}, ...)")
        return lines


def stored_buffers(adapter: Adapter) -> dict[str, Tensor]:
    """The adapter's frozen tensors that a file holds, by name."""
    parameters = dict(adapter.named_parameters())
    return {key: value for key, value in adapter.state_dict().items() if key not in parameters}


def attachment(model: nn.Module, name: str = "default") -> Attachment:
    """The `Attachment` of an adapter that is attached already. Raises `StateError` where there is none."""
    return described(*root_of(model, name), name)


def described(root: nn.Module, state: State, name: str) -> Attachment:
    """The `Attachment` of an adapter of that root."""
    size = sum(p.numel() for key, p in root.named_parameters() if not is_adapters_key(key, root))
    adapters, also = adapters_of(root, name), trained_also(root, name)
    attached = state.adapters[name]
    known = {"cost": attached.cost, "matched": dict(attached.matched), "left_out": list(attached.left_out)}
    return Attachment(name, adapters, also, size, uncovered(root), **known)


def is_adapters_key(key: str, model: nn.Module) -> bool:
    """Whether the parameter `key` is an adapter's."""
    for found in re.finditer(r"\.lora\.", key):  # base modules may be called so as well
        store = model.get_submodule(key[: found.start()])._modules.get("lora")
        name = key[found.end() :].partition(".")[0]
        if store is not None and isinstance(store._modules.get(name), Adapter):
            return True
    return False


def base_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The model's state dict without adapters, e.g. for `save_pretrained(folder, state_dict=...)`."""
    return {key: value for key, value in model.state_dict().items() if not is_adapters_key(key, model)}
