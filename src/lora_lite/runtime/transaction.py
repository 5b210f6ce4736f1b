"""All or nothing: a model that an operation did not finish with is put back as it was (law 4)."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import _len_torch_function_stack
from torch.overrides import _pop_mode

from lora_lite.runtime.state import ROOT

# What torch keeps by name on every module: parameters, buffers, children, hooks.
REGISTRIES = frozenset(key for key, value in vars(nn.Module()).items() if isinstance(value, dict))


class Transaction:
    """A context that puts the model back if it is left by an exception, Ctrl-C among them.

    The structure (children, parameters and buffers by name, hooks, attributes, flags, modes, what the root remembers)
    is recorded whole at the start, so that no step needs an undo of its own. Values are recorded by `write`, and
    attributes of other objects by `assign`, before they change.

    Args:
        model: the module, with all within it.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modes = _Modes()
        self._flags = [(p, p.requires_grad) for p in model.parameters()]
        self._owners: list[_Attributes] = []
        for module in model.modules():
            self._owners.append(_Attributes(module, REGISTRIES))
            if ROOT in vars(module):
                state = vars(module)[ROOT]
                self._owners.append(_Attributes(state, vars(state).keys()))
        self._values: list[tuple[Tensor, Tensor]] = []
        self._assigned: list[tuple[Any, str, Any]] = []
        self._calls: list[Callable[[], object]] = []

    def __enter__(self) -> "Transaction":
        return self

    @torch.no_grad()
    def write(self, tensor: Tensor, value: Tensor) -> Tensor:
        """Copy `value` to `tensor`; returns what that held, on the CPU."""
        original = tensor.detach().to("cpu", copy=True)
        self._values.append((tensor, original))
        tensor.copy_(value)
        return original

    def keep(self, tensor: Tensor) -> Tensor:
        """A copy of a tensor that others may write, to be put back; returns the copy."""
        original = tensor.detach().clone()
        self._values.append((tensor, original))
        return original

    def forget(self, count: int) -> None:
        """Drop the last copies of `keep`."""
        del self._values[len(self._values) - count :]

    def assign(self, owner: Any, key: str, value: Any) -> None:
        """Set an attribute of an object that is no module."""
        self._assigned.append((owner, key, getattr(owner, key)))
        setattr(owner, key, value)

    def call(self, undoing: Callable[[], object]) -> None:
        """What undoes a step that is no attribute of one object; it may be called again after an interrupt."""
        self._calls.append(undoing)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        done = kind is None
        while not done:
            try:
                self._put_back()
                done = True
            except KeyboardInterrupt:  # a second one: the first is on its way already
                continue

    def _put_back(self) -> None:
        with torch.no_grad():
            self._put_back_model()
        self._modes.put_back()

    def _put_back_model(self) -> None:
        for owner in self._owners:
            owner.put_back()
        for undoing in reversed(self._calls):
            undoing()
        for owner, key, value in reversed(self._assigned):
            setattr(owner, key, value)
        for tensor, original in reversed(self._values):
            tensor.copy_(original)
        for parameter, flag in self._flags:
            if parameter.requires_grad != flag:
                parameter.requires_grad_(flag)


class _Modes:
    """This thread's modes of torch: an interrupt on the way out of `with torch.no_grad()` would leave it on."""

    def __init__(self) -> None:
        self._grad, self._functions = torch.is_grad_enabled(), _len_torch_function_stack()
        self._autocast = {device: torch.is_autocast_enabled(device) for device in ("cpu", "cuda")}

    def put_back(self) -> None:
        while _len_torch_function_stack() > self._functions:  # such as a default device
            _pop_mode()
        for device, enabled in self._autocast.items():
            torch.set_autocast_enabled(device, enabled)
        torch.set_grad_enabled(self._grad)


class _Attributes:
    """The attributes of an object, with the contents of those of its dictionaries that `dicts` names."""

    def __init__(self, owner: Any, dicts: Any) -> None:
        self._owner, self._attributes = owner, dict(vars(owner))
        self._contents = [
            (value, dict(value)) for key, value in self._attributes.items() if key in dicts and isinstance(value, dict)
        ]

    def put_back(self) -> None:
        now = vars(self._owner)
        for key in now.keys() - self._attributes.keys():
            del now[key]
        now.update(self._attributes)
        for content, before in self._contents:
            if not _same(content, before):  # the very dictionary stays: handles of hooks point to it
                content.clear()
                content.update(before)


def _same(one: Mapping[Any, Any], other: Mapping[Any, Any]) -> bool:
    return [(key, id(value)) for key, value in one.items()] == [(key, id(value)) for key, value in other.items()]
