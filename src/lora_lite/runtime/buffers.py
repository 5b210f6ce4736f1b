"""The base's buffers that a training pass moves: running averages of norms, and the like."""

import torch
from torch import Tensor, nn

from lora_lite.adapter import Adapter
from lora_lite.runtime.state import State


def moving_buffers(root: nn.Module) -> dict[str, Tensor]:
    """The base's persistent buffers that training may write, by name: floating ones and counters.

    Large integer buffers are quantised weights, which it does not; those that no state dict holds are caches.
    """
    found: dict[str, Tensor] = {}
    for path, module in root.named_modules():
        if not isinstance(module, Adapter):
            for key, buffer in module._buffers.items():
                if buffer is None or buffer.is_meta or key in module._non_persistent_buffers_set:
                    continue
                if buffer.is_floating_point() or buffer.numel() == 1:
                    found[f"{path}.{key}" if path else key] = buffer
    return found


def moved_buffers(root: nn.Module, state: State) -> dict[str, Tensor]:
    """Those of them that differ from what they were before the first adapter was attached."""
    return {
        key: buffer
        for key, buffer in moving_buffers(root).items()
        if key in state.buffers and not same_bits(buffer, state.buffers[key])
    }


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of a dtype are equal, a NaN to itself."""
    other = other.to(one.device)
    return one.shape == other.shape and bool(
        torch.equal(one, other)
        or (torch.equal(one.isnan(), other.isnan()) and torch.equal(one.nan_to_num(), other.nan_to_num()))
    )
