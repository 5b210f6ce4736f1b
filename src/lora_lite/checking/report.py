"""What `check` reports."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from lora_lite.checking.gradients import Gradient


@dataclass
class Layer:
    """What `check` saw of one adapter on one layer.

    Attributes:
        calls: how many times it ran (in train and in eval mode together).
        modes: the modes in which it ran: True for train, False for eval.
        moves: whether it ever changed what its layer reads or gives.
        grad_norms: tensor name -> norm of its gradient.
    """

    calls: int = 0
    modes: set[bool] = field(default_factory=set)
    moves: bool = False
    grad_norms: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class CheckReport:
    """Result of `check`.

    Attributes:
        layers: adapter name -> module path -> `Layer`.
        idle_experts: paths of experts that no token reached.
        effect: largest change of an output when the perturbed adapters are turned from c = 0 to c = 1.
        rows_independent: whether a coefficient on one row acted on that row alone; None if the model takes no such
            coefficient, or the batch has one row.
        gradient: backward against finite differences; None if nothing is trained.
        cut_layers: paths of quantised layers, one of each kind, that pass back another gradient than their weight
            would, with the cosine between the two.
    """

    layers: dict[str, dict[str, Layer]]
    idle_experts: list[str]
    effect: float = 0.0
    rows_independent: bool | None = None
    gradient: Gradient | None = None
    cut_layers: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{'adapter':<12} {'layer':<48} {'runs':>5}  gradient norms"]
        for name, layers in self.layers.items():
            for path, layer in layers.items():
                norms = ", ".join(f"{key} {norm:.2e}" for key, norm in layer.grad_norms.items())
                lines.append(f"{name:<12} {path:<48} {layer.calls:>5}  {norms}")
        lines.append(f"effect of c = 1 against c = 0: {self.effect:.2e}; rows independent: {self.rows_independent}")
        lines += [str(self.gradient)] if self.gradient is not None else []
        lines += [cut_words(self.cut_layers)] if self.cut_layers else []
        return "\n".join(lines)


def cut_words(cut: Mapping[str, float]) -> str:
    """`CheckReport.cut_layers` in words."""
    layers = ", ".join(f"{path} (cosine {cosine:.2f})" for path, cosine in cut.items())
    return f"quantised layers that pass back another gradient than their weight would: {layers}, and others of its kind"
