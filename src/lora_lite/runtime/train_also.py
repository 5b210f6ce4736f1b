"""`train_also` weights: which they are; and as they were at attach (running averages too), for `disabled`.

A module's `_parameters` (and `_buffers`) is replaced by a dict that gives the original where the context says so. So
nothing is written, other threads read on what is trained, and parameters are listed, saved and moved as ever.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from lora_lite.errors import StateError, TargetError
from lora_lite.layers.linear import is_sharded
from lora_lite.layers.targets import Target
from lora_lite.patterns import matches, near_misses
from lora_lite.runtime.attachment import is_adapters_key
from lora_lite.runtime.state import State, trained_also


class Substituting(dict[str, Any]):
    """A module's parameters by name, of which some (name -> adapter and key) are the base's where it is disabled."""

    state: State
    also: dict[str, tuple[str, str]]

    def __getitem__(self, name: str) -> Any:
        parameter = super().__getitem__(name)
        if torch.compiler.is_compiling() or name not in self.also:
            return parameter
        adapter, key = self.also[name]
        attached = self.state.adapters.get(adapter)
        if attached is None or not self.state.coefficients.setting(attached.coefficient).base:
            return parameter
        with torch.inference_mode(False), torch.no_grad():
            original = attached.originals[key] = attached.originals[key].to(parameter.device)
            return nn.Parameter(original.to(parameter.dtype), requires_grad=False)


class SubstitutingBuffers(dict[str, Any]):
    """A module's buffers by name, of which those that training moves are the base's where all adapters are disabled."""

    state: State
    path: str

    def __getitem__(self, name: str) -> Any:
        buffer, key = super().__getitem__(name), f"{self.path}.{name}" if self.path else name
        if torch.compiler.is_compiling() or key not in self.state.buffers:
            return buffer
        if not all(self.state.coefficients.setting(each.coefficient).base for each in self.state.adapters.values()):
            return buffer
        return self.state.buffers[key].to(buffer.device, buffer.dtype, copy=True)  # what train mode moves is dropped


def substitute_originals(root: nn.Module, state: State) -> None:
    """Let modules with `train_also` weights, or running averages, give the originals where the adapter is disabled.

    Raises:
        StateError: a recurrent network's weight is trained, which it reads from a list of its own; or a compiled part
            of the model holds one.
    """
    names = {id(p): (each, key) for each in state.adapters for key, p in trained_also(root, each).items()}
    parts = (m for m in root.modules() if m._compiled_call_impl is not None or type(m).__name__ == "OptimizedModule")
    compiled = {below for part in parts for below in part.modules()}
    for path, module in root.named_modules():
        also = {name: names[id(p)] for name, p in module._parameters.items() if id(p) in names}
        if also and isinstance(module, nn.RNNBase):
            raise StateError(f"disabled: {path} is trained as well (train_also) and reads its weights past their names")
        moving = any((f"{path}.{name}" if path else name) in state.buffers for name in module._buffers)
        if (also or moving) and module in compiled:
            raise StateError(
                f"disabled: {path or 'the model'} is compiled and trained as well (train_also), and compiled code "
                "reads its weights as they are; use a model that is not compiled here"
            )
        if also:
            module._parameters = parameters = Substituting(module._parameters)
            parameters.state, parameters.also = state, also
        if moving:
            module._buffers = buffers = SubstitutingBuffers(module._buffers)
            buffers.state, buffers.path = state, path


def forget_originals(root: nn.Module) -> None:
    """Give every module a plain dict of parameters again."""
    for module in root.modules():
        if isinstance(module._parameters, Substituting):
            module._parameters = dict(module._parameters)
        if isinstance(module._buffers, SubstitutingBuffers):
            module._buffers = dict(module._buffers)


def find_train_also(
    model: nn.Module, state: State, targets: Iterable[Target], patterns: Sequence[str]
) -> dict[str, nn.Parameter]:
    """The base parameters that `train_also` names, by their (first) name; those of adapted layers are refused."""
    if isinstance(patterns, str):
        raise ValueError(f"train_also = {patterns!r}: must be a sequence of regexes, e.g. ('lm_head',)")
    named = {key: p for key, p in model.named_parameters(remove_duplicate=False) if not is_adapters_key(key, model)}
    adapted = {id(p) for target in targets for p in target.layer.parameters()}
    for attached in state.adapters.values():
        adapted |= {id(named[key]) for key in attached.originals}
        adapted |= {id(p) for path in attached.targets for p in model.get_submodule(path).parameters()}
    chosen: dict[int, tuple[str, nn.Parameter]] = {}
    owners = [key.rpartition(".")[0] or key for key in named]
    for pattern in patterns:
        try:
            matching = {key: p for key, p in named.items() if matches(pattern, key)}
        except ValueError as error:
            raise TargetError(f"train_also: {error}") from error
        if not matching:
            raise TargetError(f"train_also: {pattern!r} matches no parameter; {near_misses(pattern, owners)}")
        for key, parameter in matching.items():
            if parameter.is_meta or is_sharded(parameter):
                raise TargetError(f"train_also: {key} is offloaded (meta) or sharded; attach before that")
            if id(parameter) in adapted or not parameter.is_floating_point():
                raise TargetError(
                    f"train_also: {key} belongs to an adapter already, or is quantised; narrow {pattern!r}"
                )
            chosen.setdefault(id(parameter), (key, parameter))  # a tied parameter counts once
    return dict(chosen.values())
