"""Adapters as a folder that peft, transformers, vLLM and SGLang load: plain LoRA wherever the change has low rank."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_lite.adapter import Adapter
from lora_lite.errors import CheckpointError, StateError
from lora_lite.files.base_check import base_name
from lora_lite.interop.card import card
from lora_lite.interop.peft_folder import new_folder, write_folder
from lora_lite.interop.peft_types import PeftType, type_of_method
from lora_lite.interop.sayable import refuse_unsayable, whole_modules
from lora_lite.interop.verify import Agreement, peft_installed, verify
from lora_lite.layers.linear import is_conv1d
from lora_lite.merging.fold import adapted_layers
from lora_lite.merging.low_rank import LowRankChange, change_of, low_rank
from lora_lite.runtime.coefficient import scale
from lora_lite.runtime.state import State, refuse_merged, root_of
from lora_lite.runtime.transaction import Transaction

# What vLLM allocates room for, up to where an adapter is no longer small; it refuses other ranks than these.
RANKS = (8, 16, 32, 64, 128, 256)
# By the end of the model's class. SEQ_2_SEQ_LM is left out: peft 0.21's wrapper of it needs a method that transformers
# 5 has no more, and without a task peft wraps such a model as it is.
HEADS = ("classifier", "score", "qa_outputs")
TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}


@dataclass(frozen=True)
class Exported:
    """What an export wrote, and how well it agrees with the model.

    Attributes:
        folder: where.
        form: "lora" (the exact change), "rank k" (the best part of that rank) or peft's own type, such as "IA3".
        rank: r of the folder; the ranks of layers below it are padded with zeros. None for types without one.
        layers: number of adapted layers.
        weight_error: largest ||dW - B A|| / ||dW|| of a layer; 0 in peft's own type.
        agreement: peft's outputs against ours, measured on what was written.
        refused_by: servers that refuse the folder, and why.
    """

    folder: str
    form: str
    rank: int | None
    layers: int
    weight_error: float
    agreement: Agreement
    refused_by: tuple[str, ...]

    def __str__(self) -> str:
        rank = f", rank {self.rank}" if self.rank is not None else ""
        lines = [f"{self.folder}: {self.form}{rank}, {self.layers} layers; {self.agreement}"]
        if self.weight_error > 1e-6:
            lines.append(f"weight error {self.weight_error:.3g} (||dW - B A|| / ||dW||, the worst layer)")
        return "\n".join([*lines, *self.refused_by])


def export_peft(
    model: nn.Module,
    folder: str | os.PathLike[str],
    name: str | None = None,
    rank: int | None = None,
    inputs: Mapping[str, Any] | None = None,
) -> Exported:
    """Write what the adapters do, at the coefficients in force, as a folder that peft loads; and load it to compare.

    A change of low rank is written as plain LoRA, exactly, whatever the method and however many adapters: alpha = r and
    no setting that a server could misread, one rank for all layers, padded with zeros to one that servers take (8, 16,
    32, 64, 128, 256). DoRA, IA3, IA3-FF and RoAd, whose changes have full rank, are written as peft's own types where
    they stand alone and at c = 1. `train_also` weights become `modules_to_save`.

    Args:
        model: the model, not merged.
        folder: a new folder, or that of an earlier export.
        name: this adapter alone, the others at 0. None: all of them together.
        rank: at most this rank: the best such part of each layer's change, with its error measured. For any method.
        inputs: a batch to compare outputs on. None: random ones where the model's config tells what it reads; layers
            are compared in any case.

    Returns:
        `Exported`, whose text says what was written and how large the measured errors are.

    Raises:
        StateError: nothing attached, merged, no change at all, or peft's outputs differ from ours (nothing is written).
        NotAffineError: a change that no LoRA equals. CheckpointError: a full rank and no `rank`; a folder with other
            files. ImportError: peft is not installed (`pip install peft`); it is what the folder is compared with.
    """
    root, state = root_of(model, name)
    refuse_merged(state, "export_peft")
    names = list(state.adapters) if name is None else [name]
    refuse_unsayable(model, root, state, names)
    paths = list(adapted_layers(root, state, names))
    with new_folder(folder) as scratch, peft_installed():
        own = _own_type(root, state, names) if rank is None else None
        changes = _changes(root, state, names, rank) if own is None else {}
        settings, tensors = _as_lora(changes) if own is None else _in_own_type(root, names, own)
        form = settings["peft_type"] if own else "lora" if rank is None else f"rank {rank}"
        also, tied = whole_modules(root, names)
        settings |= _where(root, paths, also) | ({"ensure_weight_tying": True} if tied else {})
        if settings["peft_type"] == "IA3":
            inputs_of = [path for path, kind in (own or {}).items() if kind.method == "ia3_ff"]
            settings["feedforward_modules"] = [name for name in settings["target_modules"] if _names(name, inputs_of)]
        for path in [*also, *tied]:
            tensors |= {f"{path}.{key}": value for key, value in root.get_submodule(path).state_dict().items()}
        write_folder(scratch, settings, tensors, "")
        agreement = verify(root, scratch, names, changes if rank is not None else None, inputs)
        error = max((each.error for each in changes.values() if each.rank), default=0.0)
        form = "DoRA" if settings.get("use_dora") else form
        done = Exported(str(folder), form, settings.get("r"), len(paths), error, agreement, _refusals(settings))
        write_folder(scratch, settings, tensors, card(done, base_name(root), settings))
    return done


def _changes(root: nn.Module, state: State, names: list[str], rank: int | None) -> dict[str, LowRankChange]:
    """The factors of each layer's change. Raises `CheckpointError` at the first whose exact rank is too large."""
    if rank is not None:
        return low_rank(root, names[0] if len(names) < len(state.adapters) else None, rank)
    changes: dict[str, LowRankChange] = {}
    others = dict.fromkeys((each for each in state.adapters if each not in names), 0.0)
    with Transaction(root), scale(root, others):
        for path, layer in adapted_layers(root, state, names).items():
            changes[path] = change_of(layer, path, most=RANKS[-1])
            if changes[path].rank > RANKS[-1]:
                raise CheckpointError(
                    f"export_peft: the change of {path} has a rank above {RANKS[-1]}, more than servers take; give "
                    "rank=k for the best part of that rank, or merge (ll.merge)"
                )
    return changes


