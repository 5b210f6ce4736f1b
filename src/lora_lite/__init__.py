"""lora-lite: write, verify, compare, steer and ship small adapters for frozen PyTorch models.

import lora_lite as ll
"""

import importlib as _importlib
from importlib.metadata import version as _version
from typing import Any

from lora_lite.adapter import Adapter
from lora_lite.calibration.contrast import Contrast
from lora_lite.checking.check import CheckReport, check
from lora_lite.config import AdapterConfig
from lora_lite.errors import (
    BaseMismatchError,
    CalibrationError,
    CheckError,
    CheckpointError,
    CoefficientError,
    LoraLiteError,
    LoraLiteWarning,
    MethodError,
    NotAffineError,
    StateError,
    TargetError,
)
from lora_lite.facts import Facts
from lora_lite.files.checkpoint import load, save
from lora_lite.frozen_basis.basis import Basis, register_basis
from lora_lite.merging.merge import Merged, merge, merged_weights, unmerge
from lora_lite.optim import param_groups
from lora_lite.registry import methods, register
from lora_lite.runtime.attach import attach, detach
from lora_lite.runtime.attach_cost import AttachCost
from lora_lite.runtime.attachment import Attachment, attachment, base_state_dict
from lora_lite.runtime.coefficient import disabled, scale

# Registers the methods. The folder is callable, and from here on it is what `methods` means.
_importlib.import_module("lora_lite.methods")

__version__ = _version("lora-lite")

__all__ = [
    "Adapter",
    "AdapterConfig",
    "AttachCost",
    "Attachment",
    "Basis",
    "BaseMismatchError",
    "CalibrationError",
    "CheckError",
    "CheckReport",
    "CheckpointError",
    "CoefficientError",
    "Contrast",
    "Facts",
    "LoraLiteError",
    "LoraLiteWarning",
    "Merged",
    "MethodError",
    "NotAffineError",
    "StateError",
    "TargetError",
    "attach",
    "attachment",
    "base_state_dict",
    "check",
    "detach",
    "disabled",
    "load",
    "merge",
    "merged_weights",
    "methods",
    "param_groups",
    "register",
    "register_basis",
    "save",
    "scale",
    "unmerge",
]


def _configs() -> dict[str, type[AdapterConfig]]:
    return {cls.Config.__name__: cls.Config for cls in methods().values()}


def __getattr__(name: str) -> Any:
    # Every registered method's config class is a name of this package; a list of them here would be a second one.
    if name.endswith("Config") and name in (configs := _configs()):
        return configs[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_configs()])
