"""A model saved by its own library while adapters act on it: transformers drops their keys when it loads the folder,
which is then the bare base."""

import functools
import sys
import warnings
from typing import Any

from torch import Tensor, nn

from lora_lite.adapter import Adapter
from lora_lite.errors import LoraLiteWarning, StateError
from lora_lite.runtime.attachment import base_state_dict, is_adapters_key

METHOD = "save_pretrained"
RIGHT_CALLS = (
    "plain transformers would load the bare base from that folder. Write the adapter with `ll.save(model, file)` (and "
    "`ll.load` it onto the base), or the whole model with `ll.merge(model)` before saving"
)


def guard(root: nn.Module, on: bool) -> None:
    """Stand before the `save_pretrained` of each module within the root that has one, or step aside again."""
    for module in root.modules():
        if on and METHOD not in vars(module) and callable(getattr(type(module), METHOD, None)):
            vars(module)[METHOD] = functools.partial(save_pretrained, module)
        elif not on and getattr(vars(module).get(METHOD), "func", None) is save_pretrained:
            del vars(module)[METHOD]


def save_pretrained(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The module's own `save_pretrained`, where what it writes is what the model computes.

    That is so while nothing is attached below it, or all is merged (the adapters' own tensors are left out), or for a
    state dict without adapters. A trainer passes `state_dict=` (None, or all) for its checkpoint, and loads it into the
    model that has the adapters: that is written, with a warning.

    Raises:
        StateError: adapters act, and the caller is no trainer.
    """
    save = functools.partial(type(module).save_pretrained, module)  # type: ignore[attr-defined]
    adapters = [each for each in module.modules() if isinstance(each, Adapter)]
    given = kwargs.get("state_dict", args[2] if len(args) > 2 else None)
    if not adapters or (given is not None and not any(is_adapters_key(key, module) for key in given)):
        return save(*args, **kwargs)
    if all(adapter.merged for adapter in adapters) and given is None:
        return save(*args[:2], **{**kwargs, "state_dict": base_state_dict(module)})
    if "state_dict" not in kwargs and len(args) < 3:
        raise StateError(
            f"{METHOD}: adapters are attached, and {RIGHT_CALLS}. (The base alone: "
            "`save_pretrained(folder, state_dict=ll.base_state_dict(model))`)"
        )
    _warn(stacklevel=3)
    return save(*args, **kwargs)


def after_state_dict(root: nn.Module, tensors: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Warn where a module around the root, on which no guard stands, is saved by its `save_pretrained`."""
    frame = sys._getframe(1) if prefix else None
    while frame is not None:
        saved = frame.f_locals.get("self") if frame.f_code.co_name == METHOD else None
        if isinstance(saved, nn.Module) and METHOD not in vars(saved):
            _warn(stacklevel=2)
            return
        frame = frame.f_back


def _warn(stacklevel: int) -> None:
    warnings.warn(
        f"{METHOD}: this checkpoint resumes training in a model with the same adapters attached, but {RIGHT_CALLS}",
        LoraLiteWarning,
        stacklevel=stacklevel + 1,
    )
