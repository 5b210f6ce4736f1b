"""What training may change of the base though nobody asked for it: running averages of norms, and parameters that were
unfrozen by hand. How they were is noted when the first adapter is attached."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lora_lite.adapter import Adapter
from lora_lite.errors import TargetError
from lora_lite.layers.linear import is_plain
from lora_lite.runtime.attachment import is_adapters_key
from lora_lite.runtime.state import Samples, State
from lora_lite.runtime.transaction import Transaction

SAMPLES = 32  # values of a parameter that are noted


def moving_buffers(root: nn.Module) -> dict[str, Tensor]:
    """The base's persistent buffers that training may write, by name: floating ones and counters.

    Large integer buffers are quantised weights, which it does not; those that no state dict holds are caches.
    """
    buffers: dict[str, Tensor] = {}
    for path, module in root.named_modules():
        if not isinstance(module, Adapter):
            for key, buffer in module._buffers.items():
                if buffer is None or buffer.is_meta or key in module._non_persistent_buffers_set:
                    continue
                if buffer.is_floating_point() or buffer.numel() == 1:
                    buffers[f"{path}.{key}" if path else key] = buffer
    return buffers


def moved_buffers(root: nn.Module, state: State) -> dict[str, Tensor]:
    """Those of them that differ from what they were before the first adapter was attached."""
    return {
        key: buffer
        for key, buffer in moving_buffers(root).items()
        if key in state.buffers and not same_bits(buffer, state.buffers[key])
    }


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors hold the same bits, once the other has the first one's dtype and device."""
    if one.shape != other.shape:
        return False
    pair = [t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (one, other.to(one.device, one.dtype))]
    if all(data.numel() % 8 == 0 and data.storage_offset() % 8 == 0 for data in pair):
        pair = [data.view(torch.int64) for data in pair]  # fewer to compare, which is several times faster
    return torch.equal(*pair)


@contextmanager
def unwritten(where: str, layer: nn.Module, undo: Transaction) -> Iterator[None]:
    """Raise `TargetError` if the block writes the layer's own parameters; `undo` puts them back after any error.

    Copies are compared, for a write through `.data` or numpy moves no version counter; quantised and sharded
    parameters are not watched.
    """
    own = {key: p.data for key, p in layer.named_parameters(recurse=False) if type(p.data) is Tensor and not p.is_meta}
    bits = {key: undo.keep(data) for key, data in own.items()}
    yield
    if written := [key for key, data in own.items() if not same_bits(data, bits[key])]:
        raise TargetError(f"{where} wrote the base's {written[0]}; it may only read the layer")
    undo.forget(len(bits))


def base_samples(root: nn.Module, state: State) -> Samples:
    """`sampled(root)` as it was when the first adapter was attached, or as it is where nothing is."""
    return state.samples if state.adapters else sampled(root)


@torch.no_grad()
def sampled(root: nn.Module) -> Samples:
    """Up to 32 evenly spaced values (fp32) of each parameter of the base, and its shape, by its first name.

    Quantised, sharded and offloaded ones are left out.
    """
    values: Samples = {}
    for key, parameter in root.named_parameters():
        if is_plain(parameter) and parameter.numel() and not is_adapters_key(key, root):
            at, flat = sampled_places(parameter.numel()), parameter.detach().reshape(-1)
            values[key] = flat[at.to(flat.device)].to("cpu", torch.float32), tuple(parameter.shape)
    return values


def sampled_places(n: int) -> Tensor:
    """Which of a parameter's n values are sampled."""
    return torch.linspace(0, n - 1, min(n, SAMPLES), dtype=torch.float64, device="cpu").round().long()


def moved_parameters(root: nn.Module, state: State) -> list[str]:
    """The base's parameters that have other values than when the first adapter was attached, by name.

    A cast of the model moves none: values that are those of then, rounded to its dtype or to 16 bits on the way, count
    as the same.
    """
    now = sampled(root)
    dtypes = {key: p.dtype for key, p in root.named_parameters()}
    return [key for key, (then, dims) in state.samples.items() if key in now and now[key][1] == dims
            and not any(torch.equal(now[key][0], _rounded(then, (dtypes[key], *through)))
                        for through in ((), (torch.bfloat16,), (torch.float16,)))]  # fmt: skip


def _rounded(values: Tensor, dtypes: tuple[torch.dtype, ...]) -> Tensor:
    for dtype in reversed(dtypes):
        values = values.to(dtype)
    return values.float()
