"""What transformers notes about a quantised model, kept true when layers become plain."""

from typing import Any

from torch import nn

from lora_lite.layers.linear import is_linear, is_quantized

FLAGS = ("is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit", "hf_quantizer", "quantization_method")


def forget_quantization(root: nn.Module) -> list[tuple[Any, str, Any]]:
    """Let every transformers model within `root` say which of its layers are plain, so that what it saves can be read
    again: among the layers not to convert, or as a plain model where no quantised layer is left.

    Returns:
        (owner, attribute, what it was) of each change, for `remember_quantization`; a model as owner is its path.
    """
    changes: list[tuple[Any, str, Any]] = []
    seen: set[int] = set()  # the parts of a model share its config: its outermost module speaks for all of them
    for place, model in root.named_modules():
        config: Any = getattr(getattr(model, "config", None), "quantization_config", None)
        if config is None or id(config) in seen:
            continue
        seen.add(id(config))
        layers = {path: is_quantized(layer) for path, layer in model.named_modules() if is_linear(layer)}
        if any(layers.values()):
            # All of them: a list that is given replaces the default, which leaves out the head.
            plain = sorted(path for path, quantized in layers.items() if not quantized)
            for name in ("llm_int8_skip_modules", "modules_to_not_convert"):
                if hasattr(config, name):
                    changes.append((config, name, getattr(config, name)))
                    setattr(config, name, plain)
            continue
        changes.append((model.config, "quantization_config", config))
        changes += [(place, flag, vars(model)[flag]) for flag in FLAGS if flag in vars(model)]
        del model.config.quantization_config  # type: ignore[union-attr]
        for flag in FLAGS:
            vars(model).pop(flag, None)
    return changes


def remember_quantization(root: nn.Module, changes: list[tuple[Any, str, Any]]) -> None:
    """Undo what `forget_quantization` changed."""
    for owner, key, value in reversed(changes):
        setattr(root.get_submodule(owner) if isinstance(owner, str) else owner, key, value)
