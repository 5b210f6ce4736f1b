"""The hooks: one on each target layer (two where the input changes too), and a pair on the root.

All are module-level functions that find what they need on the module they are called with, so that a deepcopy calls its
own adapters.
"""

import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lora_lite.adapter import Adapter, acting_on, adapters_on, derive
from lora_lite.batches import batch_shape, tensors_in
from lora_lite.errors import StateError, TargetError
from lora_lite.layers.linear import shape
from lora_lite.runtime.coefficient import in_generate, spread_rows
from lora_lite.runtime.context import NO_TASK, graph_task
from lora_lite.runtime.foreign_saves import after_state_dict, guard
from lora_lite.runtime.settings import Cell, Coefficient, Setting
from lora_lite.runtime.skipped import note_skipped
from lora_lite.runtime.state import ROOT, State

TOKENS = ("input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds")


def before_layer(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """Compose the befores, in the order in which the adapters were attached."""
    given, put = _input(layer, args, kwargs)
    x = given.to_padded_tensor(0.0) if given.is_nested else given
    for adapter in acting_on(layer):
        if adapter.acts() == "before":
            x = adapter.act_before(x, layer, _coefficient(adapter, x))
    return put(_nested_like(x, given) if given.is_nested else x)


def _nested_like(padded: Tensor, nested: Tensor) -> Tensor:
    """The rows of a padded (B, T, d) in the lengths of `nested`, as torch's encoder gives it in eval mode."""
    rows = [row[: like.shape[0]] for row, like in zip(padded, nested.unbind(), strict=True)]
    return torch.nested.as_nested_tensor(rows)


def after_layer(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Any) -> Tensor:
    """Add each adapter's change. All read the same (x', y), so that their order does not matter."""
    if not acting_on(layer):
        return y
    x, _ = _input(layer, args, kwargs)
    if x.is_nested and isinstance(y, Tensor):
        return _nested_like(_changed(layer, x.to_padded_tensor(0.0), y.to_padded_tensor(0.0)), x)
    return _changed(layer, x, y)


def _changed(layer: nn.Module, x: Tensor, y: Any) -> Tensor:
    i, o = shape(layer)
    if not isinstance(y, Tensor) or x.shape[-1] != i or y.shape[-1] != o:
        found = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
        raise TargetError(
            f"{type(layer).__name__}({i} -> {o}) mapped {tuple(x.shape)} to {found}, so it is no plain linear layer "
            "and cannot be adapted; leave it out with exclude_names"
        )
    x = x.to(y.device)
    out = y
    for adapter in acting_on(layer):
        out = adapter.act_after(out, x, y, layer, _coefficient(adapter, x))
    return out


def after_load(layer: nn.Module, incompatible_keys: Any) -> None:
    """Rebuild what is derived from tensors that `load_state_dict` has just replaced."""
    for adapter in adapters_on(layer):
        if not layer.weight.is_meta:
            derive(adapter, layer)


def _coefficient(adapter: Adapter, x: Tensor) -> Tensor:
    if torch.compiler.is_compiling():
        return spread_rows(adapter.coefficient.local.cell.value, x, None)
    state: State = adapter.coefficient.state
    call = state.coefficients.call()
    if call is not None:
        call.ran.add(id(adapter))
    return spread_rows(state.coefficients.setting(adapter.coefficient).c, x, call)


def _input(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Callable[[Tensor], Any]]:
    """The layer's input, and a function that puts another in its place; layers may be called by keyword."""
    if args and isinstance(args[0], Tensor):
        return args[0], lambda x: ((x, *args[1:]), kwargs)
    named = [key for key, value in kwargs.items() if isinstance(value, Tensor)]
    if args or len(named) != 1:
        raise TargetError(
            f"{type(layer).__name__} was called with {len(args)} positional arguments and the tensors {named}, so its "
            "input cannot be identified; call it as layer(x), or leave it out with exclude_names"
        )
    return kwargs[named[0]], lambda x: (args, {**kwargs, named[0]: x})


def before_call(root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Note the batch's shape and the coefficients in force."""
    state: State = root.__dict__[ROOT]
    if torch.compiler.is_compiling():
        _refuse_compiled_base(
            state, {attached.coefficient: attached.coefficient.local.cell for attached in state.adapters.values()}
        )
        return
    coefficients = state.coefficients
    if coefficients.open_blocks and getattr(root, "_is_replica", False):
        raise StateError(
            "nn.DataParallel runs copies of the model in threads of its own, which no `with` block reaches; use "
            "DistributedDataParallel, or set the coefficient by a bare `ll.scale(model, c)`"
        )
    settings = coefficients.snapshot([attached.coefficient for attached in state.adapters.values()])
    if any(setting.base for setting in settings.values()) and _compiled_around():
        _refuse_compiled_base(state, settings)
    tokens = [kwargs[key] for key in TOKENS if key in kwargs]  # before images, of which a row may have several
    coefficients.begin(settings, *batch_shape(tensors_in([tokens, args, kwargs])), partial(in_generate, root))


def _refuse_compiled_base(state: State, settings: Mapping[Coefficient, Setting | Cell]) -> None:
    """Compiled code holds the trained weights themselves, so it cannot take the base's in their place."""
    for name, attached in state.adapters.items():
        if (attached.originals or state.buffers) and settings[attached.coefficient].base:
            raise StateError(
                f"disabled: a compiled model reads the weights that {name!r} trains as well (train_also), and running "
                "averages, as they are, so it cannot be the base; call the uncompiled model here"
            )


def _compiled_around() -> bool:
    """Whether this is a call of a compiled model that torch runs uncompiled (after a graph break)."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_globals.get("__name__") == "torch._dynamo.eval_frame":
            return True
        frame = frame.f_back
    return False


def after_call(root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    """Let backward, when it reaches this call's outputs, recompute checkpoints with this call's coefficients.

    Called after a failed forward pass too (with no output), so that nothing of it is left for the next one.
    """
    if torch.compiler.is_compiling():
        return
    state: State = root.__dict__[ROOT]
    call = state.coefficients.end()
    if call is None or not torch.is_grad_enabled() or graph_task() != NO_TASK:
        return
    if root.training and output is not None:
        note_skipped(root, state, call)
    for tensor in tensors_in(output):
        if tensor.requires_grad:
            tensor.register_hook(partial(state.coefficients.begin_backward, call))


def before_encoder(encoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
    """Keep gradients out of torch's nested tensors, which its attention takes only where none are wanted.

    The encoder decides by whether its weights want gradients; frozen ones, below trained adapters, mislead it. An input
    that wants a gradient does not.
    """
    src = args[0] if args else kwargs.get("src")
    if not (torch.is_grad_enabled() and isinstance(src, Tensor) and not src.requires_grad and not encoder.training):
        return None
    wanting = src.detach().requires_grad_()
    return ((wanting, *args[1:]), kwargs) if args else (args, {**kwargs, "src": wanting})


def hook_layer(layer: nn.Module) -> None:
    """Put the hooks that the layer's adapters need, once each, and take off those that none needs.

    The one on the output comes first, whenever it is put: other tools' hooks see what the adapted layer computes.
    """
    adapters = adapters_on(layer)
    _set_hook(layer, "forward_pre", before_layer, any(adapter.acts() == "before" for adapter in adapters))
    _set_hook(layer, "forward", after_layer, bool(adapters), prepend=True)
    loading = layer._load_state_dict_post_hooks
    _set_plain_hook(loading, layer.register_load_state_dict_post_hook, after_load, bool(adapters))


def hook_root(root: nn.Module, on: bool) -> None:
    """Put or take off the root's pair of hooks, and that of torch's own encoders within it."""
    _set_hook(root, "forward_pre", before_call, on)
    _set_hook(root, "forward", after_call, on, always_call=True)
    _set_plain_hook(root._state_dict_hooks, root.register_state_dict_post_hook, after_state_dict, on)
    guard(root, on)
    for module in root.modules():
        if isinstance(module, nn.TransformerEncoder):
            _set_hook(module, "forward_pre", before_encoder, on)


def _set_plain_hook(table: dict[int, Any], register: Callable[..., Any], hook: Callable[..., Any], on: bool) -> None:
    keys = [key for key, value in table.items() if value is hook]
    if on and not keys:
        register(hook)
    for key in () if on else keys:
        del table[key]


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
