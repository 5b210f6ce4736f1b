"""What transformers notes about a quantised model, kept true when layers become plain."""

from collections.abc import Iterable
from typing import Any

from torch import nn

from lora_lite.linear import is_linear, is_quantized

FLAGS = ("is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit", "hf_quantizer", "quantization_method")


def forget_quantization(root: nn.Module, merged: Iterable[str]) -> None:
    """Let every transformers model within `root` say that the layers `merged` (paths) are plain, so that what it saves
    can be read again: among the layers not to convert, or as a plain model where no quantised layer is left."""
    for prefix, model in root.named_modules():
        config: Any = getattr(getattr(model, "config", None), "quantization_config", None)
        if config is None:
            continue
        start = f"{prefix}." if prefix else ""
        if any(is_linear(module) and is_quantized(module) for module in model.modules()):
            plain = [path.removeprefix(start) for path in merged if path.startswith(start)]
            for owner, name in ((config, "llm_int8_skip_modules"), (config, "modules_to_not_convert")):
                if hasattr(owner, name):
                    setattr(owner, name, sorted({*(getattr(owner, name) or ()), *plain}))
            continue
        del model.config.quantization_config  # type: ignore[union-attr]
        for flag in FLAGS:
            model.__dict__.pop(flag, None)
