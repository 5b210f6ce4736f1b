"""A model's names and shapes, without its weights, and where its folder stores each."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora_lite.errors import CheckpointError
from lora_lite.interop.safetensors_folder import CONFIG, SafetensorsFolder, read_json


def skeleton(where: Path, trust_remote_code: bool = False) -> nn.Module:
    """The model of a folder on the meta device, of the class that its config names.

    Raises `CheckpointError` for a config that transformers makes no model of, or whose folder holds quantised weights.
    """
    import transformers

    config = read_json(where / CONFIG)
    if "quantization_config" in config:
        raise CheckpointError(
            f"{where}: its weights are quantised, and merged ones would be rounded again; give the folder of the model "
            "that it was made from"
        )
    names = config.get("architectures")
    name = str(names[0]) if isinstance(names, list) and names else ""
    trust: dict[str, Any] = {"trust_remote_code": trust_remote_code}  # left out, transformers asks on a terminal
    try:
        settings = transformers.AutoConfig.from_pretrained(where, **trust)
        cls: Any = getattr(transformers, name, None)
        with torch.device("meta"):
            if cls is not None:
                return cls(settings).eval()
            return transformers.AutoModelForCausalLM.from_config(settings, **trust).eval()
    except (OSError, ValueError, ImportError, RuntimeError, LookupError, TypeError, AttributeError) as error:
        hint = "; with --trust-remote-code (trust_remote_code=True) its own code is run" if "auto_map" in config else ""
        raise CheckpointError(f"{where}: transformers makes no {name or 'model'} of it: {error}{hint}") from error


class Names:
    """Where a folder stores a model's parameters and buffers, which it may do with or without the name of the base
    model (`base_model_prefix`), and once for several that are tied.

    Args:
        model: on the meta device. folder: its folder.
    """

    def __init__(self, model: nn.Module, folder: SafetensorsFolder) -> None:
        self.folder, self.prefix = folder, str(getattr(model, "base_model_prefix", ""))
        self._aliases: dict[str, list[str]] = {}
        self._tied: dict[str, list[str]] = {}
        owners: dict[tuple[int, str], list[str]] = {}
        holders: dict[int, list[list[str]]] = {}
        for path, module in model.named_modules(remove_duplicate=False):
            for key, value in [*module._parameters.items(), *module._buffers.items()]:
                if value is None:
                    continue
                names = owners.get((id(module), key))
                if names is None:
                    owners[(id(module), key)] = names = []
                    holders.setdefault(id(value), []).append(names)
                names.append(f"{path}.{key}" if path else key)
        for groups in holders.values():
            for names in groups:
                for name in names:
                    self._aliases[name] = names
                    self._tied[name] = [each[0] for each in groups]

    def __contains__(self, key: str) -> bool:
        return key in self._aliases

    def aliases(self, key: str) -> Sequence[str]:
        """All names of the parameter in the very module, which may lie at several places."""
        return self._aliases[key]

    def tied(self, key: str) -> Sequence[str]:
        """A name for each of the modules that share the parameter."""
        return self._tied[key]

    def own(self, key: str) -> str | None:
        """Under which key the folder stores what the very module holds; None where it stores none for it."""
        for name in self._aliases[key]:
            inner = name.removeprefix(f"{self.prefix}.")
            for each in (name, f"{self.prefix}.{name}", inner):
                if each in self.folder.tensors:
                    return each
        return None

    def find(self, key: str) -> str | None:
        """Under which key the folder stores a parameter, by any of its names; None where it stores none."""
        if key not in self:
            return None
        return next((own for name in (key, *self.tied(key)) if (own := self.own(name)) is not None), None)

    def require(self, key: str, shape: Sequence[int], otherwise: str) -> str:
        """`find`, of a tensor of that shape. Raises `CheckpointError`, which says what to do `otherwise`."""
        stored = self.find(key)
        if stored is None:
            raise CheckpointError(
                f"{self.folder.where}: its files hold no {key} that transformers would read unchanged (it converts "
                f"some when it loads them); {otherwise}"
            )
        if self.folder.tensors[stored].shape != tuple(shape):
            raise CheckpointError(
                f"{self.folder.where}: {stored} is {self.folder.tensors[stored].shape} there, and {tuple(shape)} in "
                f"the model that its config describes; {otherwise}"
            )
        return stored

    def new(self, key: str) -> str:
        """The key for a tensor that the folder does not store yet: with the base model's name if its others have it."""
        inner = key.removeprefix(f"{self.prefix}.")
        bare = not any(each.startswith(f"{self.prefix}.") for each in self.folder.tensors)
        return inner if bare else key
