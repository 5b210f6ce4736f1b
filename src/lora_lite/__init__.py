"""lora-lite: write, verify, compare, steer and ship small adapters for frozen PyTorch models.

import lora_lite as ll

Nothing is imported before the first name is asked for, so that `lora-lite --help` need not wait for torch. The first
name brings all of them.
"""

import importlib as _importlib
from typing import TYPE_CHECKING, Any

from lora_lite.version import __version__ as __version__

# What editors and type checkers read; at run time it is `_WHERE`, and a test keeps the two in step.
if TYPE_CHECKING:
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
    from lora_lite.interop.export_peft import Exported, export_peft
    from lora_lite.interop.import_peft import import_peft
    from lora_lite.merging.low_rank import LowRankChange, low_rank
    from lora_lite.merging.merge import Merged, merge, merged_weights, unmerge
    from lora_lite.methods import methods
    from lora_lite.methods.antipasto import AntiPaSTOConfig as AntiPaSTOConfig
    from lora_lite.methods.antipasto_ablate import AntiPaSTOAblateConfig as AntiPaSTOAblateConfig
    from lora_lite.methods.antipasto_arrow import AntiPaSTOArrowConfig as AntiPaSTOArrowConfig
    from lora_lite.methods.antipasto_asvd import AntiPaSTOASVDConfig as AntiPaSTOASVDConfig
    from lora_lite.methods.antipasto_corda import AntiPaSTOCorDAConfig as AntiPaSTOCorDAConfig
    from lora_lite.methods.antipasto_dplr import AntiPaSTODPLRConfig as AntiPaSTODPLRConfig
    from lora_lite.methods.antipasto_rot import AntiPaSTORotConfig as AntiPaSTORotConfig
    from lora_lite.methods.delora import DeLoRAConfig as DeLoRAConfig
    from lora_lite.methods.dora import DoRAConfig as DoRAConfig
    from lora_lite.methods.eva import EVAConfig as EVAConfig
    from lora_lite.methods.hra import HRAConfig as HRAConfig
    from lora_lite.methods.ia3 import IA3Config as IA3Config
    from lora_lite.methods.ia3_ff import IA3FFConfig as IA3FFConfig
    from lora_lite.methods.lora import LoRAConfig as LoRAConfig
    from lora_lite.methods.lora_xs import LoRAXSConfig as LoRAXSConfig
    from lora_lite.methods.pissa import PiSSAConfig as PiSSAConfig
    from lora_lite.methods.road import RoadConfig as RoadConfig
    from lora_lite.methods.sspace import SSpaceConfig as SSpaceConfig
    from lora_lite.optim import param_groups
    from lora_lite.registry import register
    from lora_lite.runtime.attach import attach, detach
    from lora_lite.runtime.attach_cost import AttachCost
    from lora_lite.runtime.attachment import Attachment, attachment, base_state_dict
    from lora_lite.runtime.coefficient import disabled, scale

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
    "Exported",
    "Facts",
    "LoraLiteError",
    "LoraLiteWarning",
    "LowRankChange",
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
    "export_peft",
    "import_peft",
    "load",
    "low_rank",
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

# module -> the names of this package that it defines.
_WHERE = {
    "lora_lite.adapter": "Adapter",
    "lora_lite.calibration.contrast": "Contrast",
    "lora_lite.checking.check": "CheckReport check",
    "lora_lite.config": "AdapterConfig",
    "lora_lite.errors": (
        "BaseMismatchError CalibrationError CheckError CheckpointError CoefficientError LoraLiteError "
        "LoraLiteWarning MethodError NotAffineError StateError TargetError"
    ),
    "lora_lite.facts": "Facts",
    "lora_lite.files.checkpoint": "load save",
    "lora_lite.frozen_basis.basis": "Basis register_basis",
    "lora_lite.interop.export_peft": "Exported export_peft",
    "lora_lite.interop.import_peft": "import_peft",
    "lora_lite.merging.low_rank": "LowRankChange low_rank",
    "lora_lite.merging.merge": "Merged merge merged_weights unmerge",
    "lora_lite.methods": "methods",
    "lora_lite.optim": "param_groups",
    "lora_lite.registry": "register",
    "lora_lite.runtime.attach": "attach detach",
    "lora_lite.runtime.attach_cost": "AttachCost",
    "lora_lite.runtime.attachment": "Attachment attachment base_state_dict",
    "lora_lite.runtime.coefficient": "disabled scale",
}


def _load() -> None:
    """Import the library: from here on every name of `__all__` is a plain one of this module."""
    if "attach" in globals():
        return
    public = {
        name: getattr(_importlib.import_module(where), name)
        for where, names in _WHERE.items()
        for name in names.split()
    }
    # Registers the methods. The folder is callable, and it is what `methods` means.
    globals().update(public, methods=_importlib.import_module("lora_lite.methods"))


def _configs() -> dict[str, Any]:
    _load()
    return {cls.Config.__name__: cls.Config for cls in globals()["methods"]().values()}


if not TYPE_CHECKING:  # a checker would take every name for one of this module

    def __getattr__(name: str) -> Any:
        if name in __all__:
            _load()
            return globals()[name]
        # Config classes are looked up in the registry, where those of one's own methods are as well.
        if name.endswith("Config") and name in (configs := _configs()):
            return configs[name]
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    configs = _configs()
    return sorted([*globals(), *configs])
