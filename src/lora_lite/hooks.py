"""The hooks: one on each target layer (two where the input changes too), and a pair on the root.

All are module-level functions that find what they need on the module they are called with, so that a deepcopy calls its
own adapters.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lora_lite.adapter import Adapter, Held, adapters_on, cast, derive
from lora_lite.errors import TargetError
from lora_lite.linear import shape
from lora_lite.state import ROOT, Call, State, batch_shape, in_backward, spread_rows, tensors_in


def before_layer(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """Compose the befores, in the order in which the adapters were attached."""
    x, put = _input(layer, args, kwargs)
    for adapter in adapters_on(layer):
        if adapter.before is not None:
            x = cast(adapter(x, None, Held(layer), _coefficient(adapter, x)), x)
    return put(x)


def after_layer(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Any) -> Tensor:
    """Add each adapter's change. All read the same (x', y), so that their order does not matter."""
    x, _ = _input(layer, args, kwargs)
    i, o = shape(layer)
    if not isinstance(y, Tensor) or x.shape[-1] != i or y.shape[-1] != o:
        found = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
        raise TargetError(
            f"{type(layer).__name__}({i} -> {o}) mapped {tuple(x.shape)} to {found}, so it is no plain linear layer "
            "and cannot be adapted; leave it out with exclude_names"
        )
    x = x.to(y.device)
    out = y
    for adapter in adapters_on(layer):
        out = adapter(x, y, Held(layer), _coefficient(adapter, x), out)
    return out


def after_load(layer: nn.Module, incompatible_keys: Any) -> None:
    """Rebuild what is derived from tensors that `load_state_dict` has just replaced."""
    for adapter in adapters_on(layer):
        if not layer.weight.is_meta:
            derive(adapter, layer)


def _coefficient(adapter: Adapter, x: Tensor) -> Tensor:
    state: State = adapter.dial.state
    call = state.recomputed if state.call is None else state.call
    return spread_rows(state.coefficient(adapter.dial), x, call)


def _input(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Callable[[Tensor], Any]]:
    """The layer's input, and a function that puts another in its place; layers may be called by keyword."""
    if args and isinstance(args[0], Tensor):
        return args[0], lambda x: ((x, *args[1:]), kwargs)
    named = [key for key, value in kwargs.items() if isinstance(value, Tensor)]
    if args or len(named) != 1:
        raise TargetError(
            f"{type(layer).__name__} was called with {len(args)} positional arguments and the tensors {named}, so its "
            "input cannot be told; call it as layer(x), or leave it out with exclude_names"
        )
    return kwargs[named[0]], lambda x: (args, {**kwargs, named[0]: x})


def before_call(root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Note the batch's shape and the coefficients in force."""
    if torch.compiler.is_compiling():
        return
    state: State = root.__dict__[ROOT]
    if not in_backward():
        _leave_backward(state)  # one that failed did not
    values = {name: attached.dial.value for name, attached in state.adapters.items()}
    state.call = Call(values, *batch_shape(tensors_in([args, kwargs])))


def after_call(root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    """Let backward, when it reaches this call's outputs, recompute checkpoints with this call's coefficients.

    Called after a failed forward pass too (with no output), so that nothing of it is left for the next one.
    """
    if torch.compiler.is_compiling():
        return
    state: State = root.__dict__[ROOT]
    call, state.call = state.call, None
    if call is None or not torch.is_grad_enabled() or in_backward():
        return
    for tensor in tensors_in(output):
        if tensor.requires_grad:
            tensor.register_hook(functools.partial(_enter_backward, state, call))


def _enter_backward(state: State, call: Call, grad: Tensor) -> None:
    if state.recomputed is None:
        torch.autograd.Variable._execution_engine.queue_callback(functools.partial(_leave_backward, state))
    state.recomputed = call
    for name, value in call.values.items():
        if name in state.adapters:
            state.adapters[name].dial.compiled = value


def _leave_backward(state: State) -> None:
    state.recomputed = None
    for attached in state.adapters.values():
        attached.dial.compiled = attached.dial.value


def hook_layer(layer: nn.Module) -> None:
    """Put the hooks that the layer's adapters need, once each, and take off those that none needs."""
    adapters = adapters_on(layer)
    _set_hook(layer, "forward_pre", before_layer, any(adapter.before is not None for adapter in adapters))
    _set_hook(layer, "forward", after_layer, bool(adapters))
    _set_load_hook(layer, bool(adapters))


def hook_root(root: nn.Module, on: bool) -> None:
    """Put or take off the root's pair of hooks."""
    _set_hook(root, "forward_pre", before_call, on)
    _set_hook(root, "forward", after_call, on, always_call=True)


def unhook_layer(layer: nn.Module) -> None:
    """Take the hooks off, whatever adapters the layer has (while it is merged)."""
    _set_hook(layer, "forward_pre", before_layer, False)
    _set_hook(layer, "forward", after_layer, False)
    _set_load_hook(layer, False)


def _set_load_hook(layer: nn.Module, on: bool) -> None:
    keys = [key for key, hook in layer._load_state_dict_post_hooks.items() if hook is after_load]
    if on and not keys:
        layer.register_load_state_dict_post_hook(after_load)
    for key in () if on else keys:
        del layer._load_state_dict_post_hooks[key]


def _set_hook(module: nn.Module, kind: str, hook: Callable[..., Any], on: bool, **options: bool) -> None:
    # Found by identity rather than by handle: a handle stored on the module would not survive a deepcopy.
    table: dict[int, Any] = getattr(module, f"_{kind}_hooks")
    keys = [key for key, value in table.items() if value is hook]
    if on and not keys:
        getattr(module, f"register_{kind}_hook")(hook, with_kwargs=True, **options)
    if not on:
        for key in keys:
            del table[key]
            getattr(module, f"_{kind}_hooks_with_kwargs").pop(key, None)
            module._forward_hooks_always_called.pop(key, None)
