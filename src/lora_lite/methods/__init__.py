"""The methods, one file each. Importing this folder registers every method in it; calling it lists them."""

import importlib
import pkgutil
import sys
from types import ModuleType

from lora_lite.adapter import Adapter
from lora_lite.registry import registered


def methods() -> dict[str, type[Adapter]]:
    """The registered methods, by name: the library's own, and those of others."""
    return registered()


class _Methods(ModuleType):
    """The folder and the function `lora_lite.methods` are one name, so they are one object."""

    def __call__(self) -> dict[str, type[Adapter]]:
        """The registered methods, by name."""
        return methods()


for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
sys.modules[__name__].__class__ = _Methods
