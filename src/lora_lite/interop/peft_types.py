"""The adapter types that peft has as well: which settings and tensors of theirs are which of ours.

What peft computes for each is held equal to ours, forward and gradients, by tests/methods/test_fidelity_peft.py.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora_lite.adapter import Adapter
from lora_lite.errors import CheckpointError
from lora_lite.methods import methods
from lora_lite.patterns import is_plain

Settings = Mapping[str, Any]


def same(tensor: Tensor) -> Tensor:
    """Laid out as ours."""
    return tensor


def column(tensor: Tensor) -> Tensor:
    """(o) as (o, 1)."""
    return tensor.unsqueeze(1)


def row(tensor: Tensor) -> Tensor:
    """(i) as (1, i)."""
    return tensor.unsqueeze(0)


@dataclass(frozen=True)
class PeftType:
    """One of our methods as peft has it.

    Attributes:
        method: registry name of ours.
        peft_type: peft's name for the type; several methods may share one.
        tensors: our tensor -> (the end of peft's key, how ours is laid out there).
        ours: (peft's settings, path of the layer) -> the fields of our config.
        theirs: our config -> peft's settings.
        start: what an imported adapter's frozen tensors are, where `init` gives them other values than peft has.
        full_rank: whether a change has no low-rank factors to be exported as.
    """

    method: str
    peft_type: str
    tensors: Mapping[str, tuple[str, Callable[[Tensor], Tensor]]]
    ours: Callable[[Settings, str], dict[str, Any]]
    theirs: Callable[[Any], dict[str, Any]]
    start: Callable[[Any], None] | None = None
    full_rank: bool = False

    def keys(self, adapter: Adapter) -> dict[str, tuple[str, Callable[[Tensor], Tensor]]]:
        """The entries of `tensors` that this adapter has."""
        own = adapter.state_dict()
        return {name: entry for name, entry in self.tensors.items() if name in own}

    def read(self, adapter: Adapter, name: str, value: Tensor) -> Tensor:
        """peft's tensor in our layout; the caller has compared shapes."""
        _, layout = self.tensors[name]
        return value.T if layout is torch.t else value.reshape(adapter.state_dict()[name].shape)


def at_path(pattern: Mapping[str, Any] | None, path: str, default: Any, field: str) -> Any:
    """The value that a `rank_pattern` or the like has for a layer: of the first name that the path ends in."""
    for name, value in (pattern or {}).items():
        written = str(name).removeprefix("^").removesuffix("$")
        if not is_plain(written.replace("\\.", ".")):
            raise CheckpointError(f"{field} names layers by the regex {name[:80]!r}; only plain names are understood")
        # As peft reads it: a dot stands for any character, and only "^" holds it to the start of the path.
        if re.fullmatch(written if str(name).startswith("^") else rf"(.*\.)?({written})", path):
            return value
    return default


def _lora(s: Settings, path: str) -> dict[str, Any]:
    return {
        "r": at_path(s.get("rank_pattern"), path, s.get("r", 8), "rank_pattern"),
        "alpha": at_path(s.get("alpha_pattern"), path, s.get("lora_alpha", 8), "alpha_pattern"),
        "rslora": s.get("use_rslora", False),
        "dropout": s.get("lora_dropout", 0.0),
    }


def _to_lora(cfg: Any) -> dict[str, Any]:
    return {"r": cfg.r, "lora_alpha": cfg.alpha, "use_rslora": cfg.rslora, "lora_dropout": cfg.dropout}


def _delora(s: Settings, path: str) -> dict[str, Any]:
    return {
        "r": at_path(s.get("rank_pattern"), path, s.get("r", 8), "rank_pattern"),
        "lambda0": at_path(s.get("lambda_pattern"), path, s.get("delora_lambda", 15), "lambda_pattern"),
    }


@torch.no_grad()
def _starts_at_zero(adapter: Any) -> None:
    """peft's DeLoRA starts at B = 0 and subtracts no initial update (docs/fidelity.md)."""
    adapter.A0.copy_(adapter.A)
    adapter.B0.zero_()


_A_B = {"A": ("lora_A.weight", same), "B": ("lora_B.weight", same)}
TYPES = (
    PeftType(
        "lora", "LORA", {**_A_B, "b": ("lora_B.bias", same)},
        lambda s, path: {**_lora(s, path), "bias": bool(s.get("lora_bias"))},
        lambda cfg: {**_to_lora(cfg), "lora_bias": cfg.bias},
    ),
    PeftType(
        "dora", "LORA", {**_A_B, "m": ("lora_magnitude_vector", same)},
        _lora, lambda cfg: {**_to_lora(cfg), "use_dora": True}, full_rank=True,
    ),
    PeftType("ia3", "IA3", {"l": ("ia3_l", column)}, lambda s, path: {}, lambda cfg: {}, full_rank=True),
    PeftType("ia3_ff", "IA3", {"l": ("ia3_l", row)}, lambda s, path: {}, lambda cfg: {}, full_rank=True),
    PeftType("hra", "HRA", {"U": ("hra_u", torch.t)}, lambda s, path: {"r": s.get("r", 8)}, lambda cfg: {"r": cfg.r}),
    PeftType(
        "road", "ROAD", {"theta": ("road_theta", torch.flatten), "alpha": ("road_alpha", torch.flatten)},
        lambda s, path: {"road_variant": s.get("variant", "road_1"), "group_size": s.get("group_size", 64)},
        lambda cfg: {"variant": cfg.road_variant, "group_size": cfg.group_size}, full_rank=True,
    ),
    PeftType(
        "delora", "DELORA",
        {"A": ("delora_A", same), "B": ("delora_B", same), "lam": ("delora_lambda", same),
         "w": ("delora_w_norm", same)},
        _delora, lambda cfg: {"r": cfg.r, "delora_lambda": cfg.lambda0}, start=_starts_at_zero,
    ),
)  # fmt: skip

# Settings that change nothing of what a trained folder computes: of the run that made it, of where its layers are
# (which its keys tell), of how values started (which the tensors have replaced).
HARMLESS = frozenset(
    [
        "peft_type",
        "task_type",
        "auto_mapping",
        "peft_version",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
        "target_modules",
        "exclude_modules",
        "feedforward_modules",
        "layers_to_transform",
        "layers_pattern",
        "modules_to_save",
        "fan_in_fan_out",
        "init_weights",
        "init_ia3_weights",
        "megatron_core",
        "qalora_group_size",
        "eva_config",
        "loftq_config",
        "runtime_config",
        "ensure_weight_tying",
    ]
)
UNDERSTOOD = {
    "LORA": "r lora_alpha lora_dropout use_rslora use_dora lora_bias rank_pattern alpha_pattern init_lora_weights",
    "IA3": "",
    "HRA": "r",
    "ROAD": "variant group_size",
    "DELORA": "r delora_lambda rank_pattern lambda_pattern",
}
STARTS = (
    True,
    False,
    "gaussian",
    "eva",
    "orthogonal",
)  # of those `init_lora_weights` that leave the base's weights alone


def refuse_unknown(settings: Settings) -> None:
    """Raise `CheckpointError` for a type or a setting whose meaning is not known here, by name."""
    peft_type = settings.get("peft_type")
    if not isinstance(peft_type, str) or peft_type not in UNDERSTOOD:
        raise CheckpointError(
            f"peft_type {repr(peft_type)[:80]} has no method here; those that have: {', '.join(sorted(UNDERSTOOD))}"
        )
    start = settings.get("init_lora_weights", True)
    for name in ("rank_pattern", "alpha_pattern", "lambda_pattern"):
        if not isinstance(settings.get(name) or {}, dict):
            raise CheckpointError(
                f"{name} must map names of layers to numbers, not be a {type(settings[name]).__name__}"
            )
    if not isinstance(start, bool | str) or start not in STARTS:
        raise CheckpointError(
            f"init_lora_weights = {str(start)[:80]!r}: the base's weights were changed when this adapter was made, and "
            "are not in the folder; convert it with peft: model.save_pretrained(folder, "
            "path_initial_model_for_weight_conversion=...)"
        )
    known = HARMLESS | set(UNDERSTOOD[peft_type].split())
    neutral = (None, False, "none", 0, {}, [])
    if strange := [name for name, value in settings.items() if name not in known and value not in neutral]:
        raise CheckpointError(
            f"{strange[0][:80]} = {repr(settings[strange[0]])[:80]} of a {peft_type} is not understood here, and may "
            "change what the adapter computes"
        )


def types_of(peft_type: str) -> list[PeftType]:
    """Our methods that share a type of peft's."""
    return [each for each in TYPES if each.peft_type == peft_type]


def type_of_method(name: str) -> PeftType | None:
    """peft's form of a method; None where it has none."""
    return next((each for each in TYPES if each.method == name), None)


def config_of(kind: PeftType, settings: Settings, path: str, dtype: torch.dtype) -> Any:
    """Our config of one layer. Raises `CheckpointError` for values that it does not take."""
    try:
        return methods()[kind.method].Config(**kind.ours(settings, path), dtype=dtype)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: {error}") from error