def _as_lora(changes: Mapping[str, LowRankChange]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """peft's settings and tensors of plain LoRA with alpha = r, of one rank."""
    most = max(each.rank for each in changes.values())
    if most == 0 and not any(each.bias is not None for each in changes.values()):
        raise StateError(
            "export_peft: the adapters change nothing (untrained, or at coefficient 0), and the folder would load with "
            "no effect; train them, or set the coefficient with ll.scale(model, 1)"
        )
    if most > RANKS[-1]:
        raise CheckpointError(f"export_peft: rank = {most} is more than servers take ({RANKS[-1]})")
    r = next(each for each in RANKS if each >= most)
    biased = any(each.bias is not None for each in changes.values())
    tensors: dict[str, Tensor] = {}
    for path, change in changes.items():
        B, A = (value.float() for value in change)
        size = A.norm().sqrt().clamp(min=1e-30)  # B and A of one size, so that 16 bits hold both
        tensors[f"{path}.lora_A.weight"] = nn.functional.pad(A / size, (0, 0, 0, r - change.rank))
        tensors[f"{path}.lora_B.weight"] = nn.functional.pad(B * size, (0, r - change.rank))
        if biased:
            tensors[f"{path}.lora_B.bias"] = (torch.zeros(B.shape[0]) if change.bias is None else change.bias).float()
    settings = {"peft_type": "LORA", "r": r, "lora_alpha": r, "lora_dropout": 0.0, "bias": "none"}
    return settings | ({"lora_bias": True} if biased else {}), tensors


def _own_type(root: nn.Module, state: State, names: list[str]) -> dict[str, PeftType] | None:
    """peft's own type of each layer, by path, where no plain LoRA says it and one of its types does: one adapter a
    layer, at c = 1, all of one type and with the same settings."""
    kinds: dict[str, PeftType] = {}
    for path, layer in adapted_layers(root, state, names).items():
        store: Any = layer.lora
        acting: list[Adapter] = [store[name] for name in names if name in store]
        c = acting[0].coefficient.value
        kind = type_of_method(acting[0].facts.name)
        if len(acting) > 1 or kind is None or not kind.full_rank or c.ndim or float(c) != 1.0:
            return None
        kinds[path] = kind
    settings = [(kind.peft_type, kind.theirs(_adapter(root, path, names).cfg)) for path, kind in kinds.items()]
    return kinds if all(each == settings[0] for each in settings) else None


def _adapter(root: nn.Module, path: str, names: list[str]) -> Adapter:
    store = root.get_submodule(path).lora
    return next(store[name] for name in names if name in store)  # type: ignore[operator, index, return-value]


def _in_own_type(
    root: nn.Module, names: list[str], kinds: Mapping[str, PeftType]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """peft's settings and tensors in its own type."""
    tensors: dict[str, Tensor] = {}
    settings: dict[str, Any] = {}
    for path, kind in kinds.items():
        adapter = _adapter(root, path, names)
        settings = {"peft_type": kind.peft_type, **kind.theirs(adapter.cfg)}
        own = adapter.state_dict()
        tensors |= {f"{path}.{end}": layout(own[key]) for key, (end, layout) in kind.keys(adapter).items()}
    if settings["peft_type"] == "LORA":
        settings["bias"] = "none"
    return settings, tensors


def _where(root: nn.Module, paths: list[str], whole: list[str]) -> dict[str, Any]:
    """peft's settings of where the layers are: by their last names where these name nothing else, else by their paths,
    else (where a path is the end of another module's) by a regex."""
    last = sorted({path.rpartition(".")[2] for path in paths})
    modules = [path for path, module in root.named_modules() if not isinstance(module, Adapter)]
    shown: list[str] | str = "|".join(re.escape(path) for path in paths)
    for names in (last, sorted(paths)):
        if {path for path in modules if any(_names(name, [path]) for name in names)} == set(paths):
            shown = names
            break
    transposed = [is_conv1d(root.get_submodule(path)) for path in paths]
    return {
        "base_model_name_or_path": base_name(root),
        "fan_in_fan_out": all(transposed),
        "inference_mode": True,
        "modules_to_save": whole or None,
        "target_modules": shown,
        "task_type": _task(root, whole),
    }


def _task(root: nn.Module, whole: list[str]) -> str | None:
    """peft's task; None where its wrapper does more than wrap: the one of a classifier also saves its head."""
    task = next((task for end, task in TASKS.items() if type(root).__name__.endswith(end)), None)
    if task == "CAUSAL_LM":
        return task if hasattr(root, "prepare_inputs_for_generation") else None
    return task if any(path.rpartition(".")[2] in HEADS for path in whole) else None


def _names(name: str, paths: list[str]) -> bool:
    return any(path == name or path.endswith(f".{name}") for path in paths)


def _refusals(settings: Mapping[str, Any]) -> tuple[str, ...]:
    """Which servers refuse a folder with these settings (their loaders' rules; docs/interop.md)."""
    reasons = []
    if settings["peft_type"] != "LORA" or settings.get("use_dora"):
        reasons.append("vLLM, SGLang: take plain LoRA alone; give rank=k, or merge")
    if settings.get("lora_bias"):
        reasons.append("vLLM, SGLang: take no lora_bias (the change has one of the bias); merge instead")
    if settings["modules_to_save"]:
        reasons.append("vLLM, SGLang: take no modules_to_save (train_also); merge instead")
    return tuple(reasons)
