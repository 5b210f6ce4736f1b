"""Optimiser groups: LoRA+'s ratio, and weight decay only where zero means no change."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from lora_lite.config import is_number
from lora_lite.runtime.state import adapters_of, root_of, trained_also


def param_groups(
    model: nn.Module,
    lr: float,
    weight_decay: float = 0.0,
    lora_plus_ratio: float = 1.0,
    names: Sequence[str] | None = None,
) -> list[dict[str, Any]]:
    """Groups for a torch optimiser: `torch.optim.AdamW(ll.param_groups(model, lr=1e-3))`.

    Args:
        model: the model.
        lr: learning rate.
        weight_decay: decay of the tensors whose zero means "no change" (`decay` of each method) and of `train_also`
            matrices. Gains, norms, reflections and 1-D `train_also` tensors get none.
        lora_plus_ratio: how many times lr the tensors listed in `lora_plus` (B of a LoRA) learn with; 1: plain.
            Hayou et al. 2024, arXiv:2402.12354, suggest 16.
        names: adapters to train. None: all.

    Returns:
        Non-empty groups with `params`, `lr`, `weight_decay` and a `name`.

    Raises:
        ValueError: a negative number. StateError: nothing attached, or no adapter of that name.
    """
    for key, value in {"lr": lr, "weight_decay": weight_decay, "lora_plus_ratio": lora_plus_ratio}.items():
        if not is_number(value, 0.0):
            raise ValueError(f"param_groups: {key} = {value!r} must be a finite number >= 0")
    root, state = root_of(model)
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name in names if names is not None else state.adapters:
        root_of(model, name)
        for adapter in adapters_of(root, name).values():
            for key, parameter in adapter.named_parameters():
                groups.setdefault((key in adapter.facts.decay, key in adapter.facts.lora_plus), []).append(parameter)
        for parameter in trained_also(root, name).values():
            groups.setdefault((parameter.ndim > 1, False), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": lr * (lora_plus_ratio if plus else 1.0),
            "weight_decay": weight_decay if decay else 0.0,
            "name": f"{'decay' if decay else 'no_decay'}{'_lora_plus' if plus else ''}",
        }
        for (decay, plus), parameters in groups.items()
    ]
